"""Real processes under torchrun: what goes wrong is said once, and nothing is left behind."""

import os
import re
import signal
import subprocess
import time

import pytest
import yaml
from conftest import Started, small_config, torchrun, torchrun_command

from blpipe.checkpoint.folders import checkpoints


@pytest.fixture
def folder(tmp_path):
    """A folder with a run that lasts until it is stopped, in long.yaml; it mostly trains."""
    tree = small_config("long", train__epochs=10_000, checkpoint={"every_epochs": 0},
                        data__args={"shape": [2, 8, 8], "classes": 4, "samples": 1000})
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
    assert set(codes) <= {2, -signal.SIGTERM, -signal.SIGALRM}  # torchrun ends the others, or their grace is over


@pytest.fixture
def train(folder, start):
    """Starts so many ranks under torchrun, up to their first epoch."""
    def begin(stages: int, *overrides: str) -> Started:
        run = start(torchrun_command(stages, "-m", "blpipe", "train", "long.yaml", f"partition.stages={stages}",
                                     *overrides), folder)
        run.wait_until(lambda: "epoch 1/" in run.said)
        return run
    return begin


def assert_gone(pids: list[int]) -> None:
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_bad_input_is_said_by_one_rank_before_any_group_exists(folder):
    done = torchrun(2, "-m", "blpipe", "train", "long.yaml", "partition.stages=2", "train.epoch=3", cwd=folder)
    assert said_by_blpipe(done.stderr) == ["blpipe: train.epoch: unknown key; did you mean train.epochs?"]
    assert_bad_usage(done)
    assert "blpipe/cli.py" not in done.stderr  # no traceback through the package
    assert not (folder / "runs").exists()


def test_what_the_first_rank_alone_can_find_ends_all_of_them(folder):
    done = torchrun(2, "-m", "blpipe", "train", "long.yaml", "partition.stages=2", "train.batch_size=1200", cwd=folder)
    line, = said_by_blpipe(done.stderr)
    assert line.startswith("blpipe: train.batch_size: 1200 is more than the 1000 training samples")
    assert_bad_usage(done)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(("method", "stages", "killed"), [("backlink", 3, 1), ("bp", 2, 1)])
def test_a_killed_stage_ends_the_run_and_no_other_is_blamed(train, method, stages, killed):
    run = train(stages, f"method={method}")
    workers = run.workers()
    assert len(workers) == stages
    os.kill(workers[killed], signal.SIGKILL)
    run.end(10)
    line, = said_by_blpipe(run.said)
    assert re.match(r"blpipe: stage \d \(rank \d\) .*: (that|another) process ended, or did not answer within "
                    r"runtime\.timeout_seconds \(at step \d+\)$", line)
    if method != "bp":
        assert f" stage {killed + 1} (rank {killed}): that process" in line
    assert run.process.returncode == 1
    assert_gone(workers)


STOPPING = "blpipe: stopping, to save the run; Ctrl-C again ends it at once"


def test_an_interrupt_saves_and_ends_all_processes(train, folder):
    """Though one stage's data are read by a process that the terminal interrupts too."""
    run = train(2, "data.workers=1", "data.augment.transforms=[{name: RandomHorizontalFlip}]")
    workers = run.workers()
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end(10) == 1  # torchrun's own
    first, last = said_by_blpipe(run.said)
    step, = re.findall(r"^blpipe: interrupted after step (\d+), and saved; `train --resume runs/long` goes on$", last)
    assert first == STOPPING
    assert [path.name for path in checkpoints(folder / "runs/long")] == [f"step_{int(step):09d}"]
    assert_gone(workers)


def test_a_second_interrupt_ends_all_processes_at_once(folder, start):
    """For the first stage hangs, and the other waits for it."""
    run = start(torchrun_command(2, "-m", "blpipe", "train", "long.yaml", "partition.stages=2",
                                 "model={target: 'models_under_test:stalling_net'}"), folder)
    run.wait_until(lambda: "stalled" in run.said)
    workers = run.workers()
    os.killpg(run.process.pid, signal.SIGINT)
    run.wait_until(lambda: STOPPING in run.said, 5)
    time.sleep(1)
    assert run.process.poll() is None
    os.killpg(run.process.pid, signal.SIGINT)
    run.end(10)
    assert said_by_blpipe(run.said) == [
        STOPPING, "blpipe: interrupted; `train --resume RUN` goes on from the last checkpoint, if there is one"]
    assert_gone(workers)
