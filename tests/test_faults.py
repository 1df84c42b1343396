"""Faults in real processes: a stage that hangs or raises, neighbours that do not fit, a folder that refuses."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from conftest import child_environment, small_config, torchrun_command
from PIL import Image

import blpipe

MARK = "BLPIPE_TEST_RUN"  # an environment variable, by which every process of a run is found, wherever it forked
NO_OVERRIDE = "-dac_override,-dac_read_search"  # without these, the permissions of files hold for root too


class Marked:
    """A command in the background; it and all that come from it carry a mark."""

    def __init__(self, command: list[str], folder: Path, **environment: str):
        self._mark = f"{MARK}={uuid.uuid4()}"
        marked = dict([self._mark.split("=")]) | environment
        self.process = subprocess.Popen(command, cwd=folder, env=child_environment() | marked, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> "Marked":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.stdout.close()
        self.process.wait()

    def read_until(self, beginning: str) -> str:
        """The next line of the output that begins so."""
        return next(line.rstrip() for line in self.process.stdout if line.startswith(beginning))

    def alive(self) -> list[int]:
        """Processes that have not ended; one that nobody has waited for yet has."""
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._mark in environment_of(path)]

    def worker(self, rank: int) -> int:
        """The process of a rank; DataLoader's workers, which have its environment too, came later."""
        return min(pid for pid in self.alive() if f"RANK={rank}" in environment_of(Path(f"/proc/{pid}")))

    def listening(self) -> set[str]:
        """Inodes of the sockets on which these processes listen."""
        found = set()
        for pid in self.alive():
            for file in Path(f"/proc/{pid}/fd").glob("*"):
                with suppress(OSError):
                    found |= set(re.findall(r"^socket:\[(\d+)\]$", os.readlink(file)))
        return found & all_listening()


def environment_of(process: Path) -> list[str]:
    """The environment that a process began with; empty where it has ended."""
    try:
        return (process / "environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def all_listening() -> set[str]:
    """Inodes of all sockets that listen."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[3] == "0A"}


def wait_until(condition, seconds: float) -> None:
    """Fails where it takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def said_by_blpipe(output: str) -> list[str]:
    """Our own lines, out of all that torchrun prints."""
    return [line for line in output.splitlines() if line.startswith("blpipe: ")]


def write_config(folder: Path, **changes) -> list[str]:
    """Write a run that lasts until it is stopped; returns the words of its command after `python`."""
    tree = small_config("long", train__epochs=10_000, **changes)
    (folder / "long.yaml").write_text(yaml.safe_dump(tree))
    return ["-m", "blpipe", "train", "long.yaml"]


def test_a_stage_that_hangs_ends_the_run_which_names_it_and_who_waited(tmp_path):
    # Long epochs, so that it is hardly ever between two of them.
    command = write_config(tmp_path, runtime__timeout_seconds=5.0, train__eval_every_epochs=0,
                           data__args={"shape": [2, 8, 8], "classes": 4, "samples": 2000})
    with Marked(torchrun_command(3, *command), tmp_path) as run:
        run.read_until("epoch 1/")
        ports, hanging = run.listening(), run.worker(1)
        agent_and_hanging = {run.process.pid, hanging}
        os.kill(hanging, signal.SIGSTOP)
        line = run.read_until("blpipe: ")
        # The stopped process leaves torchrun's SIGTERM pending; torchrun kills it half a minute later, we at once.
        wait_until(lambda: set(run.alive()) == agent_and_hanging, 10)
        os.kill(hanging, signal.SIGKILL)
        rest, _ = run.process.communicate(timeout=10)
        step = re.fullmatch(r"blpipe: stage (?:1 \(rank 0\)|3 \(rank 2\)) (?:receiving from|sending to) stage 2 "
                            r"\(rank 1\): that process ended, or did not answer within runtime\.timeout_seconds "
                            r"\(at step (\d+)\)", line)
        assert step is not None, line
        assert int(step[1]) >= 125  # an epoch has so many, and one was over
        assert not said_by_blpipe(rest)
        assert run.process.returncode == 1
        assert not run.alive()
        assert ports and not ports & all_listening()


def test_a_stage_that_raises_is_named_once_and_leaves_no_process_and_no_port(tmp_path):
    for number in range(48):
        path = tmp_path / f"images/{'test' if number % 4 == 0 else 'train'}/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    command = write_config(
        tmp_path, partition={"cuts": ["block2"]}, train__batch_size=4,
        model={"target": "models_under_test:failing_net", "args": {"at": 80, "in_channels": 3}},
        data={"name": "imagefolder", "root": str(tmp_path / "images"), "workers": 1})
    with Marked(torchrun_command(2, *command), tmp_path) as run:
        run.read_until("epoch 1/")
        wait_until(lambda: len(run.alive()) > 1 + 2, 10)  # torchrun, the ranks and the one that reads
        ports = run.listening()
        line = run.read_until("blpipe: ")
        raised = time.monotonic()
        rest, _ = run.process.communicate(timeout=30)
        assert time.monotonic() - raised < 10
        assert line == "blpipe: stage 2 (rank 1, blocks block2…block5) failed at step 61: RuntimeError: out of luck"
        assert not said_by_blpipe(rest)
        assert run.process.returncode == 1
        assert not run.alive()
        assert ports and not ports & all_listening()


OTHER_VERSION = "import blpipe; blpipe.__version__ = '9.9'; from blpipe.cli import main; raise SystemExit(main())"


def test_a_neighbour_of_another_version_is_refused_on_both_sides(tmp_path):
    command = write_config(tmp_path, partition__stages=2)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's part
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [Marked([sys.executable, *words], tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **launched)
             for rank, words in enumerate([command, ["-c", OTHER_VERSION, "train", "long.yaml"]])]
    with ranks[0], ranks[1]:
        outputs = [rank.process.communicate(timeout=60)[0] for rank in ranks]
        assert [rank.process.returncode for rank in ranks] == [2, 2]
        assert not ranks[0].alive() + ranks[1].alive()
    line, = said_by_blpipe("".join(outputs))
    mine = blpipe.__version__
    assert line.removesuffix("; start every rank with the same config, data and versions") in [
        f"blpipe: rank 0 and rank 1 differ in blpipe: {mine} and 9.9",
        f"blpipe: rank 1 and rank 0 differ in blpipe: 9.9 and {mine}"]
    assert {path.name for path in tmp_path.glob("runs/**/*") if path.is_file()} <= {"config.yaml"}


@pytest.fixture
def denied(tmp_path):
    """A folder that may be read only, and the words that begin a command for which this holds."""
    folder = tmp_path / "denied"
    folder.mkdir(mode=0o555)
    prefix = [] if os.geteuid() else ["setpriv", f"--bounding-set={NO_OVERRIDE}", f"--inh-caps={NO_OVERRIDE}"]
    try:
        tried = subprocess.run([*prefix, "touch", str(folder / "file")], capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs setpriv, for files' permissions do not hold for root")
    assert tried.returncode == 1 and not (folder / "file").exists()
    return folder, prefix


def test_a_run_folder_that_may_not_be_written_is_said_in_one_line(tmp_path, denied):
    folder, prefix = denied
    command = write_config(tmp_path, partition__stages=2, runtime__runs="denied")
    with Marked([*prefix, sys.executable, *command], tmp_path) as run:
        output, _ = run.process.communicate(timeout=60)
        assert said_by_blpipe(output) == ["blpipe: runtime.runs: cannot write to denied/long: Permission denied; "
                                          "choose another folder"]
        assert run.process.returncode == 2
        assert not run.alive()
    assert not list(folder.iterdir())
