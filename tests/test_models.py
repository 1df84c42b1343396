"""Models as named blocks: sizes, names, seeds, and what a user's own may return."""

import random
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from blpipe.config import ModelConfig
from blpipe.errors import ConfigError
from blpipe.models import build_model, mlp, resnet_cifar, vgg_cifar
from blpipe.models.build import as_blocks, out_of_place
from blpipe.specs import DataSpec

SPEC = DataSpec((2, 8, 8), "float32", (), 5, 20, 10)


def build(seed: int = 0, data: DataSpec = SPEC, **model) -> nn.Sequential:
    return build_model(ModelConfig.model_validate(model), data, seed)


def refused(match: str, **model) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        build(**model)
    assert "\n" not in str(caught.value)


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_children()]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Models that the tests name as a target.

def own_linear(size=3):
    return nn.Sequential(nn.Linear(size, size), nn.Linear(size, 5))


def own_inplace():
    return [nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), nn.Sequential(nn.Sequential(nn.ELU(inplace=True))),
            nn.Hardswish(inplace=True), nn.Dropout(inplace=True)]


def own_with_every_random_stream():
    model = own_linear()
    model[0].weight.data *= random.random() * np.random.rand()
    return model


def own_failure():
    torch.rand(3)
    raise RuntimeError("no\nluck")


RETURNED = {"none": None, "text": "ab", "empty list": [], "empty": nn.Sequential(),
            "numbers": [1, 2], "class": {"a": nn.ReLU}, "dots": {"a.b": nn.ReLU()}, "no name": {"": nn.ReLU()},
            "number names": {1: nn.ReLU()}, "taken name": {"training": nn.ReLU()}}


def own_compiled():
    return torch.compile(own_linear())


def own_lazy():
    return [nn.Flatten(), nn.LazyLinear(3)]


def own_changing_its_args(sizes):
    return nn.Sequential(nn.Flatten(), nn.Linear(sizes.pop(0), sizes.pop(0)))


def own_return(what):
    return RETURNED[what]


# The built-in models.

@pytest.mark.parametrize(("depth", "parameters"), [
    (20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)])
def test_resnets_have_the_known_parameter_counts(depth, parameters):
    with torch.device("meta"):
        assert count(resnet_cifar(depth)) == parameters


@pytest.mark.parametrize("depth", [8, 14, 20, 32])
def test_a_resnet_is_a_stem_three_layers_of_blocks_and_a_classifier(depth):
    n = (depth - 2) // 6
    model = resnet_cifar(depth, in_channels=1, classes=7)
    assert names(model) == ["stem", *(f"layer{i}_{j}" for i in (1, 2, 3) for j in range(n)), "classifier"]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth
    layers, before = 0, 16
    for width in (16, 32, 64):
        for _ in range(n):
            layers += 9 * before * width + 9 * width * width + 4 * width
            before = width
    assert count(model) == 9 * 16 + 2 * 16 + layers + 64 * 7 + 7
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 7)


def test_a_resnet_halves_its_maps_twice_and_doubles_its_channels():
    x, shapes = torch.rand(1, 3, 32, 32), []
    for block in resnet_cifar(14):
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2 + [(10,)]


def test_the_shortcut_of_a_resnet_subsamples_and_pads_with_zero_channels():
    block = resnet_cifar(8).eval().layer2_0
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 6, 6)
    out = block(x)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2])
    assert torch.equal(out[:, 16:], torch.zeros(2, 16, 3, 3))


@pytest.mark.parametrize("size", [7, 8, 9])
def test_a_resnet_takes_any_image_size(size):
    assert resnet_cifar(8)(torch.rand(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(("depth", "nearest"), [(18, 20), (16, 14), (2, 8), (0, 8), (-5, 8), (101, 98)])
def test_a_depth_that_no_resnet_has_is_refused_with_the_nearest(depth, nearest):
    with pytest.raises(ValueError, match=f"^depth {depth} is not 6n \\+ 2; the nearest is {nearest}$"):
        resnet_cifar(depth)


def test_width_scales_every_layer():
    assert resnet_cifar(8, width=0.5).classifier.fc.in_features == 32
    assert resnet_cifar(8, width=2).stem.conv.out_channels == 32
    assert vgg_cifar(11, width=0.125).classifier[-1].in_features == 64


@pytest.mark.parametrize(("model", "width"), [(resnet_cifar, 0.05), (resnet_cifar, -1), (vgg_cifar, 0.01)])
def test_a_width_that_leaves_no_channel_is_refused(model, width):
    with pytest.raises(ValueError, match=rf"^width {width} leaves -?\d+ channels; use at least 1/\d\d$"):
        model(width=width)


@pytest.mark.parametrize(("depth", "convolutions"), [(11, 8), (13, 10), (16, 13), (19, 16)])
def test_a_vgg_has_its_depths_convolutions_and_five_poolings(depth, convolutions):
    model = vgg_cifar(depth, width=1 / 64, in_channels=1, classes=7)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == convolutions == len(model) - 1
    assert kinds.count(nn.MaxPool2d) == 5
    assert names(model)[0] == "conv1_0"
    assert names(model)[-1] == "classifier"
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 7)


def test_a_vgg_with_hidden_layers_has_two_of_them():
    widths = [(m.in_features, m.out_features) for m in vgg_cifar(11, 1 / 64, hidden=6, dropout=0.5).classifier
              if isinstance(m, nn.Linear)]
    assert widths == [(8, 6), (6, 6), (6, 10)]


def test_a_vgg_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="^depth 12 is not one of 11, 13, 16, 19$"):
        vgg_cifar(12)


def test_an_mlp_has_a_block_for_each_hidden_layer():
    model = mlp([6, 4], dropout=0.5, in_shape=[2, 3, 3], classes=7)
    assert names(model) == ["layer1", "layer2", "classifier"]
    assert [type(m) for m in model.layer1] == [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(m) for m in mlp([6], batch_norm=False).layer1] == [nn.Flatten, nn.Linear, nn.ReLU]
    assert model(torch.rand(2, 2, 3, 3)).shape == (2, 7)


def test_an_mlp_without_hidden_layers_is_linear():
    assert mlp([], in_shape=[2, 3, 3])(torch.rand(2, 2, 3, 3)).shape == (2, 10)


def test_an_mlp_with_an_empty_layer_is_refused():
    with pytest.raises(ValueError, match=r"^hidden \[3, 0\] must be widths of at least 1$"):
        mlp([3, 0])


@pytest.mark.parametrize("model", [resnet_cifar(8), vgg_cifar(11, 1 / 64), mlp([4, 4], in_shape=[3, 32, 32])])
def test_the_blocks_one_after_the_other_are_the_model(model):
    x = torch.rand(2, 3, 32, 32)
    wanted = model(x)
    for block in model.children():
        x = block(x)
    assert torch.equal(x, wanted)


# From a config to blocks.

@pytest.mark.parametrize("model", [
    {"name": "resnet_cifar", "args": {"depth": 8}}, {"name": "vgg_cifar", "args": {"width": 0.02}}, {"name": "mlp"},
    {"target": "test_models:own_linear"}])
def test_a_model_is_a_pure_function_of_the_seed(model):
    torch.manual_seed(1)
    first = build(**model).state_dict()
    torch.manual_seed(2)
    again, other = build(**model).state_dict(), build(1, **model).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("model", [{"name": "mlp"}, {"target": "test_models:own_linear"}])
def test_building_leaves_the_global_random_stream_untouched(model):
    before = torch.get_rng_state()
    build(**model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failing_build_leaves_the_global_random_stream_untouched():
    before = torch.get_rng_state()
    refused(r"^model: RuntimeError: no luck at test_models\.py:\d+$", target="test_models:own_failure")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_datas_shape_and_classes_are_filled_in():
    resnet, flat = build(name="resnet_cifar", args={"depth": 8}), build(name="mlp", args={"hidden": [3]})
    assert (resnet.stem.conv.in_channels, resnet.classifier.fc.out_features) == (2, 5)
    assert (flat.layer1[1].in_features, flat.classifier[0].out_features) == (128, 5)


def test_args_go_before_the_datas():
    model = build(name="resnet_cifar", args={"depth": 8, "in_channels": 7, "classes": 9})
    assert (model.stem.conv.in_channels, model.classifier.fc.out_features) == (7, 9)


def test_a_target_gets_its_args_alone():
    assert build(target="test_models:own_linear", args={"size": 4})[0].in_features == 4


def test_in_place_operations_are_switched_off():
    model = build(target="test_models:own_inplace")
    assert [m.inplace for m in model.modules() if hasattr(m, "inplace")] == [False] * 4


def test_switching_off_leaves_other_attributes_named_inplace_alone():
    module = nn.Module()
    module.inplace = "maybe"
    out_of_place(module)
    assert module.inplace == "maybe"


FORMS = [
    ("sequence", lambda a, b: nn.Sequential(a, b), ["0", "1"]),
    ("list", lambda a, b: [a, b], ["0", "1"]),
    ("tuple", lambda a, b: (a, b), ["0", "1"]),
    ("module list", lambda a, b: nn.ModuleList([a, b]), ["0", "1"]),
    ("named sequence", lambda a, b: nn.Sequential(OrderedDict(z=a, y=b)), ["z", "y"]),
    ("dict", lambda a, b: {"z": a, "y": b}, ["z", "y"]),
    ("module dict", lambda a, b: nn.ModuleDict({"z": a, "y": b}), ["z", "y"]),
]


@pytest.mark.parametrize(("form", "expected"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_blocks_may_come_in_any_ordered_form_and_keep_their_names(form, expected):
    a, b = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)
    blocks, plain = as_blocks(form(a, b)), nn.Sequential(OrderedDict(zip(expected, (a, b), strict=True)))
    assert names(blocks) == expected
    assert list(blocks.state_dict()) == list(plain.state_dict())
    blocks.eval()
    x = torch.rand(2, 3)
    assert torch.equal(blocks(x), b(a(x)))


def test_a_sequence_is_taken_as_it_is():
    model = nn.Sequential(nn.Linear(3, 4))
    assert list(as_blocks(model)) == list(model)


@pytest.mark.parametrize(("what", "message"), [
    ("none", "it returned a NoneType; return an nn.Module, or a list or dict of modules: the blocks in order"),
    ("text", "it returned a str; return an nn.Module"),
    ("empty list", "it returned no blocks; return at least one module"),
    ("empty", "it returned no blocks; return at least one module"),
    ("numbers", "its block '0' is a int, not an nn.Module"),
    ("class", "its block 'a' is a type, not an nn.Module"),
    ("dots", "the block name 'a.b' must be a text without dots"),
    ("no name", "the block name '' must be a text without dots"),
    ("number names", "the block name 1 must be a text without dots"),
    ("taken name", "the block name 'training' must be a text without dots, and no name that nn.Module uses itself"),
])
def test_a_target_that_returns_no_blocks_is_refused(what, message):
    refused(f"^model: {re.escape(message)}", target="test_models:own_return", args={"what": what})


@pytest.mark.parametrize(("model", "message"), [
    ({"name": "resnet_cifer"}, r"^model\.name: unknown 'resnet_cifer' \(did you mean 'resnet_cifar'\?\); "
                               r"one of mlp, resnet_cifar, .*vgg_cifar, or model\.target for your own$"),
    ({"name": "zzz"}, r"^model\.name: unknown 'zzz'; one of "),
    ({"name": "mlp", "args": {"widths": [1]}},
     r"^model\.args: got an unexpected keyword argument 'widths'; it takes hidden, dropout, batch_norm, in_shape"),
    ({"name": "resnet_cifar", "args": {"depth": 21}},
     r"^model: ValueError: depth 21 is not 6n \+ 2; the nearest is 20 \(with args "),
    ({"name": "resnet_cifar", "args": {"depth": "20"}}, r"^model: TypeError: "),
    ({"target": "test_models:own_return"}, r"^model\.args: missing a required argument: 'what'; it takes what$"),
    ({"target": "test_models"}, r"^model\.target: 'test_models' is not of the form package\.module:function$"),
    ({"target": ":own"}, r"^model\.target: ':own' is not of the form"),
    ({"target": "no_such_module_anywhere:own"}, r"^model\.target: cannot import .* ModuleNotFoundError: No module "),
    ({"target": "test_models:none_such"}, r"^model\.target: cannot import .* AttributeError: .*none_such"),
    ({"target": "test_models:SPEC"}, r"^model\.target: 'test_models:SPEC' is a DataSpec, not a function$"),
])
def test_a_model_that_cannot_be_built_is_refused(model, message):
    refused(message, **model)


def test_a_layer_without_a_shape_is_refused():
    refused(r"^model: 1\.weight has no shape yet; give its layer the size of its input, instead of a lazy layer$",
            target="test_models:own_lazy")


def test_a_compiled_model_is_refused():
    refused(r"^model: it returned a compiled module; return it uncompiled, and set train\.compile=true$",
            target="test_models:own_compiled")


def test_a_target_that_changes_its_args_does_not_change_the_config():
    config = ModelConfig(target="test_models:own_changing_its_args", args={"sizes": [128, 5]})
    build_model(config, SPEC, 0)
    assert config.args == {"sizes": [128, 5]}


def test_a_target_without_a_signature_can_be_called():
    refused("no blocks", target="builtins:dict")


def test_a_block_named_like_a_method_is_refused():
    with pytest.raises(ConfigError, match="forward"):
        as_blocks({"forward": nn.Linear(2, 2)})
