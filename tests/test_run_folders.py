"""Run folders and files as users move, link and lock them, and readers that go away."""

import os
import shutil
import signal
import stat
import sys
from pathlib import Path

import pytest
import yaml
from conftest import interrupt_second_save, small_config
from test_cli import run

from blpipe import runs
from blpipe.checkpoint.folders import checkpoint_after, checkpoints, manifest
from blpipe.errors import DamagedError, UserError
from blpipe.metrics import read_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a small config in small.yaml, and its run in runs/small."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_config("small", train__epochs=1)))
    assert run("train", "small.yaml") == 0
    return tmp_path


def test_export_takes_the_place_of_no_pipe_and_follows_links(folder, capsys):
    os.mkfifo("pipe")
    assert run("export", "runs/small", "--out", "pipe") == 2
    assert capsys.readouterr().err.startswith("blpipe: --out: cannot write pipe: no place for a file; ")
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    (folder / "linked.pt").symlink_to("here.pt")
    assert run("export", "runs/small", "--out", "linked.pt") == 0
    assert (folder / "linked.pt").is_symlink()
    assert (folder / "here.pt").is_file()


def test_a_reader_that_has_gone_is_no_traceback(folder, capsys, monkeypatch):
    """As in `plan … | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert run("plan", "small.yaml", "partition.costs=analytic") == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_a_log_in_a_file_is_written_line_by_line(folder, monkeypatch):
    said = []

    def look(folder, plan, *_):
        said.append(Path("log").read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "Saver", look)
    with open("log", "w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        assert run("train", "small.yaml", "--overwrite") == 130
    assert said[0].startswith("backlink in 3 stages, ")
    assert said[0].endswith("\n")


@pytest.mark.parametrize(("change", "code"), [("train.epochs=2", 0), ("train.epochs=x", 2)])
def test_a_log_that_has_no_room_ends_no_run(folder, monkeypatch, change, code):
    with open("/dev/full", "w") as output, open("/dev/full", "w") as errors, monkeypatch.context() as full:
        full.setattr(sys, "stdout", output)
        full.setattr(sys, "stderr", errors)
        assert run("train", "small.yaml", "--overwrite", change) == code
    assert len(read_rows(Path("runs/small"))) == (6 if code == 0 else 3)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_none_that_is_missed(folder, monkeypatch, stream):
    with monkeypatch.context() as closed:
        closed.setattr(sys, stream, None)
        assert run("train", "small.yaml", "--overwrite") == 0
        getattr(sys, stream).close()


def test_a_checkpoint_is_found_from_where_it_is_and_by_a_link(folder, monkeypatch):
    last = checkpoints(Path("runs/small"))[-1]
    (folder / "latest").symlink_to(last)
    assert run("export", "latest", "--out", "model.pt") == 0
    monkeypatch.chdir(last.parent)
    assert run("eval", last.name) == 0


def test_a_copy_of_a_checkpoint_is_one_wherever_it_is(folder, capsys):
    last = checkpoints(Path("runs/small"))[-1]
    shutil.copytree(last, "kept/best")
    shutil.copytree(last, f"kept/{last.name}")
    shutil.rmtree("runs")
    capsys.readouterr()
    for copy in ("kept/best", f"kept/{last.name}"):
        assert run("eval", copy) == 0
        assert run("export", copy, "--out", "model.pt", "--overwrite") == 0
        assert capsys.readouterr().err == ""
        assert run("train", "--resume", copy) == 2
        assert capsys.readouterr().err == (f"blpipe: --resume: {copy}: is a checkpoint outside of its run folder, in "
                                           "which it would go on; give that folder, or put it back into checkpoints/ "
                                           "there\n")


def test_a_copy_whose_name_no_run_can_have_is_not_gone_on_in(folder, capsys):
    shutil.copytree("runs/small", "runs/my run")
    capsys.readouterr()
    assert run("train", "--resume", "runs/my run", "train.epochs=3") == 2
    assert capsys.readouterr().err.startswith("blpipe: --resume: runs/my run: its name must be the name of a folder: ")
    assert run("eval", "runs/my run") == 0


def test_what_stands_in_the_way_of_a_new_run_leaves_the_config_of_the_old_one(folder, capsys, monkeypatch):
    def no_room(path):
        raise OSError("cannot be removed")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", no_room)
        assert run("train", "small.yaml", "--overwrite") == 2
    assert capsys.readouterr().err.startswith("blpipe: runtime.runs: cannot write to runs/small: cannot be removed; ")
    assert run("eval", "runs/small") == 0
    Path("runs/small/checkpoints").rename("elsewhere")
    Path("runs/small/checkpoints").symlink_to(folder / "elsewhere")
    assert run("eval", "runs/small") == 0
    assert run("train", "small.yaml", "--overwrite") == 0
    assert checkpoints(folder / "elsewhere/..")  == []
    assert any((folder / "elsewhere").iterdir())


def test_a_result_goes_when_the_run_goes_on(folder, monkeypatch):
    interrupt_second_save(monkeypatch)
    assert run("train", "--resume", "runs/small", "train.epochs=9", "checkpoint.every_epochs=1") == 130
    assert not Path("runs/small/result.json").exists()


def test_a_checkpoint_that_is_no_folder_is_said(folder):
    place = checkpoint_after(Path("runs/small"), 999)
    place.write_text("")
    with pytest.raises(DamagedError, match="is damaged: checkpoint.json \\(NotADirectoryError"):
        manifest(place)
    assert checkpoints(Path("runs/small"))[-1] != place


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(folder, monkeypatch):
    def locked(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "listdir", locked)
    with pytest.raises(UserError, match=r"^runs/small/checkpoints: cannot be read: Permission denied; mend it"):
        checkpoints(Path("runs/small"))
    assert run("train", "small.yaml", "--auto-resume") == 2
    assert Path("runs/small/result.json").exists()


def test_a_path_that_is_too_long_is_no_run(folder, capsys):
    assert run("eval", "a" * 300) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_a_home_directory_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert run("train", "small.yaml", "runtime.runs=~/runs") == 0
    assert (folder / "home/runs/small/result.json").exists()
