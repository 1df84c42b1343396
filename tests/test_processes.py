"""Real processes under torchrun: what goes wrong is said once, and nothing is left behind."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import child_environment, small_config, torchrun, torchrun_command


@pytest.fixture
def folder(tmp_path):
    """A folder with a run in three stages that lasts until it is stopped, in long.yaml."""
    tree = small_config("long", train__epochs=10_000, checkpoint={"every_epochs": 0})
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def said_by_blpipe(output: str) -> list[str]:
    """Our own lines, out of all that torchrun prints."""
    return [line for line in output.splitlines() if line.startswith("blpipe: ")]


def exit_codes(output: str) -> list[int]:
    """The workers' exit codes, from torchrun's summary."""
    return [int(code) for code in re.findall(r"exitcode  : (-?\d+)", output)]


def assert_bad_usage(done: subprocess.CompletedProcess) -> None:
    codes = exit_codes(done.stderr)
    assert len(codes) == 2
    assert 2 in codes
    assert set(codes) <= {2, -signal.SIGTERM}  # torchrun ends the others once one has ended


class Started:
    """torchrun in the background, in a process group of its own, up to its first epoch."""

    def __init__(self, folder, *overrides):
        self.process = subprocess.Popen(
            torchrun_command(3, "-m", "blpipe", "train", "long.yaml", *overrides), env=child_environment(),
            text=True, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        self.begun = ""
        for line in self.process.stdout:
            self.begun += line
            if line.startswith("epoch 1/"):
                break

    def workers(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if "train" in Path(f"/proc/{child}/cmdline").read_text().split("\0")]

    def end(self) -> tuple[str, float]:
        """All further output, and how many seconds it took to end."""
        started = time.monotonic()
        output, _ = self.process.communicate(timeout=60)
        return output, time.monotonic() - started


def assert_gone(pids: list[int]) -> None:
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_bad_input_is_said_by_one_rank_before_any_group_exists(folder):
    done = torchrun(2, "-m", "blpipe", "train", "long.yaml", "partition.stages=2", "train.epoch=3", cwd=folder)
    assert said_by_blpipe(done.stderr) == ["blpipe: train.epoch: unknown key; did you mean train.epochs?"]
    assert_bad_usage(done)
    assert "blpipe/cli.py" not in done.stderr  # no traceback through the package
    assert not (folder / "runs").exists()


def test_what_the_first_rank_alone_can_find_ends_all_of_them(folder):
    done = torchrun(2, "-m", "blpipe", "train", "long.yaml", "partition.stages=2", "train.batch_size=1000", cwd=folder)
    line, = said_by_blpipe(done.stderr)
    assert line.startswith("blpipe: train.batch_size: 1000 is more than the 88 training samples")
    assert_bad_usage(done)
    assert not (folder / "runs").exists()


def test_a_failing_stage_is_reported_once_and_ends_the_run(folder):
    started = Started(folder, "model={target: 'models_under_test:failing_net', args: {at: 30}}")
    workers = started.workers()
    output, seconds = started.end()
    assert said_by_blpipe(output) == ["blpipe: stage 2 (rank 1, blocks block2…block3) failed at step 23: "
                                      "RuntimeError: out of luck"]
    assert seconds < 10
    assert started.process.returncode == 1
    assert_gone(workers)


@pytest.mark.parametrize(("method", "killed"), [("backlink", 1), ("greedy", 2), ("bp", 1)])
def test_a_killed_stage_ends_the_run_and_no_other_is_blamed(folder, method, killed):
    started = Started(folder, f"method={method}")
    workers = started.workers()
    assert len(workers) == 3
    os.kill(workers[killed], signal.SIGKILL)
    output, seconds = started.end()
    line, = said_by_blpipe(output)
    assert re.match(r"blpipe: stage \d \(rank \d\) .*: (that|another) process ended, or did not answer within "
                    r"runtime\.timeout_seconds \(at step \d+\)$", line)
    if method != "bp":
        assert f" stage {killed + 1} (rank {killed}): that process" in line
    assert seconds < 10
    assert started.process.returncode == 1
    assert_gone(workers)


def test_an_interrupt_ends_all_processes_at_once(folder):
    started = Started(folder)
    workers = started.workers()
    os.killpg(started.process.pid, signal.SIGINT)
    output, seconds = started.end()
    assert set(said_by_blpipe(output)) <= {"blpipe: interrupted; `train --resume RUN` goes on from the last checkpoint"}
    assert seconds < 10
    assert_gone(workers)
