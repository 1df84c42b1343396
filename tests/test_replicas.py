"""Replicas of the pipeline: each has a share of every batch, and after a step all are alike."""

import json
import re
from itertools import pairwise

import pytest
import torch
from conftest import (
    assert_same_run,
    metrics_of,
    small_config,
    state_of,
    train_in_processes,
    train_locally,
)
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoints import METHODS, go_on, rewound, saved_config
from test_cli import run

from blpipe import launch
from blpipe.checkpoint.folders import checkpoints
from blpipe.checkpoint.state import read
from blpipe.config_file import load_config, parse_config
from blpipe.data import open_data
from blpipe.engines.build import build_stage
from blpipe.engines.common import train_epoch
from blpipe.errors import ConfigError, UserError
from blpipe.plan import make_plan
from blpipe.specs import Share
from blpipe.steps import step_sizes
from blpipe.trainer import choose_engine, open_local
from blpipe.transport.memory import MemorySum

PLAIN = {"name": "mlp", "args": {"hidden": [12] * 3, "batch_norm": False}}  # what replicas of it compute adds up
ADAMW = {"name": "adamw", "lr": 0.01, "clip_norm": 0.5, "args": {"fused": True}}
UNLIKE = {"model": {"target": "models_under_test:unlike_net"}, "train__microbatches": 2, "method__head": "linear",
          "optimizer": {"name": "sgd", "lr": 0.05, "args": {"momentum": 0.9, "weight_decay": 0.1}}}
ODD = {"shape": [2, 8, 8], "classes": 4, "samples": 57}  # the last batch has nine


def prepared(tree):
    config = parse_config(tree)
    data = open_data(config.data, config.seed)
    return config, data, make_plan(config, data.spec)


# What each of them has.

@given(samples=st.integers(0, 100), replicas=st.integers(1, 9))
def test_shares_are_the_whole_in_order_and_as_even_as_can_be(samples, replicas):
    shares = [Share(replica, replicas).of(samples) for replica in range(replicas)]
    sizes = [share.stop - share.start for share in shares]
    assert shares[0].start == 0
    assert shares[-1].stop == samples
    assert all(one.stop == other.start for one, other in pairwise(shares))
    assert max(sizes) - min(sizes) <= 1


@given(samples=st.integers(24, 200), replicas=st.sampled_from([1, 2, 3, 4]), microbatches=st.sampled_from([1, 2]),
       drop_last=st.booleans())
def test_every_sample_is_in_one_microbatch_of_one_replica(samples, replicas, microbatches, drop_last):
    config = parse_config(small_config("sizes", train={
        "batch_size": 24, "replicas": replicas, "microbatches": microbatches, "drop_last": drop_last}))
    sizes = [step_sizes(samples, config, replica) for replica in range(replicas)]
    batches = [sum(map(sum, of_all)) for of_all in zip(*sizes, strict=True)]
    assert sum(batches) == (samples - samples % 24 if drop_last else samples)
    assert all(batch == 24 for batch in batches[:-1])
    assert max(size for steps in sizes for step in steps for size in step) <= 24 // replicas // microbatches


@pytest.mark.parametrize("replicas", [2, 3])
def test_batches_are_cut_and_not_drawn_anew(replicas):
    _, data, _ = prepared(small_config("cut"))
    whole = data.train_batches(3, 1, 16, False, 2)
    parts = zip(*(data.train_batches(3, 1, 16, False, 2, Share(r, replicas)) for r in range(replicas)), strict=True)
    for (x, y), of_all in zip(whole, parts, strict=True):
        assert torch.equal(x, torch.cat([each for each, _ in of_all]))
        assert torch.equal(y, torch.cat([each for _, each in of_all]))
    tested = [x for r in range(replicas) for x, _ in data.test_batches(4, Share(r, replicas))]
    assert sum(map(len, tested)) == data.spec.test_samples


def test_each_draws_random_numbers_of_its_own():
    config, _, plan = prepared(small_config("streams", train__replicas=2))
    streams = [build_stage(make_plan(config, plan.data, replica=r), 1, torch.device("cpu")).stream for r in range(2)]
    assert not torch.equal(streams[0].state[0], streams[1].state[0])


# What they compute.

LINKS = {
    "in_time": {"delay": 0},
    "late": {"delay": 1, "length": 2},
    "far": {"delay": 1, "length": "all", "reach": 2, "weight": 0.7},
    "joint": {"delay": 1, "joint": True},
}


@pytest.mark.parametrize("method", ["bp", "greedy", *LINKS])
@pytest.mark.parametrize(("replicas", "microbatches"), [(2, 1), (3, 2)])
def test_replicas_compute_what_as_many_microbatches_do(method, replicas, microbatches, tmp_path):
    changes = {"method": {"name": method} if method not in LINKS else {"link": LINKS[method]},
               "model": PLAIN, "optimizer__lr": 0.2, "train__batch_size": 24, "data__args": ODD}
    one = small_config("one", train__microbatches=replicas * microbatches, **changes)
    several = small_config("several", train__microbatches=microbatches, train__replicas=replicas, **changes)
    one, several = train_locally(one, tmp_path), train_locally(several, tmp_path)
    wanted, found = state_of(one), state_of(several)
    for key in wanted:
        if key.startswith(("model/", "head/", "optimizer/")):
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    measured = [[number for row in metrics_of(run) for number in row if number is not None] for run in (several, one)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


IN_PROCESSES = {
    2: [
        small_config("one_stage", partition__stages=1, train__replicas=2, data__args=ODD),
        small_config("one_stage_by_bp", partition__stages=1, train__replicas=2, method="bp"),
    ],
    4: [
        small_config("late", partition__stages=2, train__replicas=2, train__microbatches=2, data__args=ODD,
                     runtime__trace=True),
        small_config("in_time", partition__stages=2, train__replicas=2, train__microbatches=2,
                     method__link={"delay": 0, "length": "all"}, optimizer=ADAMW),
        small_config("recomputed", partition__stages=2, train__replicas=2, train__recompute=True,
                     method__link={"delay": 3, "keep": "recompute"}, train__channels_last=True, data__args=ODD),
        small_config("averages", partition__stages=2, train__replicas=2, method="greedy", train__ema=0.9,
                     model={"target": "models_under_test:averaging_net"}),
        small_config("skips", partition__stages=2, train__replicas=2, train__on_nonfinite="skip", train__ema=0.9,
                     model={"target": "models_under_test:exploding_net", "args": {"at": 4}}),
        small_config("unlike", partition__stages=2, train__replicas=2, data__args=ODD, train__ema=0.9,
                     train__eval_batch_size=4, **UNLIKE),
        small_config("bp", partition__stages=2, train__replicas=2, train__microbatches=4, method="bp"),
    ],
}


@pytest.mark.parametrize("processes", IN_PROCESSES)
def test_pipelines_with_replicas_equal_one_process_bit_for_bit(processes, tmp_path):
    runs = train_in_processes(IN_PROCESSES[processes], processes, tmp_path)
    for tree, found in zip(IN_PROCESSES[processes], runs, strict=True):
        alone = train_locally(tree, tmp_path)
        if tree["name"] != "bp":
            assert_same_run(found, alone)
            continue
        # Torch's schedules add up in another order.
        torch.testing.assert_close(state_of(found), state_of(alone), rtol=1e-3, atol=1e-3)
    if processes == 4:
        for run in (runs[0], tmp_path / "local" / runs[0].name):
            assert_traces_the_first_replica(run, steps=4, microbatches=2)


def assert_traces_the_first_replica(run, steps, microbatches):
    """That a run of two stages has each of them once in its trace."""
    events = [event for event in json.loads((run / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    for kind, parts in (("forward", microbatches), ("step", 1)):
        found = [(event["tid"], event["args"]["step"], event["args"]["microbatch"]) for event in events
                 if event["name"] == kind]
        assert len(found) == len(set(found)) == 2 * steps * parts, (kind, found)


@pytest.mark.parametrize("changes", [{"optimizer": ADAMW}, {**UNLIKE, "data__args": ODD}])
def test_after_an_epoch_all_are_alike(changes):
    _, data, plan = prepared(small_config("alike", train__replicas=3, train__batch_size=24, **changes))
    engine = open_local(plan, data)
    train_epoch(engine, 0)
    for index, leading in engine.replicas[0].items():
        for other in (engine.replicas[r][index] for r in (1, 2)):
            for part, same in zip(leading.parts, other.parts, strict=True):
                for name, tensor in part.state_dict().items():
                    assert torch.equal(tensor, same.state_dict()[name]), name
            assert other.tally.state() != leading.tally.state()


def replicas_after_a_batch(poisoned=None, **changes):
    """The last stage of two replicas, each with what they share; NaN is in the second's input or loss, if anywhere."""
    config, data, plan = prepared(small_config("two", train__replicas=2, **changes))
    stages = [build_stage(make_plan(config, data.spec, replica=r), 2, torch.device("cpu")) for r in range(2)]
    ends = MemorySum.ends(2)
    for stage, end, poison in zip(stages, ends, (0.0, torch.nan), strict=True):
        stage.train(True)
        x, targets = torch.randn(4, *plan.boundaries[1].shape), torch.arange(4)
        stage.forward(x + poison if poisoned == "input" else x)
        stage.local_backward(targets, 0.5)
        if poisoned == "loss":
            stage.tally.loss_sum = stage.tally.loss_sum + poison
        end.put(*stage.to_reduce())
    return stages, ends


def test_buffers_are_those_of_the_first():
    stages, ends = replicas_after_a_batch()
    first, second = ([buffer.clone() for buffer in stage.update.buffers()] for stage in stages)
    assert not all(map(torch.equal, first, second))
    for stage, end in zip(stages, ends, strict=True):
        stage.update.take_reduced(end.get())
        assert all(map(torch.equal, stage.update.buffers(), first))


@pytest.mark.parametrize("poisoned", ["input", "loss"])
def test_a_step_in_which_one_of_them_is_not_finite_is_skipped_by_all(poisoned):
    stages, ends = replicas_after_a_batch(poisoned, train__on_nonfinite="skip")
    new = build_stage(prepared(small_config("new"))[2], 2, torch.device("cpu"))
    for stage, end in zip(stages, ends, strict=True):
        stage.update.take_reduced(end.get())
        stage.step(5, 1.0)
        assert stage.tally.skipped == [5]
        for name, tensor in new.blocks.state_dict().items():
            assert torch.equal(stage.blocks.state_dict()[name], tensor), name


# How runs begin and go on.

@pytest.mark.parametrize("name", ["bp", "three_late", "far", "unlike"])
def test_a_run_goes_on_from_its_checkpoints_bit_for_bit(name, tmp_path):
    changes = {**METHODS.get(name, {**UNLIKE, "data__args": ODD}), "train__replicas": 2}
    undisturbed = train_locally(saved_config("undisturbed", 0, **changes), tmp_path)
    saved = train_locally(saved_config("saved", **changes), tmp_path)
    if name != "bp":  # whose sums of an epoch are cut
        assert_same_run(undisturbed, saved)
        assert any(re.match(r"held/\d+\.\d+\.\d+\.1/", key) for key in read(checkpoints(saved)[0], lambda key: True))
    assert_same_run(saved, go_on(rewound(saved, 5, tmp_path / "from5")))


def test_what_the_pipeline_saves_goes_on_in_one_process(tmp_path):
    changes = {"partition__stages": 2, "train__replicas": 2, **METHODS["three_late"]}
    undisturbed = train_locally(saved_config("late", 0, **changes), tmp_path)
    saved, = train_in_processes([saved_config("late", **changes)], 4, tmp_path)
    assert_same_run(undisturbed, saved)
    assert_same_run(undisturbed, go_on(rewound(saved, 5, tmp_path / "from5")))


def test_a_run_goes_on_with_another_number_of_replicas(tmp_path, capsys):
    saved = train_locally(saved_config("run", **METHODS["late"]), tmp_path)
    capsys.readouterr()
    resumed = go_on(rewound(saved, 5, tmp_path / "from5"), "train.replicas=2")
    said = capsys.readouterr().out
    assert "note: train.replicas: 2, was 1 before" in said
    assert "note: random streams begin anew, and errors under way and gradients due later are left out" in said
    assert "heads:" not in said
    assert load_config(resumed / "config.yaml").train.replicas == 2
    back = go_on(rewound(resumed, 10, tmp_path / "from10"), "train.replicas=1")
    assert (back / "result.json").exists()


def test_eval_and_export_take_such_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained = train_locally(small_config("run", train__replicas=2), tmp_path)
    assert run("eval", str(trained)) == 0
    assert f"{100 * metrics_of(trained)[-1][-1]:.1f} %" in capsys.readouterr().out
    assert run("export", str(trained), "--out", "model.pt") == 0


@pytest.mark.parametrize(("processes", "changes", "message"), [
    (3, {}, r"3 stages in 2 replicas need 6 processes, torchrun started 3; run `torchrun --standalone "
            r"--nproc-per-node=6 .*`, set train\.replicas=1, or"),
    (12, {}, r"set train\.replicas=4, or"),
    (4, {}, r"set partition\.stages=2, or"),
    (9, {}, r"set partition\.stages=9 and train\.replicas=1, or"),  # three replicas would not divide the batch
    (5, {}, r"set partition\.stages=5 and train\.replicas=1, or"),
])
def test_a_number_of_processes_that_does_not_fit_is_refused(processes, changes, message, monkeypatch):
    monkeypatch.setattr(launch, "world_size", lambda: processes)
    with pytest.raises(ConfigError, match=message):
        choose_engine(parse_config(small_config("run", train__replicas=2, **changes)))


@pytest.mark.parametrize(("changes", "message"), [
    ({"train__replicas": 3}, r"train: replicas 3 does not divide batch_size 16; one that does: 2"),
    ({"train__replicas": 2, "train__microbatches": 16},
     r"train: microbatches 16 does not divide a replica's share of 8; one that does: 8"),
    ({"train__replicas": 16}, r"train\.replicas: 16, but the last batch of an epoch has 8 samples"),
])
def test_batches_that_cannot_be_shared_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        prepared(small_config("run", **changes))


def test_heads_are_tried_on_the_microbatches_of_every_replica():
    """The last batch of 7 is cut in 4 and 3; in microbatches of 2 there is one of a single sample."""
    with pytest.raises(UserError, match=r"BatchNorm in method\.head .* cannot train on a microbatch of 1 sample"):
        prepared(small_config("run", train={"batch_size": 16, "replicas": 2, "microbatches": 4},
                              data__args={**ODD, "samples": 23}, model__args={"dropout": 0.0}, method__head={
            "name": "mlp_sr", "args": {"convs": 0}}))


def test_data_that_differ_from_those_of_rank_0_are_refused(tmp_path):
    tree = small_config("run", partition__stages=1, train__replicas=2, data={
        "target": "models_under_test:data_of_this_rank"})
    said = (r"rank (1 and rank 0 differ in data\.train_samples: 33 and 32|"
            r"0 and rank 1 differ in data\.train_samples: 32 and 33); ")
    with pytest.raises(AssertionError, match=said):
        train_in_processes([tree], 2, tmp_path)
