"""blpipe from Python, and runs that end before their last epoch."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import assert_same_run, interrupt_second_save, metrics_of, small_config, train_in_processes
from models_under_test import conv_net
from test_cli import run
from torch import nn

import blpipe
from blpipe.checkpoint.folders import checkpoints, manifest
from blpipe.comparison import compare
from blpipe.device import use_precision
from blpipe.ending import by_patience
from blpipe.metrics import read_rows
from blpipe.plugins import target_text

STANDS_STILL = {"name": "sgd", "lr": 1e-7}  # every accuracy is the first one's


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def still(name, **changes):
    """A run of nine epochs in two stages that learns nothing that evaluation shows."""
    return small_config(name, partition={"stages": 2}, optimizer=STANDS_STILL, train__epochs=9, **changes)


def patient(name, patience=2, **changes):
    return still(name, train__patience=patience, **changes)


def patched(function, module, file, monkeypatch):
    """The function, as if it stood in the script that runs."""
    main = ModuleType("__main__")
    if file:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    function.__module__ = module
    setattr(main, function.__name__, function)
    return function


# From Python.

def test_a_dict_with_functions_trains_as_its_file_does_and_can_be_used_later(folder, capsys):
    tree = small_config("api", model={"target": conv_net, "args": {"dropout": np.float64(0.1)}}, train__epochs=1,
                        data__args={"shape": (2, 8, 8), "classes": np.int64(4), "samples": 88})
    tree["runtime"]["threads"], before = 1, 2
    torch.set_num_threads(before)
    result = blpipe.train(tree, {"runtime.runs": Path("here"), "optimizer.lr": np.float32(0.0625)})
    assert torch.get_num_threads() == before
    assert result == json.loads(Path("here/api/result.json").read_text())
    assert (result["epochs"], result["steps"], result["ended_by"]) == (1, 6, "train.epochs")
    assert tree["model"]["target"] is conv_net
    assert "target: models_under_test:conv_net" in Path("here/api/config.yaml").read_text()

    stages = blpipe.evaluate("here/api")
    assert [stage["accuracy"] for stage in stages] == result["stage_val_accuracy"]
    assert [(stage["blocks"], stage["params"]) for stage in stages] == [
        (stage["blocks"], stage["params"]) for stage in result["stages"]]
    assert blpipe.evaluate("here/api", {"data.test_samples": 5}, best=True)[0]["loss"] != stages[0]["loss"]
    net = conv_net()
    net.load_state_dict(blpipe.state_dict("here/api"))
    with pytest.raises(blpipe.UserError, match="already holds a run"):
        blpipe.train(tree, {"runtime.runs": "here", "optimizer.lr": 0.0625})
    assert blpipe.train(resume="here/api", overrides={"train.epochs": 2})["epochs"] == 2
    assert run("eval", "here/api") == 0


def test_a_second_run_in_a_process_is_as_if_it_were_the_first(folder):
    use_precision("float32")  # whatever another test has left
    tree = small_config("one", partition={"stages": 2}, train__epochs=1)
    blpipe.train(tree)
    blpipe.train(tree, {"name": "other", "runtime.deterministic": True, "train.precision": "tf32", "seed": 1})
    blpipe.train(tree, "name=two")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert_same_run(Path("runs/one"), Path("runs/two"))


def test_what_training_alone_needs_may_be_gone_afterwards(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    Path("gone.py").write_text("def flat(done):\n    return 1.0\n")
    blpipe.train(small_config("run", train__epochs=1, schedule={"target": "gone:flat"}))
    Path("gone.py").unlink()
    monkeypatch.delitem(sys.modules, "gone")
    monkeypatch.setattr(sys, "path_importer_cache", {})
    assert blpipe.evaluate("runs/run")
    assert blpipe.train(resume="runs/run", overrides={"train.epochs": 2, "schedule": "cosine"})["epochs"] == 2


def nested():
    def net():
        return conv_net()
    return net


@pytest.mark.parametrize("target", [lambda: conv_net(), nested(), nn.Linear(2, 2), conv_net().forward])
def test_what_no_other_process_would_find_is_refused_as_a_target(folder, target):
    with pytest.raises(blpipe.UserError, match=r"^model\.target: .* is no function of a module's top level, so that no "
                       "other process finds it; define it there by `def`, and give it values by args$"):
        blpipe.train(small_config("api", model={"target": target}))
    assert not Path("runs").exists()


@pytest.mark.parametrize(("file", "text"), [
    ("my_script.py", "my_script:net"), ("<stdin>", "__main__:net"), (None, "__main__:net")])
def test_a_function_of_a_script_is_found_under_its_name_and_of_a_notebook_where_it_is(folder, monkeypatch, file, text):
    Path("my_script.py").touch()

    def net():
        return conv_net()
    net.__qualname__ = "net"
    assert target_text("model.target", patched(net, "__main__", file, monkeypatch)) == text


def test_a_script_that_trains_as_it_is_imported_is_told_what_it_needs(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    Path("unguarded.py").write_text("import blpipe\nfrom models_under_test import conv_net as net\nblpipe.train({})\n")
    told = ("^unguarded: calls blpipe.train while it is imported, as a script is whose functions a config has; put the "
            "call under `if __name__ == \"__main__\":`$")
    with pytest.raises(blpipe.UserError, match=told):
        importlib.import_module("unguarded")
    with pytest.raises(blpipe.UserError, match=told):
        blpipe.train(small_config("api", model={"target": "unguarded:net"}))


@pytest.mark.parametrize(("given", "told"), [
    ({}, "^CONFIG: which config"), ({"config": {"name": "x"}, "resume": "runs/x"}, "^--resume: goes on with what is"),
    ({"config": "none.yaml"}, "^none.yaml: no such file"), ({"resume": "runs/x"}, "^runs/x: is no run folder"),
    ({"config": {"model": "mlp", "partition": {"stages": 2}}}, "^name: is required, and not given$"),
    ({"config": small_config("x"), "overrides": {"train..epochs": 3}}, "^'train..epochs': a key to set is key.sub, "),
    ({"config": small_config("x", train__patience=1, train__eval_every_epochs=0)}, "^train.patience: 1 counts evaluat"),
    ({"config": {"name": "x", "model": "mlp", "partition": {"stages": 2}, "data": {"args": {"at": object()}}}},
     "^config: holds what a run folder's config.yaml cannot")])
def test_what_is_wrong_is_an_error_of_one_line(folder, given, told):
    with pytest.raises(blpipe.UserError, match=told) as caught:
        blpipe.train(**given)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


# Runs that end early.

def rows_of(*accuracies, key="val_accuracy"):
    """Of two stages, the first of which learns forever."""
    return [{"epoch": epoch, "val_accuracy": None, "val_loss": None, key: value if stage else epoch} for epoch, value in
            enumerate(accuracies, start=1) for stage in (0, 1)]


@pytest.mark.parametrize(("rows", "patience", "ends"), [
    (rows_of(), 1, False), (rows_of(0.5), 1, False), (rows_of(0.5, 0.5), 1, True), (rows_of(0.5, 0.4), 2, False),
    (rows_of(0.5, 0.4, 0.5), 2, True), (rows_of(0.5, 0.4, 0.6), 1, False), (rows_of(0.5, None, 0.4), 2, False),
    (rows_of(0.5, None, 0.4, None), 1, False), (rows_of(0.5, 0.4, 0.3), None, False),
    (rows_of(2.0, 2.5, 2.1, key="val_loss"), 2, True), (rows_of(2.0, 2.5, 1.9, key="val_loss"), 1, False)])
def test_patience_counts_evaluations_in_a_row_that_are_no_better(rows, patience, ends):
    assert (by_patience(rows, patience) is not None) == ends


def test_both_engines_end_early_alike_and_go_on_after_failures(folder):
    tree = still("any") | {"call": "api_under_test:search"}
    train_in_processes([tree], 2, folder)
    for name, changes in (("patient", {"train.patience": 2}), ("after", {"train.epochs": 1})):
        blpipe.train(still(name), changes)
        assert_same_run(Path("pipeline", name), Path("runs", name))
    assert [row["val_accuracy"] is None for row in read_rows(Path("pipeline/cut"))] == [True, True, False, False]
    assert manifest(checkpoints(Path("pipeline/cut"))[-1]).val_accuracy is not None
    assert not Path("pipeline/pruned/result.json").exists()


def test_a_run_that_patience_ends_is_finished_and_says_so(folder, capsys):
    result = blpipe.train(patient("patient", train__eval_every_epochs=2))
    assert (result["epochs"], result["steps"], result["ended_by"]) == (6, 36, "train.patience")
    assert result["val_accuracy"] == read_rows(Path("runs/patient"))[-1]["val_accuracy"]
    assert "ended after epoch 6/9: no better than the accuracy " in capsys.readouterr().out
    assert [manifest(path).steps_done for path in checkpoints(Path("runs/patient"))][-1] == 36
    figures = compare([Path("runs/patient")])
    assert (figures.runs[0].ended_by, figures.runs[0].epochs_done) == ("train.patience", 6)
    assert " 6/9 ended " in figures.as_text()

    again = blpipe.train(patient("patient", train__eval_every_epochs=2), auto_resume=True)
    assert "note: nothing is left to train: the run has ended after epoch 6/9: no better" in capsys.readouterr().out
    assert again == result
    assert run("train", "--resume", "runs/patient", "partition={stages: 3}") == 2
    assert "partition: the run is done, with 2 stages; go on with `train --resume" in capsys.readouterr().err
    assert run("train", "--resume", "runs/patient", "train.patience=3") == 0
    assert json.loads(Path("runs/patient/result.json").read_text())["epochs"] == 8
    assert run("train", "--resume", "runs/patient", "train.patience=null") == 0
    assert json.loads(Path("runs/patient/result.json").read_text())["ended_by"] == "train.epochs"


def test_a_resumed_run_ends_where_the_undisturbed_one_does(folder, monkeypatch):
    blpipe.train(patient("undisturbed"))
    for name, every in (("between", {"every_epochs": 2}), ("within", {"every_epochs": 0, "every_steps": 9})):
        with monkeypatch.context() as patch:
            interrupt_second_save(patch)
            with pytest.raises(KeyboardInterrupt):
                blpipe.train(patient(name) | {"checkpoint": every})
    with monkeypatch.context() as patch:  # between its last checkpoint and its result
        patch.setattr(blpipe.metrics.RunLog, "finish", lambda *_: pytest.fail("reached"))
        with pytest.raises(pytest.fail.Exception):
            blpipe.train(patient("lost"))
    for name in ("between", "within", "lost"):
        assert not Path("runs", name, "result.json").exists()
        assert blpipe.train(resume=f"runs/{name}")["ended_by"] == "train.patience"
        assert_same_run(Path("runs/undisturbed"), Path("runs", name))
        assert metrics_of(Path("runs", name))[-1][0] == 3


def test_on_epoch_sees_the_rows_and_ends_the_run_by_false_alone(folder, capsys):
    seen, answers = [], iter([None, 0, np.bool_(False)])

    def look(rows):
        seen.extend(rows)
        return next(answers)

    result = blpipe.train(still("looked"), on_epoch=look)
    assert seen == read_rows(Path("runs/looked"))
    assert (result["epochs"], result["ended_by"]) == (3, "on_epoch")
    assert "ended after epoch 3/9: on_epoch returned False\n" in capsys.readouterr().out
    assert blpipe.train(still("looked"), auto_resume=True) == result
    assert "the run has ended after epoch 3/9: on_epoch returned False; go on with `train --resume" in (
        capsys.readouterr().out)
    assert blpipe.train(resume="runs/looked", overrides={"train.epochs": 4})["epochs"] == 4


def test_what_on_epoch_raises_ends_the_run_as_it_is(folder):
    with pytest.raises(ZeroDivisionError):
        blpipe.train(still("raised"), on_epoch=lambda rows: 1 / 0)
    assert not Path("runs/raised/result.json").exists()
