"""A loss that is NaN: the run stops and names where, or skips the step without a trace, or goes on, by config."""

import pytest
import torch
from conftest import metrics_of, small_config, state_of, train_locally
from test_stage import make_stage, microbatch

from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.engines.common import LossWatch, check_weights
from blpipe.errors import StageError
from blpipe.metrics import read_rows
from blpipe.plan import make_plan
from blpipe.trainer import open_local

EXPLODING = {"target": "models_under_test:exploding_net"}
AT = 9  # with two microbatches a step, the first one of step 4


def config_of(policy, **changes):
    return small_config("run", **{"model": {**EXPLODING, "args": {"at": AT}},
                                  "train__microbatches": 2, "train__on_nonfinite": policy} | changes)


@pytest.mark.parametrize("method", [{"link": {"delay": 1}}, {"link": {"delay": 0}}, {"name": "greedy"}])
def test_the_run_stops_and_names_stage_and_step(method, tmp_path):
    """The first stage that ends its step: without a delay, a stage waits for the one after it."""
    named = r"^stage 3 \(rank 2, blocks block4…block5\)" if method == {"link": {"delay": 0}} else \
        r"^stage 2 \(rank 1, blocks block2…block3\)"
    with pytest.raises(StageError, match=named + r" failed at step 4: NonFiniteError: its loss or weights are NaN or "
                                         r"infinite; lower optimizer\.lr, .*train\.on_nonfinite"):
        train_locally(config_of("stop", method=method), tmp_path)


def test_bp_names_the_stage_of_its_loss(tmp_path):
    with pytest.raises(StageError, match=r"^stage 3 .* failed at step 4: NonFiniteError"):
        train_locally(config_of("stop", method="bp"), tmp_path)


def test_what_is_not_looked_at_in_every_step_is_named_all_the_same(tmp_path):
    """As on a GPU."""
    config = parse_config(config_of("stop"))
    data = open_data(config.data, config.seed)
    engine = open_local(make_plan(config, data.spec), data)
    engine._losses = LossWatch(engine.plan, at_once=False)
    with pytest.raises(StageError, match=r"^stage 2 .* failed at step 4: NonFiniteError"):
        engine.train(0, 0, lambda step: True, lambda: None)


def test_a_step_is_skipped_by_the_stages_that_it_reached_and_the_run_goes_on(tmp_path, capsys):
    run = train_locally(config_of("skip", method="greedy", checkpoint={"every_steps": 1, "keep": 100}), tmp_path)
    rows = {(row["epoch"], row["stage"]): row for row in read_rows(run)}
    assert [rows[1, stage]["skipped_steps"] for stage in (1, 2, 3)] == [[], [4], [4]]
    assert [rows[2, stage]["skipped_steps"] for stage in (1, 2, 3)] == [[], [], []]
    said = capsys.readouterr().out
    assert "note: stage 2 (block2 … block3) skipped step 4: loss or gradients NaN or infinite" in said
    assert all(torch.isfinite(tensor).all() for tensor in state_of(run).values() if tensor.is_floating_point())
    assert all(value == value for row in metrics_of(run) for value in row)


def test_an_epoch_whose_steps_are_all_skipped_has_no_loss(tmp_path, capsys):
    run = train_locally(config_of("skip", method="greedy", train__epochs=2, data__args={
        "shape": [2, 8, 8], "classes": 4, "samples": 16}, model={**EXPLODING, "args": {"at": 1}}), tmp_path)
    assert read_rows(run)[2]["train_loss"] is None
    assert "epoch 1/2  train loss –  test accuracy" in capsys.readouterr().out


def test_a_skipped_step_leaves_no_trace():
    stage = make_stage(skip_nonfinite=True)
    stage.train(True)
    for seed, poison in ((0, 1.0), (1, torch.nan)):
        before = [tensor.clone() for tensor in stage.blocks.state_dict().values()], stage.tally.state()
        x, targets = microbatch(seed)
        stage.forward(x * poison)
        stage.local_backward(targets, 1.0)
        stage.step(seed, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before[0], stage.blocks.state_dict().values(), strict=True))
    assert stage.tally.state() == [*before[1], 1]
    assert stage.tally.skipped == [1]


def test_a_late_error_that_is_nan_is_skipped_in_the_step_that_it_comes_to():
    stage = make_stage(skip_nonfinite=True)
    stage.train(True)
    for index in range(2):
        x, targets = microbatch(index)
        stage.forward(x)
        stage.local_backward(targets, 1.0)
        if index == 1:
            stage.link_backward(torch.full((8, 5), torch.nan))
        stage.step(index, 1.0)
    assert stage.tally.skipped == [1]


def test_by_config_it_goes_on(tmp_path):
    run = train_locally(config_of("ignore"), tmp_path)
    assert any(row["train_loss"] is None for row in read_rows(run))
    assert "NaN" not in (run / "metrics.jsonl").read_text()  # which is no JSON


@pytest.mark.parametrize("part", ["blocks", "head"])
def test_weights_that_are_nan_are_not_saved(part):
    """The loss of the last step before the checkpoint was still finite."""
    config = parse_config(config_of("stop"))
    data = open_data(config.data, config.seed)
    engine = open_local(make_plan(config, data.spec), data)
    check_weights(engine.plan, engine.stages, 6)
    next(getattr(engine.stages[1], part).parameters()).data[0] = torch.nan
    with pytest.raises(StageError, match=r"^stage 2 .* failed at step 5: NonFiniteError"):
        check_weights(engine.plan, engine.stages, 6)


def test_weights_that_are_not_trained_may_be_anything():
    config = parse_config(config_of("stop"))
    data = open_data(config.data, config.seed)
    engine = open_local(make_plan(config, data.spec), data)
    for name, kept in (("mask", torch.full((2,), -torch.inf)), ("count", torch.ones(2, dtype=torch.int64))):
        engine.stages[1].head.register_parameter(name, torch.nn.Parameter(kept, requires_grad=False))
    check_weights(engine.plan, engine.stages, 6)


def test_a_stage_that_trains_nothing_skips_too():
    stage = make_stage(skip_nonfinite=True)
    stage.update.optimizer = None
    stage.train(True)
    x, targets = microbatch(0)
    stage.forward(x * torch.nan)
    stage.local_backward(targets, 1.0)
    stage.step(0, 1.0)
    assert stage.tally.skipped == [0]
    assert all(torch.isfinite(buffer).all() for buffer in stage.blocks.buffers())
