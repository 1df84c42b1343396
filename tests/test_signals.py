"""Ctrl-C, wherever it comes."""

import os
import signal
import sys
from contextlib import suppress

import pytest
import yaml
from conftest import small_config
from test_cli import run

from blpipe.checkpoint.saver import Saver
from blpipe.errors import StageError
from blpipe.signals import Signals


class Dropped:
    """Is interrupted as it is deleted, where Python drops what is raised."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_that_python_drops_ends_the_run_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_config("run", train__epochs=2,
                                                                   checkpoint={"every_epochs": 1})))
    save = Saver.save

    def interrupted(saver, steps_done, *given):
        save(saver, steps_done, *given)
        Dropped()  # after the first epoch

    dropped = []
    monkeypatch.setattr(Saver, "save", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", lambda found: dropped.append(found.exc_type))
    assert run("train", "run.yaml") == 130
    assert dropped == [KeyboardInterrupt]
    assert capsys.readouterr().err.startswith("blpipe: interrupted; `train --resume RUN` goes on from the last ")
    assert len((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def fails(interrupted):
    with Signals():
        if interrupted:
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        raise StageError(1, 0, ["one"], "step 3", RuntimeError("a worker exited"))


@pytest.mark.parametrize(("interrupted", "ends"), [(True, KeyboardInterrupt), (False, StageError)])
def test_what_fails_because_it_was_interrupted_too_is_an_interrupt(interrupted, ends):
    with pytest.raises(ends):
        fails(interrupted)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            signals.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
