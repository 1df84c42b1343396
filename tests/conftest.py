"""Fixtures: small configs, and real processes to run them."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from blpipe.checkpoint.folders import newest_intact
from blpipe.checkpoint.saver import Saver
from blpipe.checkpoint.state import read
from blpipe.config import Config
from blpipe.config_file import parse_config
from blpipe.runs import train_run

REPOSITORY = Path(__file__).parent.parent
LONGEST_FIRST = ("test_soak.py", "test_readme.py", "test_restarts.py", "test_zoo.py", "test_engines.py",
                 "test_checkpoints.py", "test_processes.py", "test_recompute.py", "test_plan_command.py",
                 "test_faults.py", "test_forecast.py", "test_bad_input.py", "test_memory_benchmark.py",
                 "test_replicas.py", "test_nodes.py", "test_throughput.py")


def pytest_configure(config):
    """Be interrupted by SIGINT, and so all that tests start: a shell's background job begins with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Begin with the longest files, so that no worker is left alone with one at the end."""
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def _one_thread():
    """Both engines with the same number of threads: torchrun gives each process one."""
    torch.set_num_threads(1)


def small_config(name: str, **changes) -> dict:
    """A run of two epochs on 88 synthetic images, in batches of 16: the last one holds 8."""
    tree = {
        "name": name,
        "model": {"target": "models_under_test:conv_net"},
        "data": {"name": "synthetic", "args": {"shape": [2, 8, 8], "classes": 4, "samples": 88},
                 "augment": {"crop": 1, "flip": True}},
        "partition": {"stages": 3},
        "optimizer": {"name": "sgd", "lr": 0.05, "args": {"momentum": 0.9}},
        "train": {"epochs": 2, "batch_size": 16},
        "checkpoint": {"every_epochs": 0},
        "runtime": {"device": "cpu"},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    return tree


def train_locally(tree: dict, folder: Path) -> Path:
    """Train in this process; returns the run folder."""
    config: Config = parse_config({**tree, "runtime": {**tree["runtime"], "runs": str(folder / "local")}})
    train_run(config)
    return folder / "local" / tree["name"]


@cache
def rank_server() -> subprocess.Popen:
    """The process from which ranks are forked, as to import torch anew takes seconds; it keeps nothing from job to job.
    """
    return subprocess.Popen([sys.executable, str(REPOSITORY / "tests" / "ranks.py")], env=child_environment(),
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def pytest_sessionfinish():
    """End it."""
    if rank_server.cache_info().currsize:
        end_rank_server()


def end_rank_server() -> None:
    """By force: data workers that tests have left hold its input open."""
    os.killpg(rank_server().pid, signal.SIGKILL)
    rank_server().communicate()
    rank_server.cache_clear()


def train_in_processes(trees: list[dict], stages: int, folder: Path, timeout: float = 110,
                       **environment: str) -> list[Path]:
    """Train each config in `stages` processes; returns the run folders. See ranks.py for the environment."""
    said = folder / f"said_{time.monotonic_ns()}"
    said.touch()
    trees = [{**tree, "runtime": {**tree["runtime"], "runs": str(folder / "pipeline")}} for tree in trees]
    job = {"processes": stages, "trees": trees, "environment": child_environment() | environment,
           "folder": str(Path.cwd()), "said": str(said)}
    server = rank_server()
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    done = select.select([server.stdout], [], [], timeout)[0]
    if not done:
        end_rank_server()
    assert done, f"not within {timeout} s\n{said.read_text()}"
    assert server.stdout.readline() == "0\n", said.read_text()
    return [folder / "pipeline" / tree["name"] for tree in trees]


def torchrun(processes: int, *arguments: str, timeout: float = 110, **kwargs) -> subprocess.CompletedProcess:
    """torchrun on this machine, with a time-out."""
    return subprocess.run(torchrun_command(processes, *arguments), env=child_environment(), capture_output=True,
                          text=True, timeout=timeout, **kwargs)


class Started:
    """A command in the background, in a process group of its own; what it says goes to a file."""

    def __init__(self, command: list[str], folder: Path):
        self.folder, self.log = folder, folder / f"said_{time.monotonic_ns()}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=child_environment(), stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def said(self) -> str:
        """All that it has said so far."""
        return self.log.read_text()

    def workers(self) -> list[int]:
        """Process ids of torchrun's ranks, in their order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children if "train" in Path(f"/proc/{child}/cmdline").read_text().split("\0")]

    def wait_until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Until the condition holds, while it runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def end(self, seconds: float = 60) -> int:
        """Wait for it to end, for so long; returns the exit code."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """End all of it, if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start():
    """Starts commands, and leaves none behind."""
    runs = []

    def begin(command: list[str], folder: Path) -> Started:
        runs.append(Started(command, folder))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def torchrun_command(processes: int, *arguments: str) -> list[str]:
    """The command line of torchrun, by this interpreter.

    Without heartbeats, which a single node does not need: one that meets the end of a stopped torchrun's interpreter
    aborts it, and its exit code is then -6.
    """
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--rdzv-conf=keep_alive_interval=3600",
            f"--nproc-per-node={processes}", *arguments]


def child_environment() -> dict[str, str]:
    """Lets processes find the package and the tests' models, and what one of them has compiled already.

    One thread each, which torchrun then need not say.
    """
    places = [str(REPOSITORY), str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1",
                         "PYTHONDONTWRITEBYTECODE": ""}


def interrupt_second_save(patch: pytest.MonkeyPatch) -> None:
    """From now on, a run is interrupted where it would save for the second time."""
    save, saved = Saver.save, []

    def once(saver, *given):
        if saved:
            saver.finish()
            raise KeyboardInterrupt
        saved.append(given)
        save(saver, *given)

    patch.setattr(Saver, "save", once)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """What a run's newest checkpoint holds, but for seconds: weights, heads, buffers, optimizers, random streams."""
    return read(newest_intact(run)[0], lambda key: not key.startswith("seconds/"))


def metrics_of(run: Path) -> list[tuple]:
    """What a run measured of its learning, epoch by epoch and stage by stage."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in ("epoch", "stage", "lr", "train_loss", "train_accuracy", "val_loss",
                                       "val_accuracy")) for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Same state and same metrics, bit for bit."""
    left, right = state_of(one), state_of(other)
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different
    assert metrics_of(one) == metrics_of(other)
