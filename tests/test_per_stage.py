"""Heads and losses that differ by stage: what each stage gets, learns, saves and costs."""

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_run, interrupt_second_save, small_config, state_of, train_locally
from torch import nn

from blpipe.config import MethodConfig
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.engines.build import build_stage
from blpipe.errors import ConfigError
from blpipe.forecast.costs import profile
from blpipe.forecast.memory import Rehearsal
from blpipe.forecast.stages import settle
from blpipe.plan import make_network, make_plan
from blpipe.resume import resumed_config
from blpipe.runs import train_run
from blpipe.saved import evaluate_run

CPU = torch.device("cpu")
HEADS = ["conv", {"name": "mlp_sr", "args": {"convs": 1, "layers": 1}}]
LOSSES = ["supcon", "pred_sim", "cross_entropy"]
LISTS = {"head": HEADS, "loss": LOSSES}


def config_of(**changes):
    return parse_config(small_config("lists", **{"method": LISTS} | changes))


def network_of(**changes):
    config = config_of(**changes)
    return make_network(config, open_data(config.data, config.seed).spec)


def plan_of(**changes):
    network = network_of(**changes)
    return make_plan(network.config, network.data, network)


def own_loss(boundary):
    """Fails at the shape of the second stage's output."""
    return lambda logits, targets, x: x.new_zeros(3).sum() if x.shape[1] == 6 else x.sum(1).mean() + logits @ targets


# What each stage gets.

def test_each_stage_has_its_own_head_and_loss():
    plan = plan_of()
    stages = [build_stage(plan, k, CPU) for k in range(3)]
    names = [[name for name, _ in stage.head.named_children()] for stage in stages]
    assert names[0][:2] == ["conv", "bn"]
    assert names[1][:2] == ["reduce", "conv1"]
    assert names[2] == []
    assert [[name for name, _ in stage.loss.named_parameters()] for stage in stages] == [
        [f"projection.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")], ["projection.conv.weight"], []]


def test_the_parameters_of_a_loss_are_trained_and_are_the_optimizers_last():
    stage = build_stage(plan_of(), 0, CPU)
    parts = [p for part in (stage.blocks, stage.head, stage.loss) for p in part.parameters()]
    assert [id(p) for group in stage.update.optimizer.param_groups for p in group["params"]] == [id(p) for p in parts]
    before = [p.detach().clone() for p in stage.loss.parameters()]
    stage.train(True)
    stage.forward(torch.randn(8, 2, 8, 8))
    stage.local_backward(torch.arange(8) % 2, 1.0)
    stage.step(0, 1.0)
    assert all(not torch.equal(p, old) for p, old in zip(stage.loss.parameters(), before, strict=True))


@pytest.mark.parametrize("index", [0, 1])
def test_the_local_gradient_is_that_through_the_head_and_of_the_loss_itself(index):
    model = {"target": "models_under_test:conv_net", "args": {"dropout": 0.0}}
    stage = build_stage(plan_of(model=model, method=LISTS | {"name": "greedy"}), index, CPU)
    x, targets = torch.randn(8, 2 if index == 0 else 6, 8, 8), torch.arange(8) % 2
    stage.train(True)
    stage.forward(x)
    stage.local_backward(targets, 0.25)
    out = stage.blocks(x)
    through_head = stage.loss(stage.head(out), targets, out.detach())
    of_itself = stage.loss(stage.head(out).detach(), targets, out)
    parameters = list(stage.blocks.parameters())
    first, second = (torch.autograd.grad(0.25 * loss, parameters, retain_graph=True)
                     for loss in (through_head, of_itself))
    for parameter, one, other in zip(parameters, first, second, strict=True):
        torch.testing.assert_close(parameter.grad, one + other, rtol=1e-4, atol=1e-6)


def test_a_stage_switches_its_loss_between_training_and_evaluation():
    stage = build_stage(plan_of(), 0, CPU)
    for mode in (False, True):
        stage.train(mode)
        assert stage.loss.training is mode


def test_evaluation_gives_the_loss_the_stages_output():
    stage = build_stage(plan_of(), 0, CPU)
    x, targets = torch.randn(8, 2, 8, 8), torch.arange(8) % 2
    stage.train(False)
    out = stage.evaluate(x, targets)
    with torch.no_grad():
        assert stage.tally.loss == pytest.approx(stage.loss(stage.head(out), targets, out).item())
        assert stage.tally.loss > 1.1 * F.cross_entropy(stage.head(out), targets).item()


def test_bp_has_no_losses_but_the_last_and_that_is_the_cross_entropy(tmp_path):
    tree = small_config("bp", method={"name": "bp", "loss": ["supcon", "supcon", "pred_sim"]})
    run, plain = train_locally(tree, tmp_path / "a"), train_locally(small_config("bp", method="bp"), tmp_path / "b")
    assert_same_run(run, plain)
    assert not any("loss/" in key for key in state_of(run))


# What is refused.

FIXED = r"a list needs stages that are fixed, and partition\.strategy balanced looks for them; give one {}, or " \
        r"partition\.cuts"


@pytest.mark.parametrize("part", ["head", "loss"])
def test_a_list_and_stages_that_are_to_be_found_do_not_fit(part):
    balanced = {"stages": 3, "strategy": "balanced"}
    with pytest.raises(ConfigError, match=rf"^method\.{part}: {FIXED.format(part)}$"):
        config_of(method={part: LISTS[part]}, partition=balanced)
    config_of(method={part: LISTS[part]}, partition={"cuts": ["1", "3"], "strategy": "balanced"})
    config_of(method={part: LISTS[part][:1] * len(LISTS[part])}, partition=balanced)


@pytest.mark.parametrize(("method", "message"), [
    ({"head": ["conv", "conf"]}, r"method\.head\.1\.name: unknown 'conf' \(did you mean 'conv'\?\); one of blocks, .* "
                                 r"or method\.head\.1\.target for your own"),
    ({"head": ["conv", {"name": "blocks", "args": {"count": 0}}]}, r"method\.head\.1: ValueError: count 0 must be .*"),
    ({"head": ["conv", {"target": "test_per_stage:wrong_head"}]},
     r"method\.head\.1: after block 3 it gives \[16, 6\] of \[16, 8, 4, 4\]; it must give \[16, 4\], the logits; give "
     r"a method\.head\.1\.target that does"),
    ({"head": ["conv", {"target": "test_per_stage:failing_head"}]},
     r"method\.head\.1 \(after block 3\) cannot take an input of shape \[16, 8, 4, 4\].*"),
    ({"loss": ["supcon", {"name": "pred_sim", "args": {"beta": 2}}, "supcon"]},
     r"method\.loss\.1: ValueError: beta 2 must be from 0 to 1 \(with args \{'beta': 2\}\)"),
    ({"loss": ["supcon", {"target": "test_per_stage:own_loss"}, "supcon"]},
     r"method\.loss\.1: RuntimeError for logits \[2, 4\] and targets int64 \[2\]: .*"),
])
def test_what_is_wrong_with_a_part_of_a_list_is_said_with_its_place(method, message):
    with pytest.raises(ConfigError) as caught:
        plan_of(method=method)
    assert re.fullmatch(message, str(caught.value)), caught.value


def wrong_head(boundary):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(boundary.features, boundary.classes + 2))


def failing_head(boundary):
    return nn.Linear(7, boundary.classes)


# What is saved.

def test_losses_are_saved_by_the_block_before_them_and_a_resumed_run_goes_on_with_them(tmp_path, monkeypatch):
    tree = small_config("run", method=LISTS, train__epochs=2, checkpoint__every_epochs=1)
    whole = train_locally(tree, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_second_save(patch)
        with pytest.raises(KeyboardInterrupt):
            train_locally(tree, tmp_path)
    train_run(parse_config(tree | {"runtime": {"device": "cpu", "runs": str(tmp_path / "local")}}), auto_resume=True)
    assert_same_run(whole, tmp_path / "local/run")
    state = state_of(whole)
    own = {key: tuple(tensor.shape) for key, tensor in state.items() if key.startswith("loss/")}
    assert own == {"loss/1/projection.fc1.weight": (6, 6), "loss/1/projection.fc1.bias": (6,),
                   "loss/1/projection.fc2.weight": (128, 6), "loss/1/projection.fc2.bias": (128,),
                   "loss/3/projection.conv.weight": (8, 8, 3, 3)}
    assert {f"optimizer/{key}/momentum_buffer" for key in own} <= state.keys()
    assert evaluate_run(whole)[0]["blocks"] == ["0", "1"]


def test_lists_change_with_the_number_of_stages_alone(tmp_path, capsys):
    run = train_locally(small_config("run", method=LISTS | {"link": {"weight": [1.0, 0.5]}}, train__epochs=1), tmp_path)
    others = ["method.loss=[supcon, cross_entropy]", "method.link.weight=0.5", "method.head=[conv]"]
    train_run(resumed_config(run, ["partition={stages: 2}", "train.epochs=2", *others]), resume_from=run)
    assert "note: method.link.weight: 0.5, was (1.0, 0.5) before" in capsys.readouterr().out
    for key, value in (("head", "mlp_sr"), ("loss", "pred_sim")):
        with pytest.raises(ConfigError, match=rf"^method\.{key}: .* set it back, or train anew"):
            train_run(resumed_config(run, [f"method.{key}={value}", "train.epochs=3"]), resume_from=run)
    with pytest.raises(ConfigError, match=r"^method\.link\.weight: 0\.7, but 0\.5 in "):
        train_run(resumed_config(run, ["partition={stages: 1}", "method.head=conv", "method.loss=[cross_entropy]",
                                       "method.link.weight=0.7", "train.epochs=3"]), resume_from=run)


# What it costs.

NET = {"name": "mlp", "args": {"hidden": [8, 8, 8], "batch_norm": False}}


def test_a_block_is_followed_by_the_head_and_the_loss_of_its_stage():
    network = network_of(model=NET, method=LISTS | {"head": ["linear", HEADS[1]]},
                         partition={"cuts": ["layer2", "layer3"]})
    assert network.stage_of_block == [0, 1, 2, 2]
    linear, mlp_sr = 8 * 4 + 4, (8 * 8 + 8) + 2 * 8 + (8 * 4 + 4)
    supcon, pred_sim = (8 * 8 + 8) + (8 * 128 + 128), 8 * 8
    assert [head.params for head in profile(network, CPU).heads] == [
        linear + supcon, mlp_sr + pred_sim, mlp_sr, 0]


def test_a_stage_is_rehearsed_with_its_own_head_and_loss():
    heads = {"head": ["linear", {"name": "conv", "args": {"hidden": 256}}], "loss": ["supcon", "pred_sim", "supcon"]}
    cuts = {"cuts": ["layer2", "layer3"]}
    listed, second, first = (Rehearsal(network_of(model=NET, partition=cuts, method=method), CPU).peak_bytes(1, 2)
                             for method in (heads, {"head": heads["head"][1], "loss": "pred_sim"},
                                            {"head": "linear", "loss": "supcon"}))
    assert listed == second != first


class Table:
    """A loss that is no module and holds a tensor."""

    def __init__(self):
        self.weight = torch.ones(4)

    def __call__(self, logits, targets):
        return F.cross_entropy(logits, targets, self.weight)


def test_a_loss_that_holds_a_tensor_as_it_likes_can_be_forecast():
    network = network_of(model=NET, method={"head": "linear", "loss": {"target": "test_per_stage:Table"}})
    costs = profile(network, CPU)
    assert [head.params for head in costs.heads] == [36, 36, 36, 0]
    assert costs.heads[0] == costs.heads[1]


def test_a_list_of_the_same_can_be_balanced():
    network = network_of(model=NET, method={"head": ["linear"] * 2, "loss": ["supcon"] * 3},
                         partition={"stages": 3, "strategy": "balanced"})
    assert network.stage_of_block == [0] * 4
    settled = settle(network.config, network, profile(network, CPU))
    assert len(make_plan(settled, network.data, network).stages) == 3


def test_a_method_for_other_stages_takes_their_heads_and_losses():
    method = MethodConfig.model_validate(LISTS)
    other = method.with_parts_of([0, 0, 2, 1])
    assert [other.stage_head(k) for k in range(3)] == [method.head[0], method.head[0], method.head[1]]
    assert [other.stage_loss(k).name for k in range(4)] == ["supcon", "supcon", "cross_entropy", "pred_sim"]
    assert MethodConfig().with_parts_of([0, 1]) == MethodConfig()
