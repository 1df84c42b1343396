"""Models of Conv1d: what their heads and losses read, and that they learn."""

import pytest
import torch
from conftest import metrics_of, small_config, train_locally
from torch import nn

from blpipe.boundary import Boundary
from blpipe.config import HeadConfig, LossConfig
from blpipe.config_file import parse_config
from blpipe.heads import ToTokens, build_head
from blpipe.losses import build_loss
from blpipe.plan import make_network, make_plan
from blpipe.specs import DataSpec

HEADS, LOSSES = ("linear", "conv", "mlp_sr", "blocks"), ("pred_sim", "supcon")
LATER = ((7, 6), (7, 8), (3,))


def net(classes=4, channels=(16, 16, 16)):
    def block(channels_in, channels, kernel=7):
        return nn.Sequential(nn.Conv1d(channels_in, channels, kernel, padding=kernel // 2), nn.BatchNorm1d(channels),
                             nn.ReLU())
    return [block(*pair) for pair in zip((1, *channels), channels, strict=False)] + [
        nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels[-1], classes))]


def positions_net(classes=4):
    """Of signals, a label for every moment."""
    return [nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1), nn.Sequential(ToTokens(), nn.Linear(8, 4))]


def untold_net():
    """No layer tells where channels are."""
    return [nn.Unflatten(2, (4, 8)), nn.Flatten(2), nn.Sequential(nn.Flatten(), nn.Linear(32, 4))]


def filters_net():
    """Of signals, other signals."""
    return [nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)]


def frequencies(samples=256, length=32):
    """The class is the frequency of a wave, whose phase is random: at each moment the mean of every class is 0."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        labels, phase = torch.arange(count) % 4, torch.rand(count, 1, 1, generator=generator)
        turns = (1 + 2 * labels[:, None, None]) * torch.arange(length) / length + phase
        noise = 0.1 * torch.randn(count, 1, length, generator=generator)
        return torch.sin(2 * torch.pi * turns) + noise, labels
    return split(samples), split(64)


def boundaries(target, data=None, **args):
    config = parse_config({"name": "a", "model": {"target": f"test_conv1d:{target}", "args": args},
                           "partition": {"stages": 2}, "train": {"batch_size": 4}})
    return make_network(config, data or DataSpec((1, 32), "float32", (), 4, 8, 8)).boundaries


def test_the_layers_around_tell_signals_from_tokens():
    found = boundaries("net", channels=[16, 24, 32])
    assert [(b.shape, b.signal) for b in found] == [((16, 32), True), ((24, 32), True), ((32, 32), True), ((4,), False)]
    assert found[0].later == ((32, 24), (32, 32), (4,))
    assert not any(b.is_map for b in found)


def test_what_nothing_tells_of_is_tokens():
    assert [(b.shape, b.signal) for b in boundaries("untold_net")][1] == ((1, 32), False)


def test_every_moment_can_have_a_label():
    found = boundaries("positions_net", DataSpec((1, 32), "float32", (32,), 4, 8, 8))
    assert [(b.signal, b.per_token, b.features) for b in found[:-1]] == [(True, True, 8)] * 2
    assert not found[-1].signal


def test_a_model_that_gives_values_of_signals_has_heads_along_the_time_of_each_channel():
    data = DataSpec((8, 16), "float32", (8, 16), 16, 8, 8, "float32")
    assert [(b.signal, b.per_token, b.features) for b in boundaries("filters_net", data)] == [(False, True, 16)] * 3


@pytest.mark.parametrize("target_shape", [(), (7,)])
@pytest.mark.parametrize("name", HEADS)
def test_heads_read_a_signal_as_tokens(name, target_shape):
    def head(shape, signal):
        return build_head(HeadConfig(name=name), Boundary(shape, 3, LATER, target_shape=target_shape, signal=signal),
                          0, "a")
    of_tokens, of_signal, x = head((7, 5), False), head((5, 7), True), torch.rand(4, 5, 7)
    assert of_tokens.state_dict().keys() == of_signal.state_dict().keys()
    assert torch.equal(of_signal(x), of_tokens(x.mT))
    assert 5 in {size for parameter in of_signal.parameters() for size in parameter.shape}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_read_a_signal_as_tokens(name):
    def loss(shape, signal):
        return build_loss(LossConfig(name=name), Boundary(shape, 3, LATER, signal=signal), 0, "a")
    logits, targets, x = torch.rand(4, 3), torch.tensor([0, 1, 2, 0]), torch.rand(4, 5, 7)
    assert torch.equal(loss((5, 7), True)(logits, targets, x), loss((7, 5), False)(logits, targets, x.mT))


def test_a_greedy_run_learns_frequencies_by_the_channels(tmp_path):
    tree = small_config("frequencies", model={"target": "test_conv1d:net"},
                        data={"target": "test_conv1d:frequencies"}, partition__stages=3,
                        method={"name": "greedy", "head": "linear"}, train__epochs=4)
    plan = make_plan(parse_config(tree), DataSpec((1, 32), "float32", (), 4, 256, 64))
    assert [plan.build_head(k).fc.in_features for k in (0, 1)] == [16, 16]
    last_epoch = metrics_of(train_locally(tree, tmp_path))[-3:]
    assert all(row[-1] > 0.9 for row in last_epoch)  # chance is 0.25
