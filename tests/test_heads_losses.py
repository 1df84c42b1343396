"""Heads from every kind of boundary to logits; the loss and its sums."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blpipe.config import HeadConfig, LossConfig
from blpipe.errors import ConfigError
from blpipe.heads import Boundary, build_head, conv, linear
from blpipe.losses import Tally, build_loss, cross_entropy

MAPS = [(4, 1, 1), (4, 1, 3), (4, 2, 2), (4, 3, 3), (4, 2, 8), (4, 8, 8)]
SHAPES = [*MAPS, (5, 4), (1, 4), (4,)]


def build(name="conv", boundary=None, seed=0, block="layer1", **args):
    boundary = boundary or Boundary((4, 4, 4), 3, ((8, 2, 2),))
    return build_head(HeadConfig(name=name, args=args), boundary, seed, block)


def build_target(target, **args):
    return build_head(HeadConfig(target=f"test_heads_losses:{target}", args=args), Boundary((4, 2, 2), 3), 0, "a")


# Heads and losses that the tests name as a target.

def own_head(boundary, size=1):
    return nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(boundary.shape[0] * 4, boundary.classes * size))


def own_text(*given):
    return "text"


def own_loss(power=2):
    return lambda logits, targets: (logits.sum(-1) - targets).abs().pow(power).mean()


# Heads.

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("later", [(), ((8, 2, 2), (10,)), ((10,),)])
@pytest.mark.parametrize("head", [linear, conv])
def test_heads_give_logits_at_every_kind_of_boundary(head, shape, later):
    assert head(Boundary(shape, 7, later))(torch.rand(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_heads_reach_their_input_with_a_gradient(name, shape):
    x = torch.rand(3, *shape, requires_grad=True)
    build(name, Boundary(shape, 7)).eval()(x)[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_linear_head_is_one_layer_on_the_mean_over_positions():
    for shape, positions in (((4, 3, 2), (2, 3)), ((5, 4), (1,)), ((4,), ())):
        head, x = linear(Boundary(shape, 7)), torch.rand(2, *shape)
        mean = x.mean(positions) if positions else x
        torch.testing.assert_close(head(x), F.linear(mean, head.fc.weight, head.fc.bias))


@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.parametrize("head", [linear, conv])
def test_heads_give_the_same_on_a_map_with_its_channels_last(head, shape):
    torch.manual_seed(0)
    first = head(Boundary(shape, 7, ((8, 2, 2),)))
    torch.manual_seed(0)
    last = head(Boundary((*shape[1:], shape[0]), 7, ((8, 2, 2),), channels_last=True))
    x = torch.rand(2, *shape)
    assert torch.equal(last(x.permute(0, 2, 3, 1)), first(x))


@pytest.mark.parametrize("head", [linear, conv])
def test_heads_give_logits_for_every_token_that_has_a_target(head):
    made, x = head(Boundary((5, 4), 7, target_shape=(5,))), torch.rand(2, 5, 4)
    out = made(x)
    assert out.shape == (2, 5, 7)
    torch.testing.assert_close(made(x[:, 2:3])[:, 0], out[:, 2])
    assert head(Boundary((6, 4), 7, target_shape=(5,)))(torch.rand(2, 6, 4)).shape == (2, 7)
    assert head(Boundary((4,), 7, target_shape=(4,)))(torch.rand(2, 4)).shape == (2, 7)


@pytest.mark.parametrize(("channels", "widest", "out", "stride"), [
    (16, 64, 32, 2), (32, 64, 64, 2), (64, 64, 64, 1),
    (32, 128, 64, 2), (64, 128, 128, 2), (128, 128, 128, 1),
    (48, 64, 64, 2)])
def test_the_conv_head_goes_where_the_network_goes(channels, widest, out, stride):
    size = 32 * 16 // channels
    head = conv(Boundary((channels, size, size), 10, ((widest, 8, 8), (10,))))
    assert (head.conv.in_channels, head.conv.out_channels, head.conv.stride) == (channels, out, (stride, stride))
    assert (head.bn.num_features, head.fc1.in_features, head.fc1.out_features) == (out, out, 128)
    assert (head.conv.kernel_size, head.conv.padding, head.conv.bias) == ((3, 3), (1, 1), None)


@pytest.mark.parametrize(("size", "stride"), [((1, 1), 1), ((2, 2), 1), ((2, 9), 1), ((3, 3), 2), ((4, 4), 2)])
def test_the_conv_head_makes_no_map_below_2_by_2(size, stride):
    head = conv(Boundary((4, *size), 10, ((8, 1, 1),)))
    assert head.conv.stride == (stride, stride)


def test_the_conv_head_does_not_narrow_and_ignores_what_is_no_map():
    assert conv(Boundary((16, 8, 8), 10, ((8, 8, 8), (999,), (5, 999)))).conv.out_channels == 16


def test_the_conv_head_has_no_convolution_where_there_is_no_map():
    for shape in ((5, 4), (4,)):
        head = conv(Boundary(shape, 10, ((64, 8, 8),)), hidden=6)
        assert [name for name, _ in head.named_children()] == ["pool", "fc1", "relu1", "fc2"]
        assert (head.fc1.in_features, head.fc1.out_features) == (4, 6)


@pytest.mark.parametrize(("name", "args", "message"), [
    ("conf", {}, r"^method\.head\.name: unknown 'conf' \(did you mean 'conv'\?\); one of .*conv, linear"),
    ("conv", {"width": 1}, r"^method\.head\.args: got an unexpected keyword argument 'width'; it takes hidden$"),
    ("linear", {"hidden": 1}, r"^method\.head\.args: got an unexpected keyword argument 'hidden'; it takes no arg"),
    ("conv", {"hidden": 0}, r"^method\.head: ValueError: hidden 0 must be at least 1 \(with args \{'hidden': 0\}\)$"),
])
def test_a_head_that_cannot_be_built_is_refused(name, args, message):
    with pytest.raises(ConfigError, match=message):
        build(name, **args)


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4)])
def test_a_boundary_of_another_kind_is_refused(name, shape):
    with pytest.raises(ConfigError, match=r"no map, tokens or features; give a target of your own"):
        build(name, Boundary(shape, 7))


def test_a_head_of_the_users_own_gets_the_boundary_and_its_args():
    head = build_target("own_head", size=2)
    assert head(torch.rand(5, 4, 2, 2)).shape == (5, 6)
    assert not head[1].inplace


def test_a_target_that_makes_no_module_is_refused():
    with pytest.raises(ConfigError, match=r"^method\.head\.target: it returned a str; return an nn\.Module$"):
        build_target("own_text")


def test_a_head_is_a_function_of_the_seed_and_of_the_block_it_follows():
    def weight(seed=0, block="layer1"):
        return build(seed=seed, block=block).fc1.weight
    first = weight()
    torch.manual_seed(3)
    assert torch.equal(weight(), first)
    assert not torch.equal(weight(block="layer2"), first)
    assert not torch.equal(weight(seed=1), first)


def test_building_a_head_leaves_the_global_random_stream_untouched():
    before = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), before)


# Losses.

@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 2)])
def test_cross_entropy_is_torchs_averaged_over_batch_and_positions(shape, label_smoothing):
    logits, targets = torch.randn(*shape, 5), torch.randint(5, shape)
    loss = build_loss(LossConfig(args={"label_smoothing": label_smoothing}))(logits, targets)
    reference = nn.CrossEntropyLoss(label_smoothing=label_smoothing)(logits.movedim(-1, 1), targets)
    torch.testing.assert_close(loss, reference)


def test_cross_entropy_by_hand():
    loss = cross_entropy()(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 0]))
    torch.testing.assert_close(loss, (torch.tensor(2.0).log() + torch.tensor(-2.0).exp().log1p()) / 2)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.1, float("nan")])
def test_label_smoothing_out_of_range_is_refused(label_smoothing):
    with pytest.raises(ConfigError, match=r"^method\.loss: ValueError: label_smoothing .* must be from 0 to 1 \(with "):
        build_loss(LossConfig(args={"label_smoothing": label_smoothing}))


@pytest.mark.parametrize(("loss", "message"), [
    ({"name": "cross_entrophy"}, r"^method\.loss\.name: unknown 'cross_entrophy' \(did you mean 'cross_entropy'\?\)"),
    ({"args": {"smoothing": 0.1}}, r"^method\.loss\.args: .*'smoothing'; it takes label_smoothing$"),
    ({"target": "test_heads_losses:own_text"}, r"^method\.loss\.target: it returned a str; return a function of "),
])
def test_a_loss_that_cannot_be_built_is_refused(loss, message):
    with pytest.raises(ConfigError, match=message):
        build_loss(LossConfig.model_validate(loss))


def test_a_loss_of_the_users_own_is_built_with_its_args():
    loss = build_loss(LossConfig(target="test_heads_losses:own_loss", args={"power": 1}))
    assert loss(torch.ones(2, 3), torch.tensor([0, 1])) == 2.5


# The tally.

def test_an_empty_tally_has_no_loss_and_no_accuracy():
    assert (Tally().loss, Tally().accuracy) == (None, None)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), positions=st.sampled_from([(), (3,), (2, 2)]),
       seed=st.integers(0, 99))
def test_a_tally_counts_as_a_loop_over_all_samples_would(sizes, positions, seed):
    generator, tally = torch.Generator().manual_seed(seed), Tally()
    losses, hits = [], []
    for size in sizes:
        logits = torch.randn(size, *positions, 4, generator=generator)
        targets = torch.randint(4, (size, *positions), generator=generator)
        tally.add(cross_entropy()(logits, targets), logits, targets)
        losses += [float(cross_entropy()(logits[i:i + 1], targets[i:i + 1])) for i in range(size)]
        hits += [max(range(4), key=row.__getitem__) == target for row, target in
                 zip(logits.reshape(-1, 4).tolist(), targets.flatten().tolist(), strict=True)]
    assert tally.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert tally.accuracy == sum(hits) / len(hits)


def test_a_tally_keeps_no_graph():
    logits, tally = torch.randn(2, 3, requires_grad=True), Tally()
    tally.add(cross_entropy()(logits, torch.tensor([0, 1])), logits, torch.tensor([0, 1]))
    assert not tally._loss.requires_grad
