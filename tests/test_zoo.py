"""torchvision's models, one of each family: as blocks, pretrained, and through both engines."""

import pytest
import torch
import torchvision
from conftest import assert_same_run, train_in_processes, train_locally
from families import FAMILIES, assert_blocks_are_the_model, assert_same_state, one_step, smallest
from torch import nn

from blpipe.checkpoint.folders import newest_intact
from blpipe.checkpoint.state import model_state
from blpipe.config import ModelConfig
from blpipe.config_file import parse_config
from blpipe.errors import ConfigError
from blpipe.metrics import read_rows
from blpipe.models import build_model
from blpipe.models.blocks import blocks_of
from blpipe.models.zoo import torchvision_model
from blpipe.plan import make_plan
from blpipe.resume import resumed_config
from blpipe.runs import train_run
from blpipe.saved import evaluate_run, export_run
from blpipe.shapes import likeness
from blpipe.specs import DataSpec

DATA = DataSpec((3, 32, 32), "float32", (), 5, 4, 4)
SMALL = "shufflenet_v2_x0_5"


def build(name, **args):
    return build_model(ModelConfig(name=f"torchvision/{name}", args=args), DATA, 0)


NAMES = {  # of blocks: those of the model's own modules
    "resnet18": ["conv1", *(f"layer{i}_{j}" for i in (1, 2, 3, 4) for j in (0, 1)), "fc"],
    "squeezenet1_1": ["features_0", "features_3", "features_4", "features_6", "features_7", "features_9", "features_10",
                      "features_11", "features_12", "classifier"],
    "mobilenet_v2": [*(f"features_{i}" for i in range(19)), "classifier"],
    "vit_b_16": ["conv_proj", *(f"encoder_layers_encoder_layer_{i}" for i in range(12)), "heads"],
    "densenet121": [
        "features_conv0", *(f"features_{part}{i}" for i in (1, 2, 3) for part in ("denseblock", "transition")),
        "features_denseblock4", "classifier"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_blocks_of_a_torchvision_model_are_that_model(name):
    names = [name for name, _ in assert_blocks_are_the_model(name).named_children()]
    assert len(names) >= 8
    assert names == NAMES.get(name, names)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 75)])
def test_auxiliary_classifiers_are_carried_along_and_not_run(name, size):
    plain = torchvision_model(f"torchvision/{name}", {"aux_logits": True, "dropout": 0.0}, 5)
    blocks, x = blocks_of(plain), torch.rand(2, 3, size, size)
    assert [key for key in blocks.state_dict() if "aux" in key.lower()]
    assert_same_state(plain, blocks)
    assert torch.equal(blocks.eval()(x), plain.eval()(x))
    logits = blocks.train()(x)
    assert not [key for key, buffer in plain.named_buffers() if "aux" in key.lower() and "tracked" in key and buffer]
    if name == "googlenet":  # the other's auxiliary classifier takes no small images
        assert torch.equal(logits, plain.train()(x).logits)
    assert not [key for key in build(name).state_dict() if "aux" in key.lower()]


@pytest.mark.timeout(600)
def test_one_step_in_three_families_is_the_same_in_both_engines(tmp_path):
    # The others differ less from these than these from each other; test_torchvision_all.py takes every model.
    trees = [one_step(name) for name in ("mobilenet_v3_small", "squeezenet1_1", "swin_t")]
    for tree, run in zip(trees, train_in_processes(trees, 4, tmp_path, timeout=500), strict=True):
        assert_same_run(run, train_locally(tree, tmp_path))


def test_a_runs_weights_load_into_torchvisions_own_model(tmp_path):
    export_run(train_locally(one_step("mnasnet0_5"), tmp_path), tmp_path / "model.pt")  # one that checks its version
    torchvision.models.mnasnet0_5(num_classes=2).load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)


def test_a_run_with_auxiliary_classifiers_loads_too(tmp_path):
    run = train_locally(one_step("googlenet", aux_logits=True), tmp_path)
    torchvision.models.googlenet(num_classes=2, aux_logits=True, init_weights=False).load_state_dict(
        model_state(newest_intact(run)[0]), strict=True)


@pytest.mark.parametrize(("name", "kind"), [
    ("swin_t", (True, 3)), ("convnext_tiny", (False, 3)), ("vit_b_16", (False, 2))])
def test_heads_know_where_a_boundary_has_its_channels(name, kind):
    args, _ = smallest(name)
    config = parse_config({"name": "a", "model": {"name": f"torchvision/{name}", "args": args},
                           "partition": {"stages": 8}, "train": {"batch_size": 2}})
    boundaries = make_plan(config, DATA).boundaries
    assert {(b.channels_last, len(b.shape)) for b in boundaries[:-1]} == {kind}
    if kind[1] == 3:
        channels = [b.shape[2] if b.channels_last else b.shape[0] for b in boundaries[:-1]]
        assert channels == sorted(channels)
        assert channels[-1] == 768
        assert all(shape[0] in (96, 192, 384, 768) for b in boundaries for shape in b.later[:-1])


# Arguments, names and weights.

def test_classes_come_from_the_data_unless_args_give_them():
    assert build(SMALL).state_dict()["fc.fc.weight"].shape[0] == 5
    assert build(SMALL, num_classes=7).state_dict()["fc.fc.weight"].shape[0] == 7


def test_building_is_a_function_of_the_seed():
    torch.manual_seed(7)
    first = build(SMALL).state_dict()
    torch.manual_seed(8)
    assert all(torch.equal(first[key], tensor) for key, tensor in build(SMALL).state_dict().items())


@pytest.mark.parametrize(("name", "args", "message"), [
    ("resnet81", {}, r"^model\.name: unknown 'torchvision/resnet81' \(did you mean 'torchvision/resnet\d+'\?\)"),
    ("fcn_resnet50", {}, r"^model\.name: unknown 'torchvision/fcn_resnet50'"),
    (SMALL, {"weights": "IMAGENET"}, r"^model\.args\.weights: shufflenet_v2_x0_5 has no weights 'IMAGENET' .*; one of "
                                     r"IMAGENET1K_V1, DEFAULT$"),
    (SMALL, {"depth": 3}, r"^model: TypeError: .*unexpected keyword argument 'depth'"),
])
def test_what_torchvision_does_not_have_is_refused(name, args, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(name, **args)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A cache of torch.hub that holds weights for one model, as a download would leave them."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(3)
    model = torchvision.models.get_model(SMALL)
    url = torchvision.models.get_model_weights(SMALL).DEFAULT.url
    (folder / "hub/checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), folder / "hub/checkpoints" / url.rpartition("/")[2])
    return folder, model.state_dict()


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1"])
def test_pretrained_weights_are_torchvisions(pretrained, monkeypatch, weights):
    monkeypatch.setenv("TORCH_HOME", str(pretrained[0]))
    state = torchvision_model(f"torchvision/{SMALL}", {"weights": weights}, 5).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in pretrained[1].items())


def test_with_another_number_of_classes_only_the_classifier_starts_anew(pretrained, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(pretrained[0]))
    blocks = build(SMALL, weights="DEFAULT", num_classes=4)
    state = torchvision_model(f"torchvision/{SMALL}", {"weights": "DEFAULT", "num_classes": 4}, 5).state_dict()
    assert {key for key, tensor in pretrained[1].items() if not torch.equal(state[key], tensor)} \
        == {"fc.weight", "fc.bias"}
    assert blocks(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    assert blocks.fc.fc.weight.std() > 0


def no_network(*args, **kwargs):
    raise OSError("no route to host")


def test_weights_that_cannot_be_fetched_are_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ConfigError, match=r"^model\.args\.weights: cannot fetch https://\S+: no route to host; put the "
                                          r"file there yourself: \S+/hub/checkpoints/shufflenetv2_x0\.5-\w+\.pth$"):
        build(SMALL, weights="DEFAULT")


def test_other_classes_renew_nothing_but_the_layer_for_them(monkeypatch):
    """These weights are for larger images than torchvision's default."""
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    with torch.device("meta"):
        shapes = [{name: tensor.shape for name, tensor in torchvision_model("torchvision/vit_b_16", {
            "weights": "IMAGENET1K_SWAG_E2E_V1"} | args, 5).state_dict().items()} for args in ({}, {"num_classes": 4})]
    renewed = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert renewed == {"heads.head.weight", "heads.head.bias"}


@pytest.mark.parametrize(("name", "args"), [
    ("googlenet", {}), ("googlenet", {"num_classes": 4}), ("inception_v3", {"aux_logits": True}), ("maxvit_t", {}),
    ("vit_h_14", {"weights": "IMAGENET1K_SWAG_E2E_V1"}), ("vgg11", {"num_classes": 4}), ("densenet121", {})])
def test_where_a_checkpoint_gives_the_weights_the_model_is_the_same_without_fetching_them(name, args, monkeypatch):
    with torch.device("meta"), monkeypatch.context() as fetched:
        fetched.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: {})
        fetched.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        whole = torchvision_model(f"torchvision/{name}", {"weights": "DEFAULT"} | args, 5)
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", no_network)
    with torch.device("meta"):
        model = torchvision_model(f"torchvision/{name}", {"weights": "DEFAULT"} | args, 5, pretrained=False)
    for auxiliary in ("aux1", "aux2"):  # None, where googlenet has none
        vars(model).pop(auxiliary, None)
    assert likeness(model) == likeness(whole)


def test_a_run_is_evaluated_and_goes_on_without_the_weights_that_it_began_with(pretrained, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(pretrained[0]))
    tree = one_step(SMALL, weights="DEFAULT", num_classes=2) | {"partition": {"stages": 1}}
    run = train_locally(tree, tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert evaluate_run(run)[0]["blocks"][-1] == "fc"
    train_run(resumed_config(run, ["train.epochs=2"]), resume_from=run)
    assert read_rows(run)[-1]["epoch"] == 2


@pytest.mark.parametrize(("name", "args"), [("googlenet", {"num_classes": 4}), ("inception_v3", {}),
                                            ("inception_v3", {"aux_logits": True})])
def test_pretrained_models_go_without_their_auxiliary_classifiers(name, args, monkeypatch):
    weights = torchvision.models.get_model(name, init_weights=False).state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: weights)
    state = torchvision_model(f"torchvision/{name}", {"weights": "DEFAULT", **args}, 5).state_dict()
    assert any("aux" in key.lower() for key in state) == args.get("aux_logits", False)
    assert state["fc.weight"].shape[0] == args.get("num_classes", 1000)
