"""A stage without neighbours: what has a GPU load its kernels leaves no trace."""

import pytest
import torch
from conftest import small_config

from blpipe.config_file import parse_config
from blpipe.data import Data, open_data
from blpipe.data.mixing import Mix
from blpipe.engines.alone import load_kernels
from blpipe.engines.common import train_epoch
from blpipe.engines.local import LocalEngine
from blpipe.plan import make_plan

CPU = torch.device("cpu")
WAYS = {
    "late": {"method__link": {"delay": 1, "length": 2}, "train__microbatches": 2, "train__ema": 0.9},
    "far": {"method__link": {"length": "all", "reach": 2, "keep": "recompute"}, "method__local_weight": 0.5},
    "exact, adamw": {"method__link": {"delay": 0}, "optimizer": {"name": "adamw", "lr": 0.01}},
    "greedy, skipping": {"method__name": "greedy", "train__on_nonfinite": "skip"},
    "supcon, channels last": {"method__loss": "supcon", "train__channels_last": True},
    "adagrad, bf16 on the wire": {"optimizer": {"name": "adagrad", "lr": 0.01}, "train__wire": "bf16",
                                  "method__link": {"wire": "bf16", "schedule": {"name": "cosine"}}},
    "a buffer replaced": {"model": {"target": "models_under_test:averaging_net"}, "train__ema": 0.9},
}


def engine(changes):
    config = parse_config(small_config("alone", train__eval_batch_size=10, **changes))
    data = open_data(config.data, config.seed)
    return LocalEngine(make_plan(config, data.spec), data, CPU)


def learned(engine):
    found = []
    for stage in engine.stages.values():
        for part in (stage.blocks, stage.head, stage.loss):
            found += part.state_dict().values()
        for state in stage.update.optimizer.state.values():
            found += (value for value in state.values() if isinstance(value, torch.Tensor))
        found += stage.stream.state
    return found


@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS)
def test_a_stage_whose_kernels_were_loaded_learns_as_a_new_one(changes):
    new, loaded = engine(changes), engine(changes)
    torch.manual_seed(3)
    for index, stage in loaded.stages.items():
        load_kernels(stage, loaded.plan, index, CPU, loaded.data if index == 0 else None)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert all(torch.equal(a, b) for a, b in zip(learned(new), learned(loaded), strict=True))
    for each in (new, loaded):
        train_epoch(each, 0)
        each.evaluate()
    assert all(torch.equal(a, b) for a, b in zip(learned(new), learned(loaded), strict=True))
    assert [(r.train_loss, r.val_loss) for r in new.reports()] == [(r.train_loss, r.val_loss) for r in loaded.reports()]


def test_all_sizes_of_microbatches_and_of_evaluations_are_run():
    run = engine({"method__link": {"delay": 1}})
    stage, sizes, evaluated = run.stages[1], set(), set()
    forward, evaluate = stage.forward, stage.evaluate
    stage.forward = lambda x: sizes.add(len(x)) or forward(x)
    stage.evaluate = lambda x, targets: evaluated.add(len(x)) or evaluate(x, targets)
    load_kernels(stage, run.plan, 1, CPU, None)
    assert sizes == {size for step in run.plan.step_sizes for size in step} and len(sizes) > 1
    assert evaluated == set(run.plan.evaluation_sizes()) and len(evaluated) > 1


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_is_run_has_the_layouts_of_a_run(index):
    """Another one would take other kernels."""
    run = engine({"train__channels_last": True, "method__link": {"delay": 1, "length": "all"}})
    stage, seen = run.stages[index], set()

    def watched(name):
        function = getattr(stage, name)

        def watch(x, *given):
            seen.add((name, x.dtype, tuple(x.shape), x.stride()))
            return function(x, *given)
        return watch

    for name in ("forward", "link_backward", "evaluate"):
        setattr(stage, name, watched(name))
    train_epoch(run, 0)
    run.evaluate()
    before = set(seen)
    seen.clear()
    load_kernels(stage, run.plan, index, CPU, None)
    assert seen == before


def test_microbatches_begin_where_in_memory_they_do_in_a_run():
    """Which kernel is taken may depend on that: microbatches are slices of a batch."""
    run = engine({"train__batch_size": 12, "train__microbatches": 4, "data__args": {
        "shape": [3, 3, 3], "classes": 4, "samples": 91}, "model__args": {"in_channels": 3}})
    stage, seen = run.stages[0], set()
    forward, backward = stage.forward, stage.local_backward

    def watch(name, function):
        def watched(given, *rest):
            seen.add((name, len(given), given.data_ptr() % 16))
            return function(given, *rest)
        return watched

    stage.forward, stage.local_backward = watch("forward", forward), watch("backward", backward)
    train_epoch(run, 0)
    before = set(seen)
    seen.clear()
    load_kernels(stage, run.plan, 0, CPU, run.data)
    assert seen == before and {("forward", 3, 4), ("backward", 3, 8)} <= seen


@pytest.mark.parametrize("held", [False, True])
def test_images_are_mixed_in_every_way(held, monkeypatch):
    """A step draws one of them, and a GPU would load the other's kernels in the middle of a run."""
    run = engine({"data__augment": {"mixup": 0.2, "cutmix": 0.001}, "train__microbatches": 2})
    mixed = set()
    monkeypatch.setattr(Data, "is_held_there", held)
    monkeypatch.setattr(Mix, "of", lambda mix, x: mixed.add((type(mix.transform).__name__, len(x))) or x)
    load_kernels(run.stages[0], run.plan, 0, CPU, run.data)
    sizes = {size for step in run.plan.step_sizes for size in step}
    assert mixed == {(way, size) for way in ("MixUp", "CutMix") for size in sizes}


def test_examples_of_mixing_have_a_part_of_each_image():
    mixing = engine({"data__augment": {"mixup": 0.2, "cutmix": 0.001}}).plan.mixing
    x = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 2, 8, 8)
    for mix in mixing.examples():
        assert 0.1 < mix.ratio < 0.9
        assert not torch.equal(mix.of(x), x)
