"""Optimizers by name, and the learning rate in closed form."""

import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optimizers_under_test import Counting, no_optimizer
from torch import nn

from blpipe.checkpoint.optimizers import load_optimizer, optimizer_state
from blpipe.config import OptimizerConfig, ScheduleConfig
from blpipe.errors import ConfigError
from blpipe.optim import build_optimizer, check_patterns, check_schedule, lr_factor


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2, generator=generator)), nn.Parameter(torch.randn(2, 3, generator=generator))]


def build(name="sgd", args=None, lr=0.1, over=None):
    return build_optimizer(OptimizerConfig(name=name, lr=lr, args=args or {}), parameters() if over is None else over)


@pytest.mark.parametrize(("name", "args", "expected"), [
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}, torch.optim.SGD),
    ("SGD", {"fused": True}, torch.optim.SGD),
    ("Adam", {"amsgrad": True}, torch.optim.Adam),
    ("adamw", {"fused": True}, torch.optim.AdamW),
    ("adamw", {"foreach": True}, torch.optim.AdamW),
    ("RMSprop", {"alpha": 0.9}, torch.optim.RMSprop),
    ("adagrad", {}, torch.optim.Adagrad),
    ("nadam", {}, torch.optim.NAdam),
    ("muon", {}, torch.optim.Muon),
])
def test_an_optimizer_by_its_name_steps_as_torchs_own(name, args, expected):
    ours, reference = parameters(), parameters()
    optimizers = build(name, args, 0.01, ours), expected(reference, lr=0.01, **args)
    assert type(optimizers[0]) is expected
    for optimizer, own in zip(optimizers, (ours, reference), strict=True):
        for parameter in own:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))
    assert not torch.equal(ours[0], parameters()[0])


def test_a_list_stands_for_the_pair_that_torch_wants():
    assert build("adamw", {"betas": [0.8, 0.95]}).param_groups[0]["betas"] == (0.8, 0.95)


def test_only_parameters_that_require_a_gradient_are_optimized():
    frozen, free = parameters()
    frozen.requires_grad_(False)
    assert build(over=iter([frozen, free])).param_groups[0]["params"] == [free]


@pytest.mark.parametrize("fused", [False, True])
def test_groups_may_begin_in_different_steps(fused):
    config = OptimizerConfig(lr=0.1, args={"momentum": 0.9, "fused": fused})
    early, late = parameters()
    optimizer = build_optimizer(config, [late], [], [early])
    for step in range(3):
        early.grad, late.grad = torch.ones_like(early), torch.ones_like(late) if step else None
        optimizer.step()
    torch.testing.assert_close(parameters()[0] - early, torch.full_like(early, 0.1 * (1 + 1.9 + 2.71)))
    torch.testing.assert_close(parameters()[1] - late, torch.full_like(late, 0.1 * (1 + 1.9)))


@pytest.mark.parametrize("fused", [False, True])
def test_weight_decay_may_leave_out_biases_and_scales(fused):
    layers = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2))
    before = {name: p.detach().clone() for name, p in layers.named_parameters()}
    config = OptimizerConfig(lr=0.1, decay="matrices", args={"weight_decay": 0.5, "momentum": 0.9, "fused": fused})
    optimizer = build_optimizer(config, layers.parameters(), [])
    for p in layers.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in layers.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() > 1 else 1.0))


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_the_last_pattern_that_a_name_matches_gives_its_learning_rate(decay):
    layers = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    before = {name: p.detach().clone() for name, p in layers.named_parameters()}
    config = OptimizerConfig(lr=0.1, decay=decay, lr_factors={"1.*": 2.0, "*.bias": 0.0, "2.*": 5.0},
                             args={"weight_decay": 0.5})
    optimizer = build_optimizer(config, layers.parameters(), names={p: name for name, p in layers.named_parameters()})
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, factor in {"0.weight": 1.0, "1.weight": 2.0, "0.bias": 0.0, "1.bias": 0.0}.items():
        expected = before[name] - 0.1 * factor * (1.0 + 0.5 * before[name])
        torch.testing.assert_close(layers.get_parameter(name).detach(), expected)


def test_a_pattern_that_matches_nothing_is_refused():
    names = ["stem.weight", "stem.bias", "head/stem/fc.weight"]
    check_patterns(OptimizerConfig(lr_factors={"stem.*": 0.1, "head/*": 10.0}), names)
    check_patterns(OptimizerConfig(lr_factors={"head/*": 10.0}), names[:2])  # bp has no heads
    for pattern in ("steam.*", "head.*"):
        with pytest.raises(ConfigError, match=rf"^optimizer\.lr_factors: '{re.escape(pattern)}' matches no parameter"):
            check_patterns(OptimizerConfig(lr_factors={pattern: 0.1}), names)


@pytest.mark.parametrize("over", [[], [nn.Parameter(torch.ones(1), requires_grad=False)]])
def test_without_trainable_parameters_there_is_no_optimizer(over):
    assert build(over=over) is None


@pytest.mark.parametrize(("name", "args", "message"), [
    ("admaw", {}, r"^optimizer\.name: unknown 'admaw' \(did you mean 'adamw'\?\); one of .*adamw, .*sgd"),
    ("zzz", {}, r"^optimizer\.name: unknown 'zzz'; one of "),
    ("optimizer", {}, r"^optimizer\.name: unknown 'optimizer'"),
    ("lbfgs", {}, r"^optimizer\.name: 'lbfgs' does not fit stages: it calls the model again; use adamw or sgd$"),
    ("SparseAdam", {}, r"^optimizer\.name: 'SparseAdam' does not fit stages: it wants sparse gradients"),
    ("sgd", {"lr": 1.0}, r"^optimizer\.args\.lr: got 1\.0; the learning rate is optimizer\.lr$"),
    ("sgd", {"betas": [0.9, 0.9]}, r"^optimizer\.args: got an unexpected keyword argument 'betas'; it takes mom"),
    ("sgd", {"params": []}, r"^optimizer\.args: multiple values for argument 'params'"),
    ("sgd", {"momentum": -1.0}, r"^optimizer: ValueError: Invalid momentum value: -1\.0 \(with args "),
    ("sgd", {"momentum": "a"}, r"^optimizer: TypeError: "),
])
def test_what_does_not_fit_is_refused(name, args, message):
    with pytest.raises(ConfigError, match=message):
        build(name, args)


@pytest.mark.parametrize("name", ["rprop", "sgd"])
def test_without_weight_decay_there_is_nothing_to_leave_out(name):
    with pytest.raises(ConfigError, match=rf"^optimizer\.decay: matrices, but {name} has no weight_decay here; give it "
                                          r"optimizer\.args\.weight_decay, or leave it out$"):
        build_optimizer(OptimizerConfig(name=name, lr=0.1, decay="matrices"), parameters())


def test_the_default_learning_rate_is_for_sgd_alone():
    assert build_optimizer(OptimizerConfig(), parameters()).param_groups[0]["lr"] == 0.1
    with pytest.raises(ConfigError, match=r"^optimizer\.lr: is not given, and its default, 0\.1, is for sgd;"):
        build_optimizer(OptimizerConfig(name="adam"), parameters())


def of_target(target, **keys):
    return OptimizerConfig(target=f"optimizers_under_test:{target}", **{"lr": 0.1} | keys)


def test_an_optimizer_of_ones_own_is_built_as_torchs_are():
    config = of_target("Counting", decay="matrices", lr_factors={"b": 0.5}, args={"weight_decay": 0.3})
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(config, [matrix, vector], names={matrix: "a", vector: "b"})
    assert type(optimizer) is Counting
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.3), (0.05, 0.0)]


@pytest.mark.parametrize(("config", "message"), [
    (OptimizerConfig(target="optimizers_under_test:Counting"), "optimizer.lr: is not given, and its default, 0.1, is "),
    (of_target("no_optimizer"), "optimizer.target: 'optimizers_under_test:no_optimizer' returned a list; return a tor"),
    (of_target("Counting", args={"beta": 1}), "optimizer.args: got an unexpected keyword argument 'beta'; it takes we"),
    (of_target("Counting", decay="matrices"), "optimizer.decay: matrices, but optimizers_under_test:Counting has no w"),
    (of_target("Closed"), "optimizer.target: 'optimizers_under_test:Closed' does not fit stages: its step wants more"),
    (of_target("Missing"), "optimizer.target: cannot import 'optimizers_under_test:Missing': AttributeError"),
])
def test_what_is_wrong_with_an_optimizer_of_ones_own_is_said(config, message):
    with pytest.raises(ConfigError, match=rf"^{re.escape(message)}"):
        build_optimizer(config, parameters())


def test_a_registered_optimizer_that_is_none_is_told_of_by_its_name(monkeypatch):
    monkeypatch.setattr("blpipe.optim.by_name", lambda key, name, built_in: no_optimizer)
    with pytest.raises(ConfigError, match=r"^optimizer\.name: 'listed' returned a list; return a torch\.optim\.Optimi"):
        build("listed")


def test_what_an_optimizer_keeps_beside_its_parameters_or_on_the_host_goes_there_again():
    """Parameters without values stand for a GPU's."""
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    names = {parameter: "a"}
    before, after = (build_optimizer(of_target("Counting"), [parameter]) for _ in range(2))
    before.param_groups[0] |= {"scale": torch.ones((), device="meta"), "step": torch.tensor(3)}
    before.state[parameter] = {"sum": torch.zeros(3, device="meta"), "product": torch.ones(()), "step": torch.ones(()),
                               "seen": 2}
    saved = optimizer_state(before, names)
    assert {key.removeprefix("optimizer/a/") for key in saved} == {
        "group/scale", "group/step/host", "product/host", "sum", "step", "seen/number"}
    on_disk = {key: torch.zeros(tensor.shape) if tensor.is_meta else tensor for key, tensor in saved.items()}
    load_optimizer(after, names, on_disk)
    group, state = after.param_groups[0], after.state[parameter]
    assert group["scale"].is_meta and state["sum"].is_meta
    assert group["step"].equal(torch.tensor(3)) and state["product"].equal(torch.ones(())) and state["seen"] == 2
    assert not state["step"].is_meta


@pytest.mark.parametrize("regrouped", [False, True])
def test_the_numbers_that_an_optimizer_keeps_are_saved(regrouped):
    """Also where parameters are in other stages afterwards, and one is new."""
    def step(optimizer, given):
        for parameter in given:
            parameter.grad = parameter.detach().sin()
        optimizer.step()

    config, given, again = of_target("Counting"), parameters(), parameters()
    names, renamed = (dict(zip(each, "ab", strict=True)) for each in (given, again))
    before, after = build_optimizer(config, given), build_optimizer(config, again[::-1] if regrouped else again)
    for _ in range(3):
        step(before, given)
    state = {key: value.clone() for key, value in optimizer_state(before, names).items()}
    assert {key for key in state if key.startswith("optimizer/a/")} == {
        f"optimizer/a/{key}" for key in ("sum", "seen/number", "group/step", "group/doubled/number")}
    for parameter, other in zip(again, given, strict=True):
        parameter.data.copy_(other)
    load_optimizer(after, renamed, state)
    assert after.param_groups[0]["step"] == 3 and type(after.state[again[0]]["seen"]) is int
    step(before, given)
    step(after, again)
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


def test_state_that_no_checkpoint_can_hold_is_said():
    given = parameters()
    optimizer = build_optimizer(of_target("Listing"), given)
    given[0].grad = torch.ones_like(given[0])
    optimizer.step()
    with pytest.raises(ConfigError, match=r"^optimizer: keeps a list in the 'all' of a parameter's state, which a che"):
        optimizer_state(optimizer, dict(zip(given, "ab", strict=True)))


def test_a_name_that_begins_another_one_takes_none_of_its_state():
    given = parameters()
    names = dict(zip(given, ("a", "a/b"), strict=True))
    optimizer, again = build("adamw", over=given), build("adamw", over=given)
    given[1].grad = torch.ones_like(given[1])
    optimizer.step()
    load_optimizer(again, names, optimizer_state(optimizer, names))
    assert given[0] not in again.state
    assert again.state[given[1]].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_torchs_own_optimizers_are_saved_as_tensors_alone():
    given = parameters()
    optimizer = build("adamw", {"weight_decay": 0.1}, over=given)
    for parameter in given:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {key.rpartition("/")[2] for key in optimizer_state(optimizer, dict(zip(given, "ab", strict=True)))} == {
        "step", "exp_avg", "exp_avg_sq"}


def test_what_a_stage_cannot_run_is_not_offered():
    with pytest.raises(ConfigError, match="one of ") as caught:
        build("zzz")
    assert not {"lbfgs", "sparseadam", "optimizer"} & set(str(caught.value).partition("one of ")[2].split(", "))


# The learning rate. 5 epochs of 8 steps, unless said otherwise.

STEPS, EPOCHS = 8, 5
TOTAL = STEPS * EPOCHS


def factors(**schedule) -> list[float]:
    config = ScheduleConfig(**schedule)
    return [lr_factor(config, step, STEPS, EPOCHS) for step in range(TOTAL)]


def cosine(begin: float, end: float, share: float) -> float:
    return begin + (end - begin) * (1 - math.cos(math.pi * share)) / 2


def test_linear_falls_to_final_over_what_the_warm_up_leaves():
    assert factors(name="linear", final=0.2, warmup_epochs=1)[STEPS:] == pytest.approx(
        [1 - 0.8 * i / (TOTAL - STEPS) for i in range(TOTAL - STEPS)])


def test_a_schedule_of_ones_own_gets_the_share_that_is_done_after_the_warm_up():
    ours = factors(target="optimizers_under_test:stays_then_falls", args={"at": 0.75}, warmup_epochs=1)
    assert ours[:STEPS] == factors(warmup_epochs=1)[:STEPS]
    assert ours[STEPS:] == pytest.approx([1.0] * 24 + [2 * (1 - i / 32) for i in range(24, 32)])


@pytest.mark.parametrize(("given", "message"), [
    ({"target": "optimizers_under_test:grows_beyond_measure"},
     "schedule.target: 'optimizers_under_test:grows_beyond_measure' returned inf for 0.975; return a number, "),
    ({"target": "optimizers_under_test:stays_then_falls", "args": {"up": 1}},
     "schedule.args: got an unexpected keyword argument 'up'; it takes at"),
    ({"target": "optimizers_under_test:rises"}, "schedule.target: cannot import 'optimizers_under_test:rises'"),
])
def test_what_is_wrong_with_a_schedule_of_ones_own_is_said(given, message):
    with pytest.raises(ConfigError, match=rf"^{re.escape(message)}"):
        check_schedule("schedule", ScheduleConfig(**given), STEPS, EPOCHS)


def test_a_schedule_that_breaks_later_ends_the_run():
    with pytest.raises(ValueError, match=r"^'optimizers_under_test:breaks_in_the_middle' returned nan for 0\.5; "):
        factors(target="optimizers_under_test:breaks_in_the_middle")


def test_a_function_that_is_defined_anew_is_taken(monkeypatch):
    config = ScheduleConfig(target="optimizers_under_test:stays_then_falls")
    assert lr_factor(config, 0, STEPS, EPOCHS) == 1.0
    monkeypatch.setattr("optimizers_under_test.stays_then_falls", lambda done: 0.25)
    assert lr_factor(config, 0, STEPS, EPOCHS) == 0.25


def test_constant_is_one_throughout():
    assert factors() == [1.0] * TOTAL


@pytest.mark.parametrize("warmup_epochs", [0.5, 2, 2.3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "multistep", "one-cycle"])
def test_the_warm_up_rises_linearly_from_its_first_step(name, warmup_epochs):
    steps = warmup_epochs * STEPS
    rising = factors(name=name, warmup_epochs=warmup_epochs)[:math.ceil(steps)]
    assert rising == pytest.approx([(step + 1) / (steps + 1) for step in range(len(rising))])
    assert all(0.0 < factor < 1.0 for factor in rising)


def test_constant_is_one_after_the_warm_up():
    assert factors(warmup_epochs=2)[2 * STEPS:] == [1.0] * (TOTAL - 2 * STEPS)


def test_a_warm_up_longer_than_the_run_only_rises():
    rising = factors(name="cosine", warmup_epochs=10)
    assert rising == sorted(rising)
    assert rising[-1] == pytest.approx(TOTAL / (10 * STEPS + 1))


@pytest.mark.parametrize("final", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("warmup_epochs", [0, 1.5])
def test_cosine_falls_to_final_over_what_the_warm_up_leaves(final, warmup_epochs):
    first = int(warmup_epochs * STEPS)
    falling = factors(name="cosine", final=final, warmup_epochs=warmup_epochs)[first:]
    assert falling == pytest.approx([cosine(1.0, final, i / (TOTAL - first)) for i in range(TOTAL - first)])
    assert falling[0] == 1.0


def test_cosine_ends_close_to_final():
    config = ScheduleConfig(name="cosine", final=0.1, warmup_epochs=1)
    assert lr_factor(config, 9999, 1000, 10) == pytest.approx(0.1, abs=1e-6)


def test_multistep_is_multiplied_at_each_milestone():
    steps = factors(name="multistep", milestones=[2, 3.5], gamma=0.5)
    assert steps == [1.0] * 16 + [0.5] * 12 + [0.25] * 12


def test_multistep_counts_milestones_from_the_start_of_the_run():
    steps = factors(name="multistep", milestones=[2], gamma=0.5, warmup_epochs=1)
    assert steps[8:] == [1.0] * 8 + [0.5] * 24


@pytest.mark.parametrize("warmup_epochs", [0, 1])
@pytest.mark.parametrize("peak", [0.0, 0.25, 0.3, 1.0])
def test_one_cycle_rises_to_its_peak_and_falls_to_final(peak, warmup_epochs):
    first = warmup_epochs * STEPS
    ours = factors(name="one-cycle", peak=peak, start=0.1, final=0.01, warmup_epochs=warmup_epochs)[first:]
    top, total = peak * (TOTAL - first), TOTAL - first
    assert ours == pytest.approx([cosine(0.1, 1.0, i / top) if i < top else
                                  cosine(1.0, 0.01, (i - top) / (total - top)) for i in range(total)])


def test_one_cycle_by_hand():
    ours = factors(name="one-cycle", peak=0.25, start=0.04, final=0.0)
    assert ours[0] == pytest.approx(0.04)
    assert ours[5] == pytest.approx(0.52)
    assert ours[10] == 1.0
    assert ours[25] == pytest.approx(0.5)


def test_one_cycle_with_torchs_parameters_is_torchs():
    optimizer = torch.optim.SGD(parameters(), lr=0.04)
    # torch reaches its last value in the last step, ours would reach it one step later: one step more for it.
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=TOTAL + 1, pct_start=11 / 41,
                                                 div_factor=25, final_div_factor=1e12, cycle_momentum=False)
    values = []
    for _ in range(TOTAL):
        values.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert factors(name="one-cycle", peak=0.25, start=0.04) == pytest.approx(values)


share = st.floats(0.0, 1.0)
schedules = st.builds(
    ScheduleConfig, name=st.sampled_from(["constant", "linear", "cosine", "multistep", "one-cycle"]),
    warmup_epochs=st.floats(0.0, 12.0), final=share, gamma=st.floats(0.01, 1.0), peak=share, start=share,
    milestones=st.lists(st.floats(0.01, 12.0), max_size=3))


@settings(deadline=None, max_examples=200)
@given(config=schedules, steps_per_epoch=st.integers(1, 9), epochs=st.integers(1, 9))
def test_a_factor_is_finite_and_from_0_to_1(config, steps_per_epoch, epochs):
    for step in range(steps_per_epoch * epochs):
        assert -1e-12 <= lr_factor(config, step, steps_per_epoch, epochs) <= 1 + 1e-12


@settings(deadline=None, max_examples=100)
@given(config=schedules, steps_per_epoch=st.integers(1, 9), epochs=st.integers(1, 9))
def test_a_warm_up_rises_with_every_step(config, steps_per_epoch, epochs):
    assume(config.warmup_epochs > 0)
    warm = [lr_factor(config, step, steps_per_epoch, epochs) for step in range(steps_per_epoch * epochs)
            if step < config.warmup_epochs * steps_per_epoch]
    assert all(a < b for a, b in zip(warm, warm[1:], strict=False))
    assert all(0 < factor <= 1 for factor in warm)


@settings(deadline=None, max_examples=100)
@given(config=schedules, steps_per_epoch=st.integers(1, 9), epochs=st.integers(1, 9))
def test_what_falls_never_rises_after_the_warm_up(config, steps_per_epoch, epochs):
    assume(config.name in ("linear", "cosine", "multistep"))
    falling = [lr_factor(config, step, steps_per_epoch, epochs) for step in range(steps_per_epoch * epochs)
               if step >= config.warmup_epochs * steps_per_epoch]
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False))
