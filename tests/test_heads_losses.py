"""Heads from every kind of boundary to logits; the loss and its sums."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from blpipe.boundary import Boundary, Pixels
from blpipe.config import HeadConfig, LossConfig
from blpipe.errors import ConfigError
from blpipe.heads import PoolToFeatures, ToPixels, blocks, build_head, conv, linear, mlp_sr
from blpipe.losses import build_loss, cross_entropy
from blpipe.tally import Tally

MAPS = [(4, 1, 1), (4, 1, 3), (4, 2, 2), (4, 3, 3), (4, 2, 8), (4, 8, 8)]
SHAPES = [*MAPS, (5, 4), (1, 4), (4,)]
HEADS = [linear, conv, mlp_sr, blocks]


def build(name="conv", boundary=None, seed=0, block="layer1", **args):
    boundary = boundary or Boundary((4, 4, 4), 3, ((8, 2, 2),))
    return build_head(HeadConfig(name=name, args=args), boundary, seed, block)


def build_target(target, **args):
    return build_head(HeadConfig(target=f"test_heads_losses:{target}", args=args), Boundary((4, 2, 2), 3), 0, "a")


def loss_of(**config):
    return build_loss(LossConfig.model_validate(config), Boundary((4, 2, 2), 3, ((3,),)), 0, "a")


def shapes_of(head):
    """What is in a head, in order: the type and the sizes of each layer."""
    def sizes(layer):
        if isinstance(layer, nn.Conv2d):
            return (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                    layer.bias is not None)
        known = {nn.Linear: ("in_features", "out_features"), nn.BatchNorm2d: ("num_features",),
                 nn.BatchNorm1d: ("num_features",), nn.LayerNorm: ("normalized_shape",),
                 nn.AdaptiveAvgPool2d: ("output_size",)}.get(type(layer), ())
        return tuple(getattr(layer, name) for name in known)
    return [(type(layer), *sizes(layer)) for layer in head]


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
@pytest.mark.parametrize("head", HEADS)
def test_heads_give_logits_at_every_kind_of_boundary(head, shape, later):
    assert head(Boundary(shape, 7, later))(torch.rand(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [head.__name__ for head in HEADS])
def test_heads_reach_their_input_with_a_gradient(name, shape):
    torch.manual_seed(1)
    x = torch.rand(3, *shape, requires_grad=True)
    build(name, Boundary(shape, 7)).eval()(x)[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_linear_head_is_one_layer_on_the_mean_over_positions():
    for shape, positions in (((4, 3, 2), (2, 3)), ((5, 4), (1,)), ((4,), ())):
        head, x = linear(Boundary(shape, 7)), torch.rand(2, *shape)
        mean = x.mean(positions) if positions else x
        torch.testing.assert_close(head(x), F.linear(mean, head.fc.weight, head.fc.bias))


@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.parametrize("head", HEADS)
def test_heads_give_the_same_on_a_map_with_its_channels_last(head, shape):
    torch.manual_seed(0)
    first = head(Boundary(shape, 7, ((8, 2, 2),)))
    torch.manual_seed(0)
    last = head(Boundary((*shape[1:], shape[0]), 7, ((8, 2, 2),), channels_last=True))
    x = torch.rand(2, *shape)
    assert torch.equal(last(x.permute(0, 2, 3, 1)), first(x))


@pytest.mark.parametrize("head", HEADS)
def test_heads_give_logits_for_every_token_that_has_a_target(head):
    made, x = head(Boundary((5, 4), 7, target_shape=(5,))), torch.rand(2, 5, 4)
    out = made(x)
    assert out.shape == (2, 5, 7)
    torch.testing.assert_close(made(x[:, 2:3])[:, 0], out[:, 2])
    assert head(Boundary((6, 4), 7, target_shape=(5,)))(torch.rand(2, 6, 4)).shape == (2, 7)
    assert head(Boundary((4,), 7, target_shape=(4,)))(torch.rand(2, 4)).shape == (2, 7)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", [(4, 6, 8), (4, 3, 4), (4, 1, 1)])
@pytest.mark.parametrize("head", HEADS)
def test_heads_give_what_the_model_gives_for_every_pixel(head, shape, last):
    pixels = Pixels(7, (6, 8), channels_last=last)
    boundary = Boundary(shape, 7, ((5, 3, 4), (6, 6, 8), (7, 6, 8)), target_shape=(6, 8), pixels=pixels)
    torch.manual_seed(0)
    made, x = head(boundary).eval(), torch.rand(2, *shape, requires_grad=True)
    out_BCHW = made(x).movedim(-1, 1) if last else made(x)
    assert out_BCHW.shape == (2, 7, 6, 8)
    out_BCHW[..., 0].square().sum().backward()
    assert x.grad[..., 0].any()
    assert not x.grad[..., -1].any() or shape == (4, 1, 1) or head in (blocks, mlp_sr)  # each pixel has its own
    assert not any(isinstance(layer, PoolToFeatures | nn.Linear) for layer in made.modules())


def test_heads_of_pixels_keep_the_resolution_and_blocks_go_down_and_up_with_the_network():
    pixels = Pixels(7, (8, 8), channels_last=True)
    later = ((6, 4, 4), (9, 2, 2), (6, 4, 4), (5, 8, 8), (7, 8, 8))
    boundary = Boundary((4, 8, 8), 7, later, target_shape=(8, 8), pixels=pixels)
    assert shapes_of(conv(boundary, 16)) == [*conv_bn_relu(4, 4), (nn.Conv2d, 4, 16, (1, 1), (1, 1), (0, 0), True),
                                             (nn.ReLU,), (nn.Conv2d, 16, 7, (1, 1), (1, 1), (0, 0), True), (ToPixels,)]
    assert shapes_of(blocks(boundary, 4)) == [
        *conv_bn_relu(4, 6, 3, (2, 2)), *conv_bn_relu(6, 9, 3, (2, 2)), (nn.Upsample,), *conv_bn_relu(9, 6),
        (nn.Upsample,), *conv_bn_relu(6, 5), (nn.Conv2d, 5, 7, (1, 1), (1, 1), (0, 0), True), (ToPixels,)]
    wide = Boundary((4, 8, 8), 7, ((6, 8, 16), (7, 8, 16)), pixels=Pixels(7, (8, 16), channels_last=True))
    assert [type(layer) for layer in blocks(wide, 1)][0] is nn.Upsample
    x = torch.rand(2, 3, 4, 4)
    expected = F.interpolate(x, (8, 8), mode="bilinear")
    assert torch.equal(ToPixels(pixels)(x), expected.permute(0, 2, 3, 1))
    assert torch.equal(ToPixels(Pixels(3, (4, 4), channels_last=False))(x), x)


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


def conv_bn_relu(channels_in, channels, size=3, stride=(1, 1)):
    return [(nn.Conv2d, channels_in, channels, (size, size), stride, (size // 2, size // 2), False),
            (nn.BatchNorm2d, channels), (nn.ReLU,)]


@pytest.mark.parametrize(("size", "quarter"), [((8, 8), (2, 2)), ((9, 5), (3, 2)), ((1, 3), (1, 1))])
def test_the_mlp_sr_head_reduces_a_map_then_convolves_then_has_layers(size, quarter):
    assert shapes_of(mlp_sr(Boundary((6, *size), 7))) == [
        (nn.AdaptiveAvgPool2d, quarter), *3 * conv_bn_relu(6, 6, 1), (nn.AdaptiveAvgPool2d, 2), (nn.Flatten,),
        *3 * [(nn.Linear, 24, 24), (nn.BatchNorm1d, 24), (nn.ReLU,)], (nn.Linear, 24, 7)]
    assert shapes_of(mlp_sr(Boundary((6, *size), 7), convs=1, layers=0)) == [
        (nn.AdaptiveAvgPool2d, quarter), *conv_bn_relu(6, 6, 1), (nn.AdaptiveAvgPool2d, 2), (nn.Flatten,),
        (nn.Linear, 24, 7)]


def test_the_mlp_sr_head_has_layers_alone_where_there_is_no_map():
    layers = [(nn.Linear, 4, 4), (nn.BatchNorm1d, 4), (nn.ReLU,)]
    for shape in ((5, 4), (4,)):
        assert shapes_of(mlp_sr(Boundary(shape, 7), layers=2)) == [(PoolToFeatures,), *2 * layers, (nn.Linear, 4, 7)]
    assert shapes_of(mlp_sr(Boundary((5, 4), 7, target_shape=(5,)), layers=1)) == [
        (nn.Linear, 4, 4), (nn.LayerNorm, (4,)), (nn.ReLU,), (nn.Linear, 4, 7)]


RESNET = (*[(16, 32, 32)] * 3, *[(32, 16, 16)] * 3, *[(64, 8, 8)] * 3, (10,))


@pytest.mark.parametrize(("index", "layers"), [
    # Of eight later maps the 3rd, the 6th and the last.
    (0, [*conv_bn_relu(16, 32, 3, (2, 2)), *conv_bn_relu(32, 64, 3, (2, 2)), *conv_bn_relu(64, 64)]),
    (3, [*conv_bn_relu(32, 64, 3, (2, 2)), *conv_bn_relu(64, 64)]),
    (6, [*conv_bn_relu(64, 64), *conv_bn_relu(64, 64)]),
    (7, conv_bn_relu(64, 64)),
    (8, []),
])
def test_the_blocks_head_repeats_later_maps_fewer_and_fewer(index, layers):
    boundary = Boundary(RESNET[index], 10, RESNET[index + 1:], index=index)
    assert shapes_of(blocks(boundary)) == [*layers, (PoolToFeatures,), (nn.Linear, 64, 10)]


@settings(deadline=None, max_examples=25)
@example(count=2, depth=9)
@given(count=st.integers(1, 6), depth=st.integers(2, 9))
def test_the_pyramid_falls_from_count_to_one_and_ends_with_the_last_map(count, depth):
    maps = tuple((4 + i, 2, 2) for i in range(depth - 1))
    numbers = []
    for index in range(depth - 1):
        made = [layer.out_channels for layer in blocks(Boundary(maps[index], 3, (*maps[index + 1:], (3,)), index=index),
                                                       count) if isinstance(layer, nn.Conv2d)]
        assert made == sorted(set(made))
        assert made[-1:] == [maps[-1][0]] * (index < depth - 2)
        numbers.append(len(made))
        share = Fraction(index, depth - 2) if index else 0
        assert numbers[-1] == min(int(count - (count - 1) * share + Fraction(1, 2)), depth - 2 - index)
    assert numbers == sorted(numbers, reverse=True)


@pytest.mark.parametrize(("size", "later", "stride", "comes_out"), [
    ((8, 8), (4, 2), (2, 4), (4, 2)), ((7, 7), (4, 4), (2, 2), (4, 4)), ((5, 3), (2, 2), (3, 2), (2, 2)),
    ((32, 32), (30, 30), (1, 1), (32, 32)), ((4, 4), (8, 8), (1, 1), (4, 4))])
def test_the_blocks_head_goes_to_about_the_later_resolution(size, later, stride, comes_out):
    head = blocks(Boundary((2, *size), 3, ((4, *later), (3,))))
    assert head.conv1.stride == stride
    assert head.conv1(torch.rand(1, 2, *size)).shape[2:] == comes_out


def test_the_blocks_head_repeats_tokens_and_flat_features_and_no_logits():
    tokens = ((5, 4), (5, 6), (5, 8), (8,), (7,))
    assert shapes_of(blocks(Boundary(tokens[0], 7, tokens[1:]))) == [
        (nn.LayerNorm, (4,)), (nn.Linear, 4, 6), (nn.GELU,), (nn.LayerNorm, (6,)), (nn.Linear, 6, 8), (nn.GELU,),
        (PoolToFeatures,), (nn.Linear, 8, 7)]
    per_token = Boundary((5, 4), 7, ((5, 6), (5, 7)), target_shape=(5,))
    assert shapes_of(blocks(per_token)) == [(nn.LayerNorm, (4,)), (nn.Linear, 4, 6), (nn.GELU,), (nn.Linear, 6, 7)]
    assert shapes_of(blocks(Boundary((4,), 7, ((6,), (7,), (7,))), count=9)) == [
        (nn.Linear, 4, 6), (nn.ReLU,), (nn.Linear, 6, 7), (nn.ReLU,), (PoolToFeatures,), (nn.Linear, 7, 7)]


@pytest.mark.parametrize(("name", "args", "message"), [
    ("mlp_sr", {"convs": -1}, r"^method\.head: ValueError: convs -1 must be at least 0 \(with args \{'convs': -1\}\)$"),
    ("mlp_sr", {"layers": -1}, r"^method\.head: ValueError: layers -1 must be at least 0 "),
    ("mlp_sr", {"hidden": 1}, r"^method\.head\.args: .*'hidden'; it takes convs, layers$"),
    ("blocks", {"count": 0}, r"^method\.head: ValueError: count 0 must be at least 1 "),
    ("blocks", {"counts": 1}, r"^method\.head\.args: .*'counts'; it takes count$"),
    ("conf", {}, r"^method\.head\.name: unknown 'conf' \(did you mean 'conv'\?\); one of blocks, conv, linear, mlp_sr"),
    ("conv", {"width": 1}, r"^method\.head\.args: got an unexpected keyword argument 'width'; it takes hidden$"),
    ("linear", {"hidden": 1}, r"^method\.head\.args: got an unexpected keyword argument 'hidden'; it takes no arg"),
    ("conv", {"hidden": 0}, r"^method\.head: ValueError: hidden 0 must be at least 1 \(with args \{'hidden': 0\}\)$"),
])
def test_a_head_that_cannot_be_built_is_refused(name, args, message):
    with pytest.raises(ConfigError, match=message):
        build(name, **args)


@pytest.mark.parametrize("name", [head.__name__ for head in HEADS])
@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4)])
def test_a_boundary_of_another_kind_is_refused(name, shape):
    with pytest.raises(ConfigError, match=r"no map, tokens or features; give a target of your own"):
        build(name, Boundary(shape, 7))


def test_a_head_of_the_users_own_gets_the_boundary_and_its_args():
    head = build_target("own_head", size=2)
    assert head(torch.rand(5, 4, 2, 2)).shape == (5, 6)
    assert not head[1].inplace


def test_a_target_that_makes_no_module_is_refused():
    with pytest.raises(ConfigError, match=r"^method\.head: it returned a str; return an nn\.Module$"):
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
    loss = loss_of(args={"label_smoothing": label_smoothing})(logits, targets, None)
    reference = nn.CrossEntropyLoss(label_smoothing=label_smoothing)(logits.movedim(-1, 1), targets)
    torch.testing.assert_close(loss, reference)


def test_cross_entropy_by_hand():
    loss = cross_entropy()(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 0]))
    torch.testing.assert_close(loss, (torch.tensor(2.0).log() + torch.tensor(-2.0).exp().log1p()) / 2)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.1, float("nan")])
def test_label_smoothing_out_of_range_is_refused(label_smoothing):
    with pytest.raises(ConfigError, match=r"^method\.loss: ValueError: label_smoothing .* must be from 0 to 1 \(with "):
        loss_of(args={"label_smoothing": label_smoothing})


@pytest.mark.parametrize(("loss", "message"), [
    ({"name": "cross_entrophy"}, r"^method\.loss\.name: unknown 'cross_entrophy' \(did you mean 'cross_entropy'\?\)"),
    ({"args": {"smoothing": 0.1}}, r"^method\.loss\.args: .*'smoothing'; it takes label_smoothing$"),
    ({"target": "test_heads_losses:own_text"}, r"^method\.loss: it returned a str; return a function of "),
])
def test_a_loss_that_cannot_be_built_is_refused(loss, message):
    with pytest.raises(ConfigError, match=message):
        loss_of(**loss)


def test_a_loss_of_the_users_own_is_built_with_its_args():
    loss = loss_of(target="test_heads_losses:own_loss", args={"power": 1})
    assert loss(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(2, 4)) == 2.5


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
    assert not tally.loss_sum.requires_grad


def test_targets_that_are_left_out_are_not_counted():
    tally, logits = Tally(), torch.eye(3).expand(2, 3, 3).contiguous()  # the largest are 0, 1 and 2
    targets = torch.tensor([[0, 1, -100], [-100, 0, 2]])
    loss = cross_entropy()(logits, targets)
    kept = targets != -100
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[kept], targets[kept]))
    tally.add(loss, logits, targets)
    assert tally.accuracy == 3 / 4
    assert Tally.of(tally.state()).accuracy == 3 / 4
    assert cross_entropy(label_smoothing=0.1)(logits, torch.full((2, 3), -100)) == 0.0
    assert tally.loss == pytest.approx(float(loss))
