"""Targets that are values, not labels: what is read, learned, measured and refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_run, small_config, train_in_processes, train_locally
from data_under_test import Listed, X, opened_target, refused_target
from test_plan import parse_config
from torch import nn

from blpipe.checkpoint.folders import best_of, checkpoints, manifest
from blpipe.data import open_data
from blpipe.engines.common import train_epoch
from blpipe.errors import ConfigError, UserError
from blpipe.forecast.report import make_report
from blpipe.losses import bce, cross_entropy, mse
from blpipe.metrics import read_rows
from blpipe.plan import make_plan
from blpipe.specs import DataSpec
from blpipe.tally import Tally
from blpipe.trainer import open_local

VALUES = torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)


def waves(samples=88):
    """Rows of five numbers, and two values that follow from them."""
    x = torch.rand(samples, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.stack([x.sin().sum(1), (x[:, 0] * x[:, 1])], dim=1)
    return (x, y), (x[:24], y[:24])


def layers(dim=16):
    """Four blocks from five numbers to two."""
    middle = {f"middle{i}": nn.Sequential(nn.ReLU(), nn.Linear(dim, dim)) for i in range(2)}
    return {"first": nn.Linear(5, dim), **middle, "last": nn.Sequential(nn.ReLU(), nn.Linear(dim, 2))}


def tree(name, **changes):
    """Two epochs of these data in three stages."""
    return small_config(name, **{"model": {"target": "test_values:layers"}, "data": {"target": "test_values:waves"},
                                 "method": {"head": "linear", "loss": "mse"}} | changes)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "dataset", "numbers"])
def test_floats_are_values_whatever_holds_them(kind, monkeypatch):
    given = {"tensors": (X, VALUES), "arrays": (X.numpy(), VALUES.numpy()),
             "dataset": Listed([*zip(X, VALUES, strict=True)]),
             "numbers": Listed([(x, float(y)) for x, y in zip(X, VALUES[:, 0], strict=True)])}[kind]
    data = opened_target((given, given), monkeypatch)
    shape = () if kind == "numbers" else (2,)
    assert data.spec == DataSpec((3, 4, 4), "float32", shape, *shape or (1,), 6, 6, "float32")
    assert not data.spec.labelled
    (_, y), = data.test_batches(6)
    assert torch.equal(y, (VALUES[:, 0] if kind == "numbers" else VALUES).float())


def test_values_and_labels_do_not_go_together(monkeypatch):
    labels = torch.arange(6) % 3
    refused_target(r"train samples are .* target float32 \[2\], but test samples are .* target int64 \[\]",
                   ((X, VALUES), (X, labels)), monkeypatch)
    mixed = Listed([(X[0], 0.5), (X[1], 1)])
    with pytest.raises(UserError, match=r"target int64 \[\], but the first is .* target float32 \[\]; make them all"):
        list(opened_target((mixed, mixed), monkeypatch).test_batches(2))
    refused_target(r"mixup: 0.2 needs one label an image, and the targets are float32 \[2\]",
                   ((X, VALUES), (X, VALUES)), monkeypatch, augment={"mixup": 0.2})


@pytest.mark.parametrize(("loss", "says"), [
    ("cross_entropy", r"targets float32 \[2, 3\]: of values, it takes the probabilities of all classes; make labels "
                      "integers, or use mse or bce"),
    ("mse", "it takes as many targets as the model gives values; make them alike"),
    ("pred_sim", r"^method\.loss: ValueError: pred_sim needs labels, and the targets are values; use mse or bce"),
    ("supcon", "supcon needs labels"),
])
def test_a_loss_that_does_not_fit_is_told_before_the_run(loss, says):
    config = parse_config(tree("run", method={"head": "linear", "loss": loss}))
    with pytest.raises(ConfigError, match=says):
        make_plan(config, DataSpec((5,), "float32", (3,), 3, 88, 24, "float32"))
    config = parse_config(tree("run", method={"head": "linear", "loss": "mse"}))
    with pytest.raises(ConfigError, match="it takes values, and these are labels; make them floats"):
        make_plan(config, DataSpec((5,), "float32", (), 2, 88, 24))


def test_the_losses_are_torchs():
    outputs, values = torch.randn(4, 3), torch.rand(4, 3)
    assert torch.equal(mse()(outputs, values), F.mse_loss(outputs, values))
    assert torch.equal(mse()(outputs[:, :1], values[:, 0]), F.mse_loss(outputs[:, 0], values[:, 0]))
    assert torch.equal(bce()(outputs, values), F.binary_cross_entropy_with_logits(outputs, values))
    shares = values / values.sum(1, keepdim=True)
    assert torch.equal(cross_entropy(0.1)(outputs, shares), F.cross_entropy(outputs, shares, label_smoothing=0.1))


def test_a_tally_of_values_has_a_loss_and_no_accuracy():
    tally = Tally()
    tally.add(torch.tensor(2.0), torch.randn(3, 2), torch.rand(3, 2))
    assert (tally.loss, tally.accuracy) == (2.0, None)
    again = Tally.of(tally.state())
    assert (again.loss, again.accuracy) == (2.0, None)


def test_one_stage_is_a_plain_loop():
    config = parse_config(tree("run", partition__stages=1))
    data = open_data(config.data, config.seed)
    plan = make_plan(config, data.spec)
    engine = open_local(plan, data)
    plain = [p.detach().clone().requires_grad_() for p in plan.model.parameters()]
    names = [name for name, _ in plan.model.named_parameters()]
    optimizer = torch.optim.SGD(plain, lr=0.05, momentum=0.9)
    for x, y in data.train_batches(config.seed, 0, 16, False):
        out = torch.func.functional_call(plan.model, dict(zip(names, plain, strict=True)), (x,))
        optimizer.zero_grad()
        F.mse_loss(out, y).backward()
        optimizer.step()
    train_epoch(engine, 0)
    assert all(torch.equal(one, other) for one, other in zip(plain, engine.stages[0].blocks.parameters(), strict=True))


@pytest.mark.parametrize("costs", ["measured", "analytic"])
def test_a_plan_and_backpropagation_take_values(costs, tmp_path):
    config = parse_config(tree("run", partition={"stages": 2, "costs": costs}))
    assert all(row.samples_per_second > 0 for row in make_report(config).methods)
    run = train_locally(tree("bp", method={"name": "bp", "loss": "mse"}), tmp_path)
    first, last = (row["val_loss"] for row in read_rows(run) if row["stage"] == 3)
    assert last < first


def test_both_engines_learn_the_same_values_and_the_least_loss_is_best(tmp_path, capsys):
    trees = [tree("late", train__epochs=4, checkpoint={"every_epochs": 1, "keep": 1}),
             tree("on_time", method={"head": "linear", "loss": "mse", "link": {"delay": 0}}, train__microbatches=2)]
    late, on_time = train_in_processes(trees, 3, tmp_path)
    for one, each in zip(trees, (late, on_time), strict=True):
        assert_same_run(train_locally(one, tmp_path), each)
    said = capsys.readouterr().out
    assert "2 values a target" in said
    assert "test loss by stage" in said
    assert "accuracy" not in said
    losses = [row["val_loss"] for row in read_rows(late) if row["stage"] == 3]
    assert losses[-1] < 0.5 * losses[0]
    result = json.loads((late / "result.json").read_text())
    assert result["val_accuracy"] is None
    assert result["val_loss"] == losses[-1] == result["stage_val_loss"][-1]
    kept = {path.name: manifest(path).val_loss for path in checkpoints(late)}
    assert best_of(late).name == min(kept, key=kept.get)
    assert min(kept.values()) == min(losses)
