"""Checkpoints: none leaves a trace in a run, any can be gone on from, and what is damaged is found."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
import torch
import yaml
from conftest import (
    assert_same_run,
    interrupt_second_save,
    small_config,
    state_of,
    torchrun,
    train_in_processes,
    train_locally,
)
from test_cli import run
from torch import nn

from blpipe import cli, metrics, runs
from blpipe.checkpoint.folders import checkpoints, manifest, seals, write_manifest
from blpipe.checkpoint.state import _IndexUnpickler, load, read
from blpipe.checkpoint.state import state_of as state_of_engine
from blpipe.config_file import load_config, parse_config, set_key
from blpipe.data import open_data
from blpipe.engines.local import LocalEngine
from blpipe.errors import UserError
from blpipe.files import write_text
from blpipe.metrics import read_rows
from blpipe.plan import make_plan
from blpipe.resume import StartPoint, _but, _Change, find, notes_on_schedule, resumed_config
from blpipe.runs import train_run
from blpipe.trainer import open_local
from blpipe.transport.horizon import Horizon

DEEP = {"length": "all", "reach": "all"}
METHODS = {
    "greedy": {"method": "greedy"},
    "bp": {"method": "bp", "train__microbatches": 4, "train__ema": 0.9, "data__augment": {"cutmix": 1.0}},
    "in_time": {"method__link": {"delay": 0}, "train__microbatches": 4, "data__augment": {"mixup": 0.4, "cutmix": 1.0}},
    "late": {"method__link": {"delay": 1}, "train__ema": 0.99, "data__augment": {"flip": True, "transforms": [
        {"name": "RandomResizedCrop", "args": {"size": 8}}]}},
    "three_late": {"method__link": {"delay": 3, "length": "all"}, "train__microbatches": 2, "train__ema": 0.5,
                   "optimizer": {"target": "optimizers_under_test:Counting", "lr": 0.05},
                   "schedule": {"target": "optimizers_under_test:stays_then_falls", "args": {"at": 0.2}}},
    "a_microbatch_late": {"method__link": {"delay": 3, "delay_unit": "microbatch", "keep": "recompute"},
                          "train__microbatches": 4, "train__ema": 0.999},
    "joint": {"method__link": {"delay": 1, "length": "all", "joint": True}, "train__microbatches": 2,
              "optimizer": {"name": "sgd", "lr": 0.05, "decay": "matrices",
                            "args": {"momentum": 0.9, "weight_decay": 0.1, "fused": True}}},
    "joint_tail": {"method__link": {"delay": 1, "length": 1, "joint": True}, "train__microbatches": 2},
    "far": {"method": {"local_weight": 0.5, "link": {**DEEP, "delay": 1, "normalize": True, "weight": 0.7}},
            "train__microbatches": 2,
            "optimizer": {"name": "adamw", "lr": 0.01, "clip_norm": 0.5, "args": {"fused": True}}},
    "farthest": {"method": {"local_weight": 0.0, "head": "none",
                            "link": {**DEEP, "delay": 1, "take": "farthest", "wire": "bf16"}},
                 "train__microbatches": 2},
}


def saved_config(name, every=5, **changes):
    """A run of twelve steps whose every checkpoint is kept."""
    return small_config(name, checkpoint={"every_epochs": 0, "every_steps": every, "keep": 100}, **changes)


def rewound(run: Path, step: int, folder: Path) -> Path:
    """A copy of a run folder, as it was when the process died after the checkpoint of this step; returns that."""
    copy = folder / run.name
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("result.json"))
    for later in checkpoints(copy):
        if manifest(later).steps_done > step:
            shutil.rmtree(later)
    return checkpoints(copy)[-1]


def go_on(checkpoint: Path, *overrides: str) -> Path:
    """Resume in this process; returns the run folder."""
    run = checkpoint.parent.parent
    train_run(resumed_config(run, list(overrides)), resume_from=run)
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By method, a run without any checkpoint but the last."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    return {name: train_locally(saved_config(name, 0, **changes), folder) for name, changes in METHODS.items()}


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory):
    """The same in three processes, saving after every fifth step."""
    runs = train_in_processes([saved_config(name, **changes) for name, changes in METHODS.items()], 3,
                              tmp_path_factory.mktemp("processes"))
    return dict(zip(METHODS, runs, strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By method, a run in this process that saves after every fifth step."""
    folder = tmp_path_factory.mktemp("saved")
    torch.set_num_threads(1)
    return {name: train_locally(saved_config(name, **changes), folder) for name, changes in METHODS.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a finished run of two checkpoints in runs/small."""
    folder = tmp_path_factory.mktemp("small")
    torch.set_num_threads(1)
    (folder / "small.yaml").write_text(yaml.safe_dump(saved_config("small", 3, train__epochs=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "small.yaml"]) == 0
    return folder


@pytest.fixture
def folder(small, tmp_path, monkeypatch):
    """A working directory with a copy of it."""
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# A run that goes on is the run that was not interrupted.

def test_late_gradients_of_a_layer_in_two_blocks_are_gone_on_with(tmp_path):
    saved = train_locally(saved_config("run", model={"target": "models_under_test:TwiceTheSame"},
                                       partition={"cuts": ["last"]}, method__link={"delay": 1, "length": "all"}),
                          tmp_path)
    first = checkpoints(saved)[0]
    assert {key.rpartition("/")[2] for key in read(first, lambda key: key.startswith("held/"))} == {
        f"{layer}.{name}" for layer in ("first", "again") for name in ("weight", "bias")}
    assert_same_run(saved, go_on(rewound(saved, 5, tmp_path / "from5")))


class Doubled(nn.Linear):
    """In float64."""

    def forward(self, x):
        return super().forward(x.flatten(1).double())


def double_net():
    return [Doubled(128, 6, dtype=torch.float64), nn.Linear(6, 4, dtype=torch.float64)]


def test_state_of_another_type_than_the_weights_is_gone_on_with(tmp_path):
    """nadam's product of momenta is float32."""
    saved = train_locally(saved_config("run", model={"target": "test_checkpoints:double_net"}, partition={"stages": 1},
                                       optimizer={"name": "nadam", "lr": 0.01}), tmp_path)
    products = read(checkpoints(saved)[0], lambda key: key.endswith("mu_product"))
    assert {product.dtype for product in products.values()} == {torch.float32}
    assert_same_run(saved, go_on(rewound(saved, 5, tmp_path / "from5")))


def test_parameters_of_other_learning_rates_are_gone_on_with(tmp_path):
    saved = train_locally(saved_config("run", partition={"stages": 2}, optimizer__decay="matrices",
                                       optimizer__args={"momentum": 0.9, "weight_decay": 0.1},
                                       optimizer__lr_factors={"head/*": 3.0, "*.bias": 0.5}), tmp_path)
    assert_same_run(saved, go_on(rewound(saved, 5, tmp_path / "from5")))


@pytest.mark.parametrize("name", METHODS)
def test_checkpoints_change_nothing_and_a_run_goes_on_from_each_bit_for_bit(name, undisturbed, saved, tmp_path):
    steps = [manifest(path).steps_done for path in checkpoints(saved[name])]
    assert steps == [5, 10, 12]
    if name != "bp":
        assert_same_run(undisturbed[name], saved[name])
    for step in steps[:-1]:
        assert_same_run(saved[name], go_on(rewound(saved[name], step, tmp_path / f"from{step}")))


@pytest.mark.parametrize("name", METHODS)
def test_what_the_pipeline_saves_goes_on_in_one_process(name, undisturbed, in_processes, tmp_path):
    resumed = go_on(rewound(in_processes[name], 5, tmp_path))
    if name == "bp":  # another engine's arithmetic
        torch.testing.assert_close(state_of(resumed), state_of(undisturbed[name]), rtol=1e-3, atol=1e-3)
    else:
        assert_same_run(undisturbed[name], resumed)
        assert_same_run(undisturbed[name], in_processes[name])


def test_what_one_process_saves_goes_on_in_the_pipeline(undisturbed, saved, in_processes, tmp_path):
    trees = []
    for name, changes in METHODS.items():
        if name == "bp":  # saved by the pipeline too, since its arithmetic is another one
            checkpoint = rewound(in_processes[name], 5, tmp_path / "pipeline")
        else:
            checkpoint = rewound(saved[name], 10, tmp_path / "pipeline")
        trees.append(saved_config(name, **changes) | {"resume_from": str(checkpoint)})
    for name, resumed in zip(METHODS, train_in_processes(trees, 3, tmp_path), strict=True):
        assert_same_run(in_processes["bp"] if name == "bp" else undisturbed[name], resumed)


def test_other_stages_count_each_for_itself_from_the_middle_of_an_epoch(tmp_path):
    saved = train_locally(saved_config("run", **METHODS["greedy"]), tmp_path)
    run = go_on(rewound(saved, 5, tmp_path / "from5"), "partition={stages: 2}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, second = (row["train_loss"] for row in rows if row["epoch"] == 1)
    assert first != second


@pytest.mark.parametrize(("cuts", "kept", "new"), [
    (["2"], "1", None), (["1", "2", "5"], "1", "0, 4"), ([], None, None)])
def test_other_stages_take_what_follows_the_blocks(cuts, kept, new, undisturbed):
    found = checkpoints(undisturbed["three_late"])[-1]
    before = read(found, lambda key: True)
    config = parse_config(saved_config("other", **METHODS["three_late"]) | {"partition": {"cuts": cuts}})
    data = open_data(config.data, config.seed)
    plan = make_plan(config, data.spec)
    engine, untouched = (open_local(plan, data) for _ in range(2))
    notes = load(found, plan, engine)
    after, fresh = state_of_engine(engine), state_of_engine(untouched)
    for key in after:
        name = key.removeprefix("optimizer/").removeprefix("ema/").removeprefix("ema_steps/")
        if f"{name}/".startswith((f"head/{kept}/", f"loss/{kept}/", "head/5/", "loss/5/", "model/", "conv", *"012345")):
            assert torch.equal(after[key], before[key]), key
        elif name.startswith(("head/", "loss/")) and "/group/" not in name:  # a group's are those of all in it
            assert torch.equal(after[key], fresh[key]), key
    assert {key for key in before if key.startswith("model/")} <= after.keys()
    taken = max(float(seconds[-1]) for key, seconds in before.items() if key.startswith("seconds/"))
    assert {sums.train_seconds for sums in engine.epoch_sums().values()} == {taken}  # for the samples/s of the epoch
    heads = [f"those after {names} are {how}" for names, how in ((kept, "kept"), (new, "new")) if names]
    assert notes[0] == (f"the checkpoint is of 3 stages, and this run has {len(cuts) + 1}; "
                        f"heads: {'; '.join(heads) or 'none'}")


@pytest.mark.parametrize(("schedule", "note"), [
    # Of 6 steps: the last one's factor is (1 + cos 5π/6) / 2, and of 12 the next one's a half.
    ("cosine", ["schedule: cosine is stretched over 2 epochs, instead of 1; the learning rate goes on at 0.025, and "
                "was 0.00335 before"]),
    ({"name": "cosine", "warmup_epochs": 1}, []), ({"name": "multistep", "milestones": [1]}, [])])
def test_more_epochs_for_a_schedule_that_depends_on_them_are_noted(tmp_path, schedule, note, capsys):
    tree = small_config("scheduled", train__epochs=1, schedule=schedule, partition={"stages": 1}, method="bp")
    run = train_locally(tree, tmp_path)
    config = resumed_config(run, ["train.epochs=2"])
    plan = make_plan(config, open_data(config.data, config.seed).spec)
    assert notes_on_schedule(find(run), plan) == note
    assert notes_on_schedule(StartPoint(), plan) == []
    if note:
        go_on(find(run).checkpoint, "train.epochs=2")
        assert f"note: {note[0]}" in capsys.readouterr().out


def test_a_run_goes_on_with_other_stages_and_more_epochs(folder, capsys):
    shutil.rmtree(checkpoints(folder / "runs/small")[-1])
    assert run("train", "--resume", "runs/small", "partition={cuts: ['2']}", "train.epochs=3") == 0
    said = capsys.readouterr().out
    assert "note: the checkpoint is of 3 stages, and this run has 2; heads: those after 1 are kept" in said
    assert "note: train.epochs: 3, was 1 before" in said
    assert load_config("runs/small/config.yaml").partition.cuts == ("2",)
    assert len(json.loads((folder / "runs/small/result.json").read_text())["stages"]) == 2
    for path in ("runs/small", *checkpoints(Path("runs/small"))):
        assert run("eval", str(path)) == 0
        assert run("export", str(path), "--out", "model.pt", "--overwrite") == 0


def test_a_checkpoint_that_is_removed_meanwhile_is_not_called_damaged(folder, capsys):
    gone = checkpoints(Path("runs/small"))[-1]
    shutil.rmtree(gone)
    assert run("eval", str(gone)) == 2
    said = f"blpipe: {gone}: is not there; if a run trains in that folder, it has removed it: try again\n"
    assert capsys.readouterr().err == said


def test_a_result_adds_up_the_seconds_of_its_own_stages(folder):
    assert run("train", "--resume", "runs/small", "partition={cuts: ['3']}", "train.epochs=3") == 0
    rows = [json.loads(line) for line in (folder / "runs/small/metrics.jsonl").read_text().splitlines()]
    stages = json.loads((folder / "runs/small/result.json").read_text())["stages"]
    for number, stage in enumerate(stages, start=1):
        before, *own = [row for row in rows if row["stage"] == number]
        assert len(own) == 2
        assert before["blocks"] != own[0]["blocks"]
        for key in ("busy_seconds", "wait_seconds"):
            assert stage[key] == sum(row[key] for row in own)
        assert stage["peak_memory_bytes"] == max(row["peak_memory_bytes"] for row in own)


def test_rows_of_versions_that_did_not_name_blocks_count(folder):
    path = folder / "runs/small/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["blocks"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("train", "--resume", "runs/small", "train.epochs=2") == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    stages = json.loads((folder / "runs/small/result.json").read_text())["stages"]
    assert [stage["busy_seconds"] for stage in stages] == [
        sum(row["busy_seconds"] for row in rows if row["stage"] == number) for number in range(1, len(stages) + 1)]


def test_eval_and_export_take_any_checkpoint(folder, capsys):
    first, last = checkpoints(Path("runs/small"))
    weights = []
    for path in (first, last, Path("runs/small")):
        assert run("export", str(path), "--out", "model.pt", "--overwrite") == 0
        weights.append(torch.load("model.pt", weights_only=True)["0.0.weight"])
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert run("eval", str(first)) == 0


def test_a_run_goes_on_from_one_of_its_checkpoints_and_forgets_those_after_it(folder):
    whole = folder / "whole"
    shutil.copytree(folder / "runs/small", whole)
    first, last = checkpoints(Path("runs/small"))
    (last / "mark").touch()
    assert run("train", "--resume", str(first)) == 0
    assert_same_run(whole, folder / "runs/small")
    assert not (last / "mark").exists()


def test_the_last_ones_and_the_best_are_kept(folder):
    (folder / "long.yaml").write_text(yaml.safe_dump(small_config(
        "long", train__epochs=8, checkpoint={"every_steps": 4, "keep": 2})))
    assert run("train", "long.yaml") == 0
    rows = [row for row in read_rows(folder / "runs/long") if row["stage"] == 3]
    best = max(row["val_accuracy"] for row in rows)
    expected = {44, 48} | {6 * row["epoch"] for row in rows if row["val_accuracy"] == best}
    kept = {manifest(path).steps_done for path in checkpoints(folder / "runs/long")}
    assert {44, 48} <= kept <= expected
    assert len(kept - {44, 48}) <= 1
    assert any(manifest(path).val_accuracy == best for path in checkpoints(folder / "runs/long"))


# A config that is no longer the checkpoint's.

@pytest.mark.parametrize(("key", "value", "message"), [
    ("optimizer.args", "{momentum: 0.5}", r"blpipe: optimizer\.args\.momentum: 0\.5, but 0\.9 in runs/small/checkpoin"),
    ("seed", "3", r"blpipe: seed: 3, but 0 in runs/small/"),
    ("train.batch_size", "8", r"blpipe: train\.batch_size: 8, but 16 in runs/small/"),
    ("data.validation_samples", "8", r"blpipe: data\.validation_samples: 8, but none in runs/small/"),
])
def test_what_differs_from_the_checkpoint_is_named_and_refused(folder, capsys, key, value, message):
    before = (folder / "runs/small/config.yaml").read_text()
    assert run("train", "--resume", "runs/small", f"{key}={value}") == 2
    line, = capsys.readouterr().err.splitlines()
    assert re.match(message, line), line
    assert (folder / "runs/small/config.yaml").read_text() == before
    tree = yaml.safe_load(before)
    set_key(tree, key, yaml.safe_load(value))
    (folder / "runs/small/config.yaml").write_text(yaml.safe_dump(tree))
    assert run("train", "--resume", "runs/small") == 2
    assert re.match(message, capsys.readouterr().err)


def test_auto_resume_begins_goes_on_and_keeps_what_is_not_its_own(folder, capsys):
    def train(*more):
        return run("train", "other.yaml", "--auto-resume", *more)

    (folder / "other.yaml").write_text((folder / "small.yaml").read_text().replace("name: small", "name: other"))
    assert train() == 0
    before = state_of(folder / "runs/other")
    shutil.rmtree(checkpoints(folder / "runs/other")[-1])
    assert train() == 0
    again = state_of(folder / "runs/other")
    assert all(torch.equal(again[key], tensor) for key, tensor in before.items())
    assert train("seed=1") == 2
    assert "blpipe: seed: 1, but 0 in " in capsys.readouterr().err
    shutil.rmtree(folder / "runs/other/checkpoints")
    assert train("seed=1") == 2
    assert "blpipe: name: runs/other already holds a run" in capsys.readouterr().err
    assert train() == 0  # what is left of the same run
    assert checkpoints(folder / "runs/other")


def test_cuts_that_were_found_are_kept(folder):
    (folder / "cut.yaml").write_text(yaml.safe_dump(saved_config("cut", 3, train__epochs=1, partition={
        "stages": 2, "strategy": "balanced"})))
    assert run("train", "cut.yaml") == 0
    cuts = load_config("runs/cut/config.yaml").partition.cuts
    shutil.rmtree(checkpoints(folder / "runs/cut")[-1])
    assert run("train", "cut.yaml", "--auto-resume") == 0
    assert load_config("runs/cut/config.yaml").partition.cuts == cuts is not None


def test_what_may_change_is_said(folder, capsys):
    shutil.rmtree(checkpoints(Path("runs/small"))[-1])
    assert run("train", "--resume", "runs/small", "optimizer.lr=0.01", "train.on_nonfinite=skip") == 0
    said = capsys.readouterr().out
    assert "note: optimizer.lr: 0.01, was 0.05 before" in said
    assert "note: train.on_nonfinite: 'skip', was 'stop' before" in said


def test_a_key_that_begins_like_one_that_may_change_is_another_key():
    changes = [_Change(key, 0, 1) for key in ("data.root", "data.root.of_mine", "data.root_x", "data.roots.x", "data")]
    assert [change.key for change in _but(("seed", "data.root"), changes)] == ["data.root_x", "data.roots.x", "data"]


def test_a_done_run_in_other_stages_is_no_run(folder, capsys):
    before = {path: path.read_bytes() for path in (folder / "runs/small").rglob("*") if path.is_file()}
    assert run("train", "--resume", "runs/small", "partition={stages: 2}") == 2
    assert "blpipe: partition: the run is done, with 3 stages; give it more epochs" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (folder / "runs/small").rglob("*") if path.is_file()} == before


def test_other_lengths_than_the_checkpoints_are_refused(folder, capsys):
    assert run("train", "--resume", "runs/small", "train.epochs=2") == 0
    assert run("train", "--resume", "runs/small", "train.epochs=1") == 2
    assert "blpipe: train.epochs: 1 are 6 steps, but 12 are done in runs/small/checkpoints/step_000000012; give more" \
        in capsys.readouterr().err
    newest = checkpoints(Path("runs/small"))[-1]
    write_manifest(newest, replace(manifest(newest), steps_per_epoch=7))  # as with more data
    assert run("train", "--resume", "runs/small", "train.epochs=3") == 2
    assert "blpipe: data: an epoch has 6 steps, but 7 in " in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff}\n", b'{"stage": 1}\n'])
def test_a_resume_whose_rows_cannot_be_read_deletes_nothing(folder, content, capsys):
    assert run("train", "--resume", "runs/small", "train.epochs=2") == 0
    rows, (_, second, *_) = Path("runs/small/metrics.jsonl"), checkpoints(Path("runs/small"))
    rows.write_bytes(content)
    before = {path: path.read_bytes() for path in Path("runs/small").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run("train", "--resume", str(second)) == 2
    line, = capsys.readouterr().err.splitlines()
    assert re.match("blpipe: runs/small/metrics.jsonl: is damaged: .*; restore it", line)
    assert {path: path.read_bytes() for path in Path("runs/small").rglob("*") if path.is_file()} == before


def test_a_run_goes_on_without_rows_that_were_lost(folder, capsys):
    Path("runs/small/metrics.jsonl").unlink()
    for epochs in (1, 3):  # that it has done, and some more
        assert run("train", "--resume", "runs/small", f"train.epochs={epochs}") == 0
        assert ("note: runs/small/metrics.jsonl: holds no rows of epoch 1, which the checkpoint has behind it; the run "
                "goes on without them\n") in capsys.readouterr().out
        rows, result = read_rows(Path("runs/small")), json.loads(Path("runs/small/result.json").read_text())
        later = [] if epochs == 1 else [2, 3]
        assert [(row["epoch"], row["stage"]) for row in rows] == [(e, s) for e in later for s in (1, 2, 3)]
        assert result["stage_val_accuracy"] == ([row["val_accuracy"] for row in rows[-3:]] or [None] * 3)
        assert (result["samples_per_second"] is None) == (epochs == 1)
        assert result["train_seconds"] is None


def test_no_checkpoint_is_ahead_of_rows_that_found_no_room(folder, monkeypatch, capsys):
    def full(file):
        file.flush()
        os.truncate(file.name, 0)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics, "sync", full)
    interrupt_second_save(monkeypatch)
    assert run("train", "small.yaml", "name=full", "train.epochs=2") == 130
    assert "note: cannot write runs/full/metrics.jsonl: No space left on device; training" in capsys.readouterr().out
    assert [(row["epoch"], row["stage"]) for row in read_rows(Path("runs/full"))] == [(1, 1), (1, 2), (1, 3)]


HOLD = """
import sys
from blpipe.config_file import load_config
from blpipe.resume import StartPoint
from blpipe.run_folder import StartOptions, claimed

with claimed(load_config(sys.argv[1]), StartOptions(), StartPoint()):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_process_has_just_claimed_is_left_to_it(folder, capsys):
    (folder / "new.yaml").write_text(yaml.safe_dump(saved_config("new")))
    with subprocess.Popen([sys.executable, "-c", HOLD, "new.yaml"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as first:
        assert first.stdout.readline() == "held\n"
        assert run("train", "new.yaml") == 2
        assert "blpipe: name: another process is training in runs/new; wait for it" in capsys.readouterr().err
        assert (folder / "runs/new").is_dir()
        first.communicate("")
    assert first.returncode == 0
    assert not (folder / "runs/new").exists()  # nothing came of it


def test_a_checkpoint_that_another_process_wrote_meanwhile_is_not_deleted(folder, monkeypatch, capsys):
    """Between the choice of the last one and the lock."""
    last, prepare = checkpoints(Path("runs/small"))[-1], runs._prepare
    later = last.with_name("step_000000012")

    def prepare_slowly(*arguments):
        prepared = prepare(*arguments)
        shutil.copytree(last, later)
        return prepared

    monkeypatch.setattr(runs, "_prepare", prepare_slowly)
    assert run("train", "--resume", "runs/small", "train.epochs=3") == 2
    assert "blpipe: name: another process has trained in runs/small meanwhile; start again" in capsys.readouterr().err
    assert later.exists()


def test_a_run_that_goes_on_keeps_its_trace(folder, monkeypatch):
    monkeypatch.setattr("blpipe.engines.local.TRACED_STEPS", 4)
    assert run("train", "small.yaml", "runtime.trace=true", "name=traced") == 0
    before = (folder / "runs/traced/trace.json").read_text()
    assert run("train", "--resume", "runs/traced", "train.epochs=2") == 0
    assert (folder / "runs/traced/trace.json").read_text() == before


@pytest.mark.parametrize("runs_in", ["checkpoints", "."])
def test_a_run_folder_may_be_named_in_any_way(folder, monkeypatch, runs_in):
    assert run("train", "small.yaml", f"runtime.runs={runs_in}", "name=other") == 0
    assert run("train", "--resume", f"{runs_in}/other", "train.epochs=2") == 0
    monkeypatch.chdir(folder / runs_in / "other")
    assert run("train", "--resume", ".", "train.epochs=3") == 0
    assert load_config("config.yaml").name == "other"


def test_a_stop_right_after_a_resume_leaves_the_checkpoint_as_it_was(folder, monkeypatch):
    newest = checkpoints(Path("runs/small"))[-1]
    before = manifest(newest)
    assert before.val_accuracy is not None
    monkeypatch.setattr(runs, "_horizon", lambda run, start, stop: Horizon(start, lambda: True))
    assert run("train", "--resume", "runs/small", "train.epochs=2") == 143
    assert manifest(newest) == before


def test_a_stop_during_an_evaluation_leaves_a_checkpoint_with_what_it_found(folder, monkeypatch):
    evaluate = LocalEngine.evaluate

    def stopped(engine):
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate(engine)

    monkeypatch.setattr(LocalEngine, "evaluate", stopped)
    assert run("train", "small.yaml", "name=stopped", "train.epochs=2", "checkpoint.every_steps=0") == 143
    found, last = manifest(checkpoints(Path("runs/stopped"))[-1]), read_rows(Path("runs/stopped"))[-1]
    assert (found.steps_done, found.val_accuracy, found.val_loss) == (6, last["val_accuracy"], last["val_loss"])


# torchrun starts the processes again, under the name that it gave them.

@pytest.fixture
def launched(monkeypatch):
    """As by torchrun: the how-manieth time, and under which name."""
    def launch(restarts, name="this"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    return launch


def test_a_restart_goes_on_with_its_own_run_alone(folder, launched, monkeypatch, capsys):
    launched(1)
    assert run("train", "small.yaml") == 2
    assert "blpipe: name: runs/small already holds a run" in capsys.readouterr().err
    launched(0)
    assert run("train", "small.yaml", "--overwrite") == 0
    shutil.rmtree(checkpoints(Path("runs/small"))[-1])
    (checkpoints(Path("runs/small"))[-1] / "mark").touch()
    launched(1)
    with monkeypatch.context() as another:
        another.setattr(os, "getppid", lambda: 1)  # a launch of the same name, which torchrun gives to all without one
        assert run("train", "small.yaml") == 2
    assert run("train", "small.yaml", "--overwrite") == 0
    assert (checkpoints(Path("runs/small"))[0] / "mark").exists()
    shutil.rmtree(folder / "runs/small/checkpoints")
    assert run("train", "small.yaml") == 0  # it had died before there was one


@pytest.mark.parametrize(("name", "override", "kept"), [
    ("job", "seed=0", True), ("job", "seed=1", False), ("another", "seed=0", False),
    (str(UUID(int=1)), "seed=0", False)])
def test_a_restart_on_another_node_replaces_no_run_of_its_launch(folder, launched, monkeypatch, name, override, kept):
    """But one of another config, or of a launch of another name, which it has not begun yet."""
    launched(0, name="job")
    assert run("train", "small.yaml", "--overwrite") == 0
    mark = checkpoints(Path("runs/small"))[0] / "mark"
    mark.touch()
    launched(1, name)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert run("train", "small.yaml", "--overwrite", override) == 0
    assert mark.exists() is kept


def test_a_restart_goes_on_from_the_last_checkpoint_wherever_it_began(folder, launched):
    first, last = checkpoints(Path("runs/small"))
    launched(0)
    assert run("train", "--resume", str(first)) == 0
    (last / "mark").touch()
    launched(1)
    assert run("train", "--resume", str(first), "train.epochs=2") == 0
    assert (last / "mark").exists()


# Damage.

DAMAGES = {
    "cut short": lambda path: file_of(path).write_bytes(file_of(path).read_bytes()[:1000]),
    "flipped": lambda path: file_of(path).write_bytes(flipped(file_of(path).read_bytes())),
    "a file less": lambda path: file_of(path).unlink(),
    "no index": lambda path: (path / ".metadata").unlink(),
    "another index": lambda path: (path / ".metadata").write_bytes(b"nonsense"),
    "no manifest in it": lambda path: (path / "checkpoint.json").write_text("{"),
    "another manifest": lambda path: (path / "checkpoint.json").write_text("[1]"),
    "a digit of the manifest": lambda path: (path / "checkpoint.json").write_text(
        (path / "checkpoint.json").read_text().replace('"steps_done": 6', '"steps_done": 5')),
    "an old manifest": lambda path: (path / "checkpoint.json").write_text('{"epochs_done": 1}'),
}


def file_of(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_and_the_checkpoint_before_it_is_used(folder, capsys, damage):
    whole = folder / "whole"
    shutil.copytree(folder / "runs/small", whole)
    DAMAGES[damage](checkpoints(Path("runs/small"))[-1])
    capsys.readouterr()
    assert run("eval", "runs/small") == 0
    note = capsys.readouterr().out.splitlines()[0]
    assert re.match(r"note: runs/small/checkpoints/step_000000006: is damaged: .*; step_000000003 is used$", note)
    assert run("export", "runs/small/checkpoints/step_000000006", "--out", "model.pt") == 2
    assert "step_000000006: is damaged: " in capsys.readouterr().err
    assert run("train", "--resume", "runs/small") == 0
    assert_same_run(whole, folder / "runs/small")


def test_where_none_is_intact_it_is_said(folder, capsys):
    for path in checkpoints(Path("runs/small")):
        file_of(path).write_bytes(b"")
    capsys.readouterr()
    for command in (["eval", "runs/small"], ["train", "--resume", "runs/small"], ["train", "small.yaml",
                                                                                  "--auto-resume"]):
        assert run(*command) == 2
        first, second, last = capsys.readouterr().err.splitlines()
        assert "step_000000006: is damaged: " in first
        assert "step_000000003: is damaged: " in second
        assert last == "blpipe: runs/small: holds no intact checkpoint; train it anew, with --overwrite"


def test_checkpoints_of_another_layout_are_kept(folder, capsys):
    old = folder / "runs/small/checkpoints/epoch_00001"
    checkpoints(folder / "runs/small")[-1].rename(old)
    shutil.rmtree(checkpoints(folder / "runs/small")[0])
    assert run("train", "--resume", "runs/small") == 2
    assert "holds checkpoints of another version of blpipe" in capsys.readouterr().err
    assert run("train", "small.yaml", "--auto-resume") == 2
    assert old.exists()


def test_a_model_that_has_changed_is_one_line(folder, capsys):
    config = folder / "runs/small/config.yaml"
    config.write_text(config.read_text().replace("conv_net", "wider_net"))
    path = checkpoints(Path("runs/small"))[-1]
    (path / "config.yaml").write_text(config.read_text())
    found = manifest(path)
    write_manifest(path, replace(found, files=found.files | seals(path, "config.yaml")))
    assert run("eval", "runs/small") == 2
    line, = capsys.readouterr().err.splitlines()
    assert re.match(r"blpipe: runs/small/checkpoints/step_000000006: does not fit the model: .*size mismatch", line)


def test_what_was_not_completed_is_no_checkpoint_and_is_cleared_away(folder):
    partial = folder / "runs/small/checkpoints/.step_000000009.partial"
    shutil.copytree(checkpoints(folder / "runs/small")[-1], partial)
    assert manifest(checkpoints(folder / "runs/small")[-1]).steps_done == 6
    assert run("train", "--resume", "runs/small") == 0
    assert not partial.exists()


class RunsCode:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_reading_a_checkpoint_runs_nothing_from_it(folder, capsys):
    """Even where its checksums are right."""
    path = checkpoints(folder / "runs/small")[-1]
    (path / ".metadata").write_bytes(pickle.dumps(RunsCode(folder / "ran")))
    found = manifest(path)
    write_manifest(path, replace(found, files=found.files | seals(path, ".metadata")))
    assert run("eval", "runs/small") == 2
    assert "which no checkpoint needs" in capsys.readouterr().err
    with pytest.raises(UserError, match="is damaged"):
        read(path, lambda key: True)
    assert not (folder / "ran").exists()


class AsOldPythonsDo:
    """Pickles an attribute as the first releases of Python 3.11 pickle a member of an Enum."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_an_index_may_name_members_of_enums_as_old_pythons_do_and_no_other_attributes():
    def read_index(*attribute):
        return _IndexUnpickler(io.BytesIO(pickle.dumps(AsOldPythonsDo(*attribute)))).load()

    kind = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    assert read_index(kind, "TORCH_CHANNELS_LAST") is kind.TORCH_CHANNELS_LAST
    with pytest.raises(pickle.UnpicklingError, match="its index asks for unlink of something that is no Enum"):
        read_index(Path, "unlink")


# Files that cannot be written.

@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint, and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_file_is_written_whole_or_stays_as_it_was(small_disk):
    path = small_disk / "rows"
    write_text(path, "before")
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "x" * 500_000)
    assert path.read_text() == "before"
    assert list(small_disk.iterdir()) == [path]


FULL = r"cannot write the checkpoint \S+/disk/small/checkpoints/step_0000000%s: .*; what was saved before is still " \
    r"there"


def check_full_disk(code: int, out: str, errors: str, disk: Path) -> None:
    """The second and the third checkpoint of four had no room, and the last one neither."""
    assert code == 1
    notes = [line for line in out.splitlines() if line.startswith("note: cannot")]
    assert [re.fullmatch(f"note: {FULL % step}; training goes on", note) is not None
            for step, note in zip(("06", "09"), notes, strict=True)] == [True, True], notes
    line, = (line for line in errors.splitlines() if line.startswith("blpipe: "))
    assert re.fullmatch(f"blpipe: {FULL % '12'}", line), line
    assert [path.name for path in sorted((disk / "small/checkpoints").iterdir())] == ["step_000000003"]
    assert run("eval", str(disk / "small")) == 0


def test_a_full_disk_is_told_of_and_what_was_saved_stays(folder, small_disk, capsys):
    capsys.readouterr()
    code = run("train", "small.yaml", f"runtime.runs={small_disk}", "train.epochs=2")
    check_full_disk(code, *capsys.readouterr(), small_disk)


def test_a_trace_or_a_board_that_cannot_be_written_is_told_of(folder, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "write_trace", full)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.flush", full)
    assert run("train", "small.yaml", "name=full", "runtime.trace=true", "runtime.tensorboard=true") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: cannot write")]
    assert [note.removeprefix("note: cannot write runs/full/") for note in notes] == [
        "tensorboard: No space left on device; training goes on without TensorBoard",
        "trace.json: No space left on device; training goes on"]


def test_a_full_disk_is_told_of_by_one_of_several_processes(folder, small_disk):
    done = torchrun(2, "-m", "blpipe", "train", "small.yaml", f"runtime.runs={small_disk}", "train.epochs=2",
                    "partition.stages=2", cwd=folder)
    check_full_disk(done.returncode, done.stdout, done.stderr, small_disk)
