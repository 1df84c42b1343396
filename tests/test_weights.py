"""Runs that begin with weights of the user's: what is taken, what is refused, and when the file is read."""

import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from conftest import assert_same_run, small_config, state_of, train_in_processes, train_locally
from models_under_test import TwiceTheSame, conv_net, tied_net
from torch import nn

from blpipe import cli, models, resume
from blpipe.checkpoint.folders import checkpoints
from blpipe.config_file import parse_config
from blpipe.errors import ConfigError
from blpipe.models import build_model
from blpipe.models.build import plain_names
from blpipe.runs import train_run
from blpipe.saved import evaluate_run, export_run
from blpipe.specs import DataSpec
from blpipe.weights import given, load

IMAGES = DataSpec((3, 32, 32), "float32", (), 4, 64, 16)
SMALL_IMAGES = DataSpec((2, 8, 8), "float32", (), 4, 64, 16)
RESNET = {"name": "resnet_cifar", "args": {"depth": 8, "width": 0.25}}
CONV = {"target": "models_under_test:conv_net"}


def resnet(**args):
    return models.resnet_cifar(8, 0.25, **{"in_channels": 3, "classes": 4} | args)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    """Paths are relative to the working directory."""
    monkeypatch.chdir(tmp_path)


def begun(model, data=IMAGES, **config):
    """The blocks of a run that is about to begin."""
    parsed = parse_config({"name": "run", "model": model, "partition": {"stages": 2}} | config)
    blocks = build_model(parsed.model, data, parsed.seed)
    load(given(parsed), parsed.model, blocks)
    return blocks


def plain_state(blocks):
    values = blocks.state_dict()
    return {plain: values[name] for name, plain in plain_names(blocks).items()}


def unlike(model):
    """A plain model's state_dict with values that no model begins with, BatchNorm's statistics included."""
    torch.manual_seed(7)
    return {name: torch.rand_like(tensor) if tensor.is_floating_point() else torch.full_like(tensor, 41)
            for name, tensor in model.state_dict().items()}


def assert_equal_states(state, expected):
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def refused(model, data=IMAGES, **config):
    """The lines that say why."""
    with pytest.raises(ConfigError) as caught:
        begun(model, data, **config)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(("model", "plain", "data"), [
    (RESNET, resnet, IMAGES),
    ({"name": "torchvision/resnet18"}, lambda: torchvision.models.resnet18(num_classes=4), IMAGES),
    ({"target": "models_under_test:TwiceTheSame"}, TwiceTheSame, SMALL_IMAGES)])
def test_parameters_and_buffers_of_all_blocks_begin_as_in_the_file(model, plain, data):
    expected = unlike(plain())
    torch.save(expected, "own.pt")
    assert_equal_states(plain_state(begun({**model, "weights": "own.pt"}, data)), expected)


def test_a_weight_that_blocks_share_stays_shared():
    expected = unlike(nn.Sequential(*tied_net().values()))
    expected["3.weight"] = expected["1.weight"]
    names = dict(zip("012345", "abcdef", strict=True))
    torch.save({names[name[0]] + name[1:]: tensor for name, tensor in expected.items()}, "own.pt")
    blocks = begun({"target": "models_under_test:tied_net", "weights": "own.pt"}, SMALL_IMAGES)
    assert blocks.d.weight is blocks.b.weight
    assert torch.equal(blocks.d.weight, expected["1.weight"])


@pytest.mark.parametrize("wrap", [
    lambda state: {"epoch": 3, "state_dict": state}, lambda state: {"model": state}, lambda state: {
        "model_state_dict": state, "optimizer": {"state": {}}},
    lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    lambda state: {name: tensor.double() for name, tensor in state.items()}])
def test_the_file_may_hold_it_as_training_scripts_save_it(wrap):
    expected = unlike(resnet())
    torch.save(wrap(expected), "own.pt")
    assert_equal_states(plain_state(begun({**RESNET, "weights": "own.pt"})), expected)


def test_a_file_of_safetensors_is_taken(monkeypatch):
    expected = unlike(resnet())
    safetensors.torch.save_file(expected, "own.safetensors")
    assert_equal_states(plain_state(begun({**RESNET, "weights": "own.safetensors"})), expected)
    Path("own.safetensors").write_bytes(b"no tensors")
    line, = refused({**RESNET, "weights": "own.safetensors"})
    assert line.startswith("model.weights: own.safetensors: cannot be read as tensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert refused({**RESNET, "weights": "own.safetensors"}) == [
        "model.weights: own.safetensors: needs safetensors; run `pip install safetensors`"]


def test_a_name_before_all_of_the_models_own_is_no_wrappers():
    expected = {"module.weight": torch.ones(4, 3072), "module.bias": torch.ones(4)}
    torch.save(expected, "own.pt")
    assert_equal_states(plain_state(begun({"target": "test_weights:wrapped", "weights": "own.pt"})), expected)


def test_a_file_of_what_a_users_module_wraps_is_taken():
    expected = {"1.weight": torch.rand(4, 3072), "1.bias": torch.rand(4)}
    torch.save(expected, "own.pt")
    state = plain_state(begun({"target": "test_weights:Wrapper", "weights": "own.pt"}))
    assert_equal_states(state, {f"net.{name}": tensor for name, tensor in expected.items()})
    state = plain_state(begun({"target": "test_weights:Wrapper", "weights": "own.pt", "weights_except": ["1.bias"]}))
    assert torch.equal(state["net.1.weight"], expected["1.weight"])
    assert not torch.equal(state["net.1.bias"], expected["1.bias"])
    torch.save({f"other.{name}": tensor for name, tensor in expected.items()}, "own.pt")
    lines = refused({"target": "test_weights:Wrapper", "weights": "own.pt"})
    assert "are none of the model's: other.1.weight, other.1.bias;" in lines[1]


class Wrapper(nn.Module):
    """All that has weights is in one attribute."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))

    def forward(self, x):
        """Logits."""
        return self.net(x)


def wrapped():
    """Blocks of which the only one with weights is called as DDP calls what it wraps."""
    return {"flat": nn.Flatten(), "module": nn.Linear(3072, 4)}


def test_a_file_without_the_counts_of_batchnorm_is_taken_as_torch_takes_it():
    expected = unlike(resnet())
    torch.save({name: tensor for name, tensor in expected.items() if "num_batches" not in name}, "own.pt")
    state = plain_state(begun({**RESNET, "weights": "own.pt"}))
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items() if "num_batches" not in name)


def test_what_is_left_out_begins_as_without_weights_and_the_rest_as_in_the_file():
    expected = unlike(resnet(classes=9)) | {"extra.weight": torch.ones(2)}
    torch.save(expected, "own.pt")
    new = plain_state(begun({**RESNET, "weights": "own.pt", "weights_except": ["classifier.*", "extra.*"]}))
    fresh = plain_state(begun(RESNET))
    for name, tensor in new.items():
        assert torch.equal(tensor, (fresh if name.startswith("classifier.") else expected)[name]), name


def test_what_does_not_fit_is_told_at_once_with_the_patterns_that_leave_it_out():
    state = unlike(resnet(classes=9)) | {"extra.weight": torch.ones(2), "extra.bias": torch.ones(2)}
    del state["stem.conv.weight"]
    torch.save(state, "own.pt")
    remedy = ("leave them out by model.weights_except: [classifier.fc.*, stem.conv.*, extra.*], or give weights of "
              "this model")
    assert refused({**RESNET, "weights": "own.pt", "weights_except": ["layer9.*"]}) == [
        "model.weights: own.pt: 2 of the model's 44 have another shape: classifier.fc.weight [9, 16] for [4, 16], "
        f"classifier.fc.bias [9] for [4]; {remedy}",
        f"model.weights: own.pt: 1 of the model's 44 are not there: stem.conv.weight; {remedy}",
        f"model.weights: own.pt: 2 are none of the model's: extra.weight, extra.bias; {remedy}",
        "model.weights_except: 'layer9.*' matches no parameter; names are as in a state_dict"]


def test_of_weights_of_another_model_the_first_names_are_told():
    torch.save(unlike(conv_net()), "own.pt")
    there, unknown = refused({**RESNET, "weights": "own.pt"})
    assert re.fullmatch(r"model\.weights: own\.pt: \d+ of the model's \d+ are not there: (\S+, ){2}\S+ and \d+ "
                        r"more; give weights of this model, or leave names out by model\.weights_except", there)
    assert unknown.startswith("model.weights: own.pt: 37 are none of the model's: 0.0.weight, 0.0.bias, 0.1.weight and")


@pytest.mark.parametrize(("write", "said"), [
    (lambda path: None, "cannot read own.pt: No such file or directory; give a file, a run folder or one of its"),
    (lambda path: path.mkdir(), "own.pt: is no run folder (it has no config.yaml); "),
    (lambda path: path.write_text("model: mlp"), "own.pt: cannot be read as tensors that torch.save wrote (Unpickling"),
    (lambda path: path.write_bytes(b""), "own.pt: cannot be read as tensors that torch.save wrote (EOFError); write"),
    (lambda path: torch.save(resnet(), path), "own.pt: cannot be read as tensors that torch.save wrote (Unpickling"),
    (lambda path: torch.save([1], path), "own.pt: holds no state_dict of tensors alone; write it by torch.save("),
    (lambda path: torch.save({"state_dict": {"a": 1}}, path), "own.pt: holds no state_dict of tensors alone; write"),
    (lambda path: torch.save({1: torch.ones(1)}, path), "own.pt: holds no state_dict of tensors alone; write"),
    (lambda path: torch.save({name: tensor.to("meta") for name, tensor in resnet().state_dict().items()}, path),
     "own.pt: cannot be copied to the model: Error(s) in loading")])
def test_what_is_no_file_of_weights_is_refused_in_a_line(write, said):
    write(Path("own.pt"))
    line, = refused({**RESNET, "weights": "own.pt"})
    assert line.startswith(f"model.weights: {said}")


def test_keys_that_do_not_go_together_are_refused():
    assert refused({**RESNET, "weights_except": ["fc.*"]}) == [
        "model.weights_except: ['fc.*'], and no model.weights; give them, or leave model.weights_except out"]
    both = {"name": "torchvision/resnet18", "args": {"weights": "DEFAULT"}, "weights": "own.pt"}
    assert refused(both) == ["model.weights: own.pt, and model.args.weights: DEFAULT are both for the model to begin "
                             "with; leave one of them out"]


@pytest.fixture
def trained(tmp_path):
    """The folder of a small run."""
    return train_locally(small_config("source", train__epochs=1, partition__stages=2), tmp_path)


def test_a_run_folder_and_a_checkpoint_are_what_export_writes_of_them(trained):
    export_run(trained, Path("model.pt"))
    expected = torch.load("model.pt", weights_only=True)
    for source in ("model.pt", str(trained), str(checkpoints(trained)[-1])):
        assert_equal_states(plain_state(begun({**CONV, "weights": source}, SMALL_IMAGES)), expected)


def test_a_damaged_checkpoint_is_refused_or_passed_over(trained):
    last = checkpoints(trained)[-1]
    (last / ".metadata").write_text("")
    line, more = refused({**CONV, "weights": str(trained)}, SMALL_IMAGES)
    assert line.startswith(f"model.weights: {last}: is damaged: .metadata has 0 bytes of ")
    assert more.startswith(f"model.weights: {trained}: holds no intact checkpoint")


def test_a_run_does_not_begin_with_what_its_own_folder_loses_by_that(trained):
    line, = refused({**CONV, "weights": str(trained)}, SMALL_IMAGES, name=trained.name,
                    runtime={"runs": str(trained.parent)})
    assert line == (f"model.weights: {trained} is in this run's own folder, which begins empty; give the run another "
                    "name=…")


def test_a_run_begins_with_the_file_and_goes_on_without_it(tmp_path, capsys):
    torch.save(unlike(conv_net()), "own.pt")
    expected = torch.load("own.pt", weights_only=True)
    tree = small_config("tuned", model={**CONV, "weights": "own.pt"}, train__epochs=1,
                        optimizer={"lr": 0.1, "lr_factors": {"*": 0.0}}, checkpoint__every_epochs=1)
    run = train_locally(tree, tmp_path)
    state = state_of(run)
    for name, tensor in expected.items():
        if name.endswith(("weight", "bias")):
            assert torch.equal(state[f"model/{name}"], tensor), name
    assert state["model/0.1.num_batches_tracked"] == 41 + 6
    Path("own.pt").unlink()
    assert evaluate_run(run)[0]["loss"] > 0
    train_run(resume.resumed_config(run, ["train.epochs=2"]), resume_from=run)
    assert state_of(run)["model/0.1.num_batches_tracked"] == 41 + 12
    again = parse_config(tree | {"runtime": tree["runtime"] | {"runs": str(run.parent)}, "train": tree["train"] | {
        "epochs": 3}})
    train_run(again, auto_resume=True)
    assert state_of(run)["model/0.1.num_batches_tracked"] == 41 + 18
    with pytest.raises(ConfigError, match=r"^model\.weights: none, but 'own\.pt' in "):
        train_run(resume.resumed_config(run, ["model.weights=null"]), resume_from=run)
    assert capsys.readouterr().err == ""


def test_both_engines_begin_with_the_same_weights(trained, tmp_path, capsys):
    export_run(trained, tmp_path / "model.pt")
    trees = [small_config(f"of_{kind}", model={**CONV, "weights": str(source)}, train__epochs=1, partition__stages=2)
             for kind, source in (("file", tmp_path / "model.pt"), ("run", trained))]
    local = [train_locally(tree, tmp_path) for tree in trees]
    assert f"note: model.weights: those of {checkpoints(trained)[-1]}" in capsys.readouterr().out
    for one, other in zip(local, train_in_processes(trees, 2, tmp_path), strict=True):
        assert_same_run(one, other)
    assert_same_run(*local)
    anew = train_locally(small_config("anew", train__epochs=1, partition__stages=2), tmp_path)
    assert not torch.equal(state_of(anew)["model/0.0.weight"], state_of(local[0])["model/0.0.weight"])


@pytest.mark.parametrize("command", ["train", "plan"])
def test_train_and_plan_refuse_weights_that_do_not_fit_and_write_nothing(command, capsys):
    torch.save(unlike(conv_net(classes=9)), "own.pt")
    Path("small.yaml").write_text(yaml.safe_dump(small_config("small", model={**CONV, "weights": "own.pt"})))
    with pytest.raises(SystemExit, match="^2$"):
        cli.main([command, "small.yaml", "partition.costs=analytic"])
    assert capsys.readouterr().err == (
        "blpipe: model.weights: own.pt: 2 of the model's 37 have another shape: 5.2.weight [9, 8] for [4, 8], 5.2.bias "
        "[9] for [4]; leave them out by model.weights_except: [5.2.*], or give weights of this model\n")
    assert not Path("runs").exists()
