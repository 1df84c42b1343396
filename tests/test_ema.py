"""Moving averages of the weights: what they are, and that they are what is evaluated, saved and exported."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import metrics_of, small_config, state_of, train_locally
from models_under_test import conv_net
from test_checkpoints import go_on, rewound, saved_config
from test_cli import evaluated, run, shown
from test_forecast import CPU, small_resnet
from test_reference import batches, prepared
from test_stage import make_stage, microbatch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from blpipe.checkpoint.folders import checkpoints
from blpipe.checkpoint.state import read
from blpipe.config_file import parse_config
from blpipe.ema import Average
from blpipe.engines.build import build_stage
from blpipe.errors import ConfigError
from blpipe.forecast.costs import profile
from blpipe.forecast.memory import Rehearsal, estimated_bytes
from blpipe.metrics import read_rows
from blpipe.plan import make_plan


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the run `averaged`, whose every checkpoint is kept, and `plain`, the same without averages."""
    folder = tmp_path_factory.mktemp("ema")
    torch.set_num_threads(1)
    for name, ema in (("averaged", 0.9), ("plain", None)):
        train_locally(saved_config(name, train__ema=ema), folder)
    return folder / "local"


@pytest.fixture
def runs(trained, monkeypatch, tmp_path):
    """The same, from a working directory beside."""
    monkeypatch.chdir(tmp_path)
    return trained


# What an average is.

def test_it_is_that_of_a_hand_written_loop(tmp_path):
    """Of a frozen parameter none is kept; BatchNorm's statistics are averaged, what it counts is not."""
    tree = small_config("run", partition__stages=1, model={"target": "test_ema:partly_frozen_net"}, train__ema=0.4)
    config, data, plan = prepared(tree)
    model, decays = plan.model, []
    averages = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for t, (x, y) in enumerate(batches(config, data)):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        decays.append(min(0.4, (1 + t) / (10 + t)))
        for name, tensor in model.state_dict().items():
            averages[name] = decays[-1] * averages[name] + (1 - decays[-1]) * tensor if tensor.is_floating_point() \
                else tensor
    assert decays == sorted(decays)
    assert (decays[0], decays[-2:]) == (0.1, [0.4, 0.4])
    state, metrics = state_of(found := train_locally(tree, tmp_path)), metrics_of(found)
    kept = {key.removeprefix("ema/model/") for key in state if key.startswith("ema/")}
    assert kept == {name for name in averages if not name.startswith("0.0.") and "tracked" not in name}
    for name in kept:
        torch.testing.assert_close(state[f"ema/model/{name}"], averages[name], msg=lambda m, n=name: f"{n}: {m}")
    model.load_state_dict(averages)
    model.eval()
    with torch.no_grad():
        losses = torch.cat([F.cross_entropy(model(x), y, reduction="none") for x, y in data.test_batches(16)])
    assert metrics[-1][-2] == pytest.approx(losses.mean().item(), rel=1e-5)


def partly_frozen_net():
    net = conv_net(dropout=0.0)
    net[0][0].requires_grad_(False)
    return nn.Sequential(nn.Sequential(net[0][0]), *net[0][1:], *net[1:])


class Masked(nn.Module):
    """A constant mask of −∞, another that no checkpoint holds, and a weight under two names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.again = self.weight
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("scale", torch.full((), 0.1), persistent=False)

    def forward(self, x):
        return ((x @ self.weight) * self.scale + self.mask[-1]) @ self.again


def twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.BatchNorm1d(4), layer)


@pytest.mark.parametrize("make", [
    Masked, twice, lambda: nn.Sequential(Masked(), twice()), lambda: weight_norm(nn.Linear(4, 4)),
    lambda: nn.LSTM(4, 3), nn.Identity])
def test_it_computes_what_the_module_does_with_these_weights_and_leaves_it_alone(make):
    torch.manual_seed(0)
    module = make()
    average, x = Average(module, 0.5), torch.randn(5, 4)
    for _ in range(20):  # the decay of this many steps is 0.5
        module.train()(x)
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        average.advance()
    plain = copy.deepcopy(module)
    plain.load_state_dict(copy.deepcopy(module.state_dict()) | average.tensors)
    before = dict(module.named_parameters())
    module.eval()
    found, expected = average(x), plain.eval()(x)
    assert torch.equal(*(each[0] if isinstance(each, tuple) else each for each in (found, expected)))
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    if before:
        assert any(not torch.equal(tensor, plain.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_what_is_constant_stays_as_it_is_to_the_last_bit():
    module = Masked()
    module.register_buffer("table", torch.rand(100))
    average = Average(module, 0.999)
    for _ in range(50):
        average.advance()
    for name, tensor in module.state_dict().items():
        assert torch.equal(average.tensors[name], tensor), name


def test_a_tiny_decay_makes_it_the_weights_themselves(tmp_path):
    state = state_of(train_locally(small_config("run", train__ema=1e-30, train__epochs=1), tmp_path))
    averages = {key.removeprefix("ema/"): tensor for key, tensor in state.items() if key.startswith("ema/")}
    assert {key.split("/")[0] for key in averages} == {"model", "head"}
    assert all(torch.equal(tensor, state[key]) for key, tensor in averages.items())


def test_a_step_that_is_skipped_does_not_advance_it():
    stage = make_stage(skip_nonfinite=True, ema=0.9)
    stage.train(True)
    for seed, poison in ((0, 1.0), (1, torch.nan), (2, 1.0)):
        before = {name: tensor.clone() for average in stage.update.averages.values()
                  for name, tensor in average.tensors.items()}
        x, targets = microbatch(seed)
        stage.forward(x * poison)
        stage.local_backward(targets, 1.0)
        stage.step(seed, 1.0)
        after = {name: tensor for average in stage.update.averages.values() for name, tensor in average.tensors.items()}
        assert all(torch.equal(before[name], after[name]) for name in after) == (poison != 1.0)
    assert [average.steps for average in stage.update.averages.values()] == [2, 2]


# What takes it.

def test_training_goes_on_with_the_weights_as_without(runs):
    averaged, plain = state_of(runs / "averaged"), state_of(runs / "plain")
    assert not any(key.startswith("ema") for key in plain)
    assert {key: tensor for key, tensor in averaged.items() if not key.startswith("ema")}.keys() == plain.keys()
    assert all(torch.equal(averaged[key], tensor) for key, tensor in plain.items())
    assert [row[:5] for row in metrics_of(runs / "averaged")] == [row[:5] for row in metrics_of(runs / "plain")]


def test_training_and_eval_evaluate_it_and_raw_the_weights(runs, capsys):
    mine, others = (read_rows(runs / name)[-3:] for name in ("averaged", "plain"))
    assert shown(mine) != shown(others)
    assert all(one["val_loss"] != other["val_loss"] for one, other in zip(mine, others, strict=True))
    assert evaluated(capsys, str(runs / "averaged")) == shown(mine)
    assert evaluated(capsys, str(runs / "averaged"), "--raw") == shown(others)
    assert evaluated(capsys, str(runs / "plain"), "--raw") == shown(others)
    assert run("eval", str(runs / "averaged"), "train.ema=0.5") == 2
    assert capsys.readouterr().err.startswith("blpipe: train.ema: is the checkpoint's own; eval takes data, ")


def test_export_writes_it_and_raw_the_weights(runs, capsys):
    exported = {}
    for name, words in (("averaged", ["averaged"]), ("raw", ["averaged", "--raw"]), ("plain", ["plain"])):
        assert run("export", str(runs / words[0]), *words[1:], "--out", f"{name}.pt") == 0
        exported[name] = torch.load(f"{name}.pt", weights_only=True)
        conv_net().load_state_dict(exported[name], strict=True)
    state = state_of(runs / "averaged")
    for name, tensor in exported["plain"].items():
        assert torch.equal(exported["raw"][name], tensor)
        assert torch.equal(exported["averaged"][name], state.get(f"ema/model/{name}", tensor))
    assert not torch.equal(exported["averaged"]["0.0.weight"], exported["raw"]["0.0.weight"])


def test_every_name_of_a_weight_has_it(tmp_path, monkeypatch):
    """A layer that is there twice, and a tensor that two layers have."""
    monkeypatch.chdir(tmp_path)
    for net, names in (("TwiceTheSame", ("again.weight",)), ("tied_net", ("b.weight", "d.weight"))):
        found = train_locally(small_config(net, model={"target": f"models_under_test:{net}"}, partition__stages=1,
                                           train__epochs=1, train__ema=0.9), tmp_path)
        assert run("export", str(found), "--out", f"{net}.pt") == 0
        exported, state = torch.load(f"{net}.pt", weights_only=True), state_of(found)
        for name in names:
            assert torch.equal(exported[name], exported[names[0]])
            assert not torch.equal(exported[name], state[f"model/{name}"])


def test_another_run_begins_with_it(runs, tmp_path):
    tuned = train_locally(saved_config("tuned", 1, partition={"stages": 2}, train__epochs=1, optimizer__lr=1e-12,
                                       optimizer__args={}, model__weights=str(runs / "averaged")), tmp_path)
    begun, state = read(checkpoints(tuned)[0], lambda key: True), state_of(runs / "averaged")
    for name in ("0.0.weight", "5.2.bias"):
        torch.testing.assert_close(begun[f"model/{name}"], state[f"ema/model/{name}"])


# How runs go on: see also METHODS of test_checkpoints.py.

def test_a_run_cannot_go_on_with_another_decay_or_begin_to_average(runs, tmp_path):
    for name, ema, said in (("plain", 0.9, "0.9, but none in"), ("averaged", "null", "none, but 0.9 in"),
                            ("averaged", 0.8, "0.8, but 0.9 in")):
        checkpoint = rewound(runs / name, 5, tmp_path / f"{name} {ema}")
        with pytest.raises(ConfigError, match=rf"^train\.ema: {said} .*; set it back, or train anew under another"):
            go_on(checkpoint, f"train.ema={ema}")


def test_in_other_stages_blocks_keep_theirs_and_new_heads_begin_anew(runs, tmp_path):
    """In mid-epoch; each head learns and is averaged from then on."""
    before = read(first := rewound(runs / "averaged", 5, tmp_path), lambda key: True)
    after = state_of(go_on(first, "partition={cuts: ['1', '3']}"))
    assert {key: int(steps) for key, steps in after.items() if key.startswith("ema_steps/")} == {
        **{f"ema_steps/model/{block}": 12 for block in range(6)}, "ema_steps/loss/5": 12, "ema_steps/head/5": 12,
        **{f"ema_steps/{part}/{block}": steps for part in ("head", "loss") for block, steps in ((0, 7), (2, 7))}}
    assert {int(steps) for key, steps in before.items() if key.startswith("ema_steps/")} == {5}


def test_a_model_that_it_cannot_be_put_into_is_refused():
    config = parse_config(small_config("run", model={"target": "test_parts:listed_net"}, partition={"stages": 2},
                                       method={"name": "greedy", "head": "linear"}, train__ema=0.9))
    with pytest.raises(ConfigError, match=r"^train\.ema: 0 in the stage 0 keeps a parameter in 'weights' too, .* or "
                                          r"leave train\.ema out$"):
        make_plan(config, prepared(small_config("data"))[1].spec)


@pytest.mark.parametrize("value", ["0", "1", "1.5", "true"])
def test_a_decay_is_between_0_and_1(value):
    with pytest.raises(ConfigError, match=r"^train\.ema: "):
        parse_config(small_config("run", train__ema=json.loads(value)))


def test_its_memory_is_foreseen():
    """To the byte, where nothing else is at the peak than without."""
    without, with_averages = (small_resnet(train__ema=ema) for ema in (None, 0.9))
    peaks = [Rehearsal(network, CPU).peak_bytes(2, 5) for network in (without, with_averages)]
    plan = make_plan(with_averages.config.model_copy(update={
        "partition": with_averages.config.partition.model_copy(update={
            "stages": 3, "cuts": (with_averages.block_names[2], with_averages.block_names[5])})}),
        with_averages.data, with_averages)
    averages = build_stage(plan, 1, CPU).update.averages.values()
    held = sum(tensor.nbytes for average in averages for tensor in average.tensors.values())
    assert peaks[1] - peaks[0] == held
    trained = sum(p.nbytes for block in with_averages.model[2:5] for p in block.parameters())
    estimates = [estimated_bytes(profile(network, CPU))[2, 5] for network in (without, with_averages)]
    assert estimates[1] - estimates[0] == trained
