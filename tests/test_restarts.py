"""Runs that are killed, stopped and started again end as the undisturbed run does, bit for bit."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import (
    assert_same_run,
    child_environment,
    small_config,
    torchrun,
    torchrun_command,
    train_locally,
)
from test_cli import run as run_here
from test_processes import exit_codes

from blpipe.checkpoint.folders import checkpoints

TRAIN = ["-m", "blpipe", "train", "run.yaml"]


def config_of(**changes):
    """A run in two stages whose links are late, saved now and then."""
    return small_config("run", **{
        "partition__stages": 2, "method__link": {"delay": 2, "length": "all"}, "train__microbatches": 2,
        "checkpoint": {"every_epochs": 0, "every_steps": 4}, "train__eval_every_epochs": 0} | changes)


def restarting(restarts: int) -> list[str]:
    """The command line of a run in two processes that torchrun starts again so many times."""
    command = torchrun_command(2, *TRAIN)
    at = command.index("--standalone")
    return [*command[:at], f"--max-restarts={restarts}", *command[at:]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kills", "epochs"), [(2, 6), pytest.param(20, 30, marks=pytest.mark.slow)])
def test_a_run_whose_stages_are_killed_ends_as_if_they_had_not_been(kills, epochs, folder, start, monkeypatch):
    """At random steps, one stage or the other; torchrun starts them again, and they go on from the last checkpoint."""
    dice = random.Random(0)
    deaths = [[0] * kills, [0] * kills]
    for kill in range(kills):
        deaths[dice.randrange(2)][kill] = dice.randint(3, 30)  # forwards, two a step
    tree = config_of(model={"target": "models_under_test:mortal_net", "args": {"first": deaths[0], "last": deaths[1]}},
                     train__epochs=epochs)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    run = start(restarting(kills), folder)
    assert run.end(560) == 0, run.said
    # torchrun names the one whose end it sees first, and the other has lost its neighbour.
    assert len(re.findall(r"failed \(exitcode: (?:-9|1)\)", run.said)) == kills, run.said
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(kills))  # where none is to die
    assert_same_run(train_locally(tree, folder), folder / "runs/run")


LATE, PIPELINE = {"method__link": {"delay": 2, "length": "all"}}, torchrun_command(2, *TRAIN)
READ_BY_A_WORKER = {"data__workers": 1, "data__augment": {"transforms": ["RandomHorizontalFlip"]}}


def name_in_a_script(run_id: str) -> str:
    """What a process calls the launch that a shell script has begun it in."""
    name = f"{sys.executable} -c 'from blpipe import launch; print(launch.run_name())'; exit 0"
    return subprocess.run(["sh", "-c", name], env=child_environment() | {"TORCHELASTIC_RUN_ID": run_id}, timeout=60,
                          capture_output=True, text=True, check=True).stdout.rstrip("\n")


def test_a_launch_has_one_name_whatever_begins_its_processes():
    process = Path("/proc/self/stat").read_text().split(")")[-1].split()
    assert name_in_a_script("blpipe") == name_in_a_script("blpipe") == f"blpipe {os.getpid()} {process[19]}"
    own = "0b5a0f0e-3c5f-4b0e-9a6e-1d1f5a0c7f11"
    assert name_in_a_script(own) == own


@pytest.mark.parametrize(("command", "changes"), [
    ([sys.executable, *TRAIN], LATE), (PIPELINE, LATE | READ_BY_A_WORKER),
    (PIPELINE, {"partition__stages": 1, "train__replicas": 2})], ids=["local", "late", "replicas"])
def test_sigterm_saves_and_the_next_start_goes_on(command, changes, folder, start):
    """Wherever it is, for no checkpoint is ever due; the next start is one process."""
    tree = config_of(**changes, train__epochs=10_000, checkpoint={"every_epochs": 0})
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    run = start(command, folder)
    run.wait_until(lambda: "epoch 1/" in run.said)
    time.sleep(0.3)
    ranks = run.workers() if command is PIPELINE else [run.process.pid]
    run.process.terminate()
    assert run.end(30) == (1 if command is PIPELINE else 128 + signal.SIGTERM), run.said
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    print(run.said)  # shown where it is not what is looked for
    step, = map(int, re.findall(r"^blpipe: stopped by SIGTERM after step (\d+), and saved; `train --resume runs/run` "
                                r"goes on$", run.said, re.MULTILINE))
    assert [path.name for path in checkpoints(folder / "runs/run")] == [f"step_{step:09d}"]
    epochs = step // 6 + 2
    assert run_here("train", "--resume", "runs/run", f"train.epochs={epochs}") == 0
    undisturbed = {**tree, "train": tree["train"] | {"epochs": epochs}, "data": tree["data"] | {"workers": 0}}
    assert_same_run(train_locally(undisturbed, folder), folder / "runs/run")


def test_sigterm_to_one_stage_stops_all_and_torchrun_starts_them_again(folder, start):
    """With links on time; the others above are late."""
    tree = config_of(model={"target": "models_under_test:mortal_net", "args": {"first": [0], "last": [9],
                                                                               "by": "SIGTERM"}},
                     method__link={"delay": 0}, train__epochs=4, checkpoint={"every_epochs": 0})
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    run = start(restarting(1), folder)
    assert run.end() == 0, run.said
    assert "blpipe: stopped by SIGTERM after step" in run.said
    undying = tree | {"model": {"target": "models_under_test:mortal_net", "args": {"first": [0], "last": [0]}}}
    assert_same_run(train_locally(undying, folder), folder / "runs/run")


def test_where_the_first_process_cannot_go_on_the_others_do_not_wait_for_it(folder):
    """They have connected, and wait for its word on how far to go."""
    tree = config_of(train__epochs=2)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    run = train_locally(tree, folder)
    (run / ".launch").unlink()
    (run / ".launch").mkdir()  # which it cannot write then
    done = torchrun(2, "-m", "blpipe", "train", "--resume", str(run), "train.epochs=4", cwd=folder)
    line, = (line for line in done.stderr.splitlines() if line.startswith("blpipe: "))
    assert re.match(r"blpipe: runtime\.runs: cannot write to \S+/run: ", line)
    assert sorted(exit_codes(done.stderr)) == [1, 2]  # torchrun has killed none, which it does after 30 s


def test_two_runs_in_one_folder_are_one_too_many(folder, start, capsys):
    (folder / "run.yaml").write_text(yaml.safe_dump(config_of(train__epochs=10_000)))
    first = start([sys.executable, *TRAIN], folder)
    first.wait_until(lambda: checkpoints(folder / "runs/run"))
    os.kill(first.process.pid, signal.SIGSTOP)  # it is there all the same
    assert run_here("train", "run.yaml", "--overwrite") == 2
    assert capsys.readouterr().err == ("blpipe: name: another process is training in runs/run; wait for it, or choose "
                                       "another name=…\n")
    first.kill()
    assert run_here("train", "run.yaml", "--overwrite", "train.epochs=1") == 0  # a lock goes with its process
