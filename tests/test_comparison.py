"""`compare`: several runs, side by side."""

import json

import pytest
import yaml
from conftest import small_config
from test_cli import run

from blpipe.comparison import compare
from blpipe.metrics import read_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with two runs in runs/, one of which was stopped after its first epoch."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_config("one", train__epochs=1)))
    for overrides in ((), ("name=two", "train.epochs=2", "method=greedy")):
        assert run("train", "run.yaml", *overrides) == 0
    rows = (tmp_path / "runs/two/metrics.jsonl").read_text().splitlines()
    (tmp_path / "runs/two/metrics.jsonl").write_text("\n".join(rows[:3]) + "\n")
    (tmp_path / "runs/two/result.json").unlink()
    return tmp_path


def test_figures_are_those_of_the_rows_and_what_differs_is_named(folder, capsys):
    capsys.readouterr()
    assert run("compare", "runs/one", "runs/two") == 0
    said = capsys.readouterr().out
    figures, differences = (part.splitlines() for part in said.split("\n\n"))
    assert figures[0].split("  ")[0] == "run"
    assert "1/1" in figures[1]
    assert "1/2" in figures[2]
    assert [line.split() for line in differences] == [
        ["differs", "runs/one", "runs/two"], ["method.name", "backlink", "greedy"], ["train.epochs", "1", "2"]]
    assert run("compare") == 0  # all in runs/
    assert capsys.readouterr().out == said
    assert run("compare", "--json", "runs/one", "runs/two") == 0
    found = json.loads(capsys.readouterr().out)
    last = read_rows(folder / "runs/two")[-1]
    assert found["runs"][1]["val_accuracy"] == last["val_accuracy"]
    assert found["runs"][1]["val_loss"] == last["val_loss"]
    assert found["runs"][1]["samples_per_second"] == pytest.approx(last["samples_per_second"])
    assert found["differences"] == {"method.name": ["backlink", "greedy"], "train.epochs": [1, 2]}


def test_a_run_without_an_epoch_has_no_figures_and_like_runs_no_differences(folder):
    (folder / "runs/two/metrics.jsonl").unlink()
    figures = compare([folder / "runs/two"]).runs[0]
    assert (figures.epochs_done, figures.val_loss, figures.samples_per_second, figures.peak_memory_bytes) == (
        0, None, None, None)
    assert "\n\n" not in compare([folder / "runs/one", folder / "runs/one"]).as_text()


def test_where_there_is_no_run_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("compare") == 2
    assert capsys.readouterr().err == "blpipe: RUN: which runs? there are none in runs/; give their folders\n"
    assert run("compare", "nowhere") == 2
    assert capsys.readouterr().err.startswith("blpipe: nowhere: is no run folder")
