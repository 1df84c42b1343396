"""Ctrl-C and SIGTERM while a run trains."""

import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import small_config
from test_cli import run

from blpipe import signals
from blpipe.checkpoint.folders import checkpoints
from blpipe.checkpoint.saver import Saver
from blpipe.config import DataConfig
from blpipe.data import open_data
from blpipe.errors import PeerLostError, StageError
from blpipe.signals import Signals


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def interrupted_run(tmp_path, monkeypatch):
    """Trains two epochs, interrupted so often as the first one is saved; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_config("run", train__epochs=2,
                                                                   checkpoint={"every_epochs": 1})))
    save = Saver.save

    def train(times: int) -> int:
        def interrupted(saver, *given):
            monkeypatch.setattr(Saver, "save", save)
            save(saver, *given)
            for _ in range(times):
                interrupt()

        monkeypatch.setattr(Saver, "save", interrupted)
        return run("train", "run.yaml")
    return train


def test_an_interrupted_run_is_saved_and_says_how_it_goes_on(interrupted_run, capfd):
    assert interrupted_run(1) == 130
    step, = checkpoints(Path("runs/run"))
    assert capfd.readouterr().err.splitlines() == [
        "", "blpipe: stopping, to save the run; Ctrl-C again ends it at once",
        f"blpipe: interrupted after step {int(step.name[5:])}, and saved; `train --resume runs/run` goes on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("seconds", "last"), [
    (-1.0, "blpipe: interrupted; `train --resume RUN` goes on from the last checkpoint, if there is one"),
    (60.0, "blpipe: interrupted after step 6, and saved; `train --resume runs/run` goes on")])
def test_a_second_interrupt_ends_a_run_at_once_unless_it_is_the_first_one_passed_on(seconds, last, interrupted_run,
                                                                                   monkeypatch, capfd):
    monkeypatch.setattr(signals, "_AGAIN_SECONDS", seconds)
    assert interrupted_run(2) == 130
    assert capfd.readouterr().err.splitlines()[-1] == last


def fails(error, interrupted):
    with Signals():
        if interrupted:
            interrupt()
        raise error


@pytest.mark.parametrize("error", [StageError(1, 0, ["one"], "step 3", RuntimeError("a worker exited")),
                                   PeerLostError("rank 1 waiting for rank 0")])
@pytest.mark.parametrize("interrupted", [True, False])
def test_what_fails_because_another_process_was_interrupted_is_an_interrupt(error, interrupted):
    with pytest.raises(KeyboardInterrupt if interrupted else type(error)):
        fails(error, interrupted)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_has_just_been_forked_does_not_speak(capfd):
    with Signals():
        if not (child := os.fork()):
            interrupt()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert not capfd.readouterr().err


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as found:
            interrupt()
            assert not found.stop_asked()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_a_signal_reaches_as_it_begins_reads_all_batches(monkeypatch, number):
    """Before it can say what such a signal is to do."""
    def begin():
        begun()
        signal.raise_signal(number)

    begun = torch.utils.data._utils.signal_handling._set_worker_signal_handlers
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._set_worker_signal_handlers", begin)
    data = open_data(DataConfig(name="digits", workers=1, augment={"transforms": ["RandomHorizontalFlip"]}), 0)
    batches = list(data.train_batches(0, 0, 500, drop_last=False))
    assert sum(len(x) for x, _ in batches) == data.spec.train_samples
