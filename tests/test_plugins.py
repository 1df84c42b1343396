"""Parts from outside the package: functions of the user's own folder, and what packages register by name."""

import json
import os
import random
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_same_run, small_config, train_in_processes, train_locally

from blpipe import cli
from blpipe.config import DataConfig, ModelConfig
from blpipe.data import open_data
from blpipe.errors import ConfigError
from blpipe.models import build_model
from blpipe.specs import DataSpec

PARTS = """
import torch
from torch import nn
from torch.nn import functional as F

def points(samples=88):
    x = torch.rand(samples, 6)
    y = (x.sum(1) > 3).long()
    return (x[:64], y[:64]), (x[64:], y[64:])

def more_points():
    return [(torch.rand(64, 9), torch.arange(64) % 5) for _ in range(2)]

def net(in_shape=(6,), classes=2, width=8):
    layer = lambda size: nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Dropout(0.1))
    return {"one": layer(in_shape[0]), "two": layer(width), "three": layer(width), "four": nn.Linear(width, classes)}

def tied(width=6):
    blocks = {f"block{i}": nn.Linear(width, width, bias=False) for i in range(4)}
    blocks["block3"].weight = blocks["block0"].weight
    return blocks

def narrow(boundary, hidden=3):
    return nn.Sequential(nn.Linear(boundary.shape[-1], hidden), nn.Tanh(), nn.Linear(hidden, boundary.classes))

def cooled(temperature=2.0):
    return lambda logits, targets: F.cross_entropy(logits / temperature, targets)

def rest_last(blocks, stages, first=1):
    names = [name for name, _ in blocks.named_children()]
    return [names[:first], names[first:]]

def later_cuts(blocks, stages):
    return [name for name, _ in blocks.named_children()][1 - stages:]

def returns(blocks, stages, what):
    return what

def fails(*args, **kwargs):
    raise RuntimeError("out\\nof luck")

def nothing(*args, **kwargs):
    return None

def darker(by):
    return lambda x: x // by

number = 3
"""
OWN = {"model": {"target": "parts_of_tests:net"}, "data": {"target": "parts_of_tests:points"}, "method": {
    "head": {"target": "parts_of_tests:narrow"}, "loss": {"target": "parts_of_tests:cooled"}}}
BY_NAME = {"model": {"name": "points-net", "args": {"width": 8}}, "data": {"name": "points", "args": {"samples": 88}},
           "method": {"head": "narrow", "loss": {"name": "cooled", "args": {"temperature": 2.0}}},
           "partition": {"stages": 2, "strategy": "rest-last", "args": {"first": 1}}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with the user's module in it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/parts_of_tests.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", [*sys.path])  # a target adds the working directory
    yield tmp_path / "work"
    for name in ("parts_of_tests", "thirdparty"):
        sys.modules.pop(name, None)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The same parts as an installed package that registers them; its folder."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "thirdparty.py").write_text(PARTS)
    (site / "raises_when_imported.py").write_text("raise RuntimeError('no luck')\n")
    register(site, "thirdparty", "1.0", models={"points-net": "net", "odd": "fails", "number": "number", "gone": "gone",
                                                "none": "nothing"},
             heads={"narrow": "narrow", "odd": "fails"}, losses={"cooled": "cooled", "odd": "fails"},
             data={"points": "points", "odd": "fails", "none": "nothing"},
             partitions={"rest-last": "rest_last", "odd": "fails", "returns": "returns"},
             transforms={"darker": "darker"})
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site


def register(site, package, version, module=None, **groups):
    """What pip leaves of a package's entry points."""
    info = site / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [line for group, names in groups.items() for line in (
        f"[blpipe.{group}]", *(f"{name} = {module or package}:{function}" for name, function in names.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))


def tree(name, parts=OWN, **changes):
    """A run of 64 points in batches of 16, for two epochs."""
    return {**small_config(name), "data": {}, **parts, **changes}


def train(config):
    """The exit code of training this config in a file."""
    with open(f"{config['name']}.yaml", "w") as file:
        yaml.safe_dump(config, file)
    return cli.main(["train", f"{config['name']}.yaml"])


def refused(config, capsys, match):
    """Training is refused with one line, exit code 2, and leaves no run folder."""
    with pytest.raises(SystemExit) as stop:
        train(config)
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert re.match(f"blpipe: {match}$", line), line
    assert not os.path.exists("runs")


# The user's own folder.

@pytest.mark.parametrize(("partition", "stages"), [
    ({"cuts": ["three"]}, [["one", "two"], ["three", "four"]]),
    ({"cuts": ["two", "three", "four"]}, [["one"], ["two"], ["three"], ["four"]]),
    ({"target": "parts_of_tests:later_cuts", "stages": 3}, [["one", "two"], ["three"], ["four"]]),
    ({"target": "parts_of_tests:rest_last", "stages": 2, "args": {"first": 3}}, [["one", "two", "three"], ["four"]]),
])
def test_a_module_outside_the_package_is_used_and_cut_through_a_config_alone(folder, partition, stages):
    assert train(tree("own", partition=partition)) == 0
    result = json.loads((folder / "runs/own/result.json").read_text())
    assert [stage["blocks"] for stage in result["stages"]] == stages
    assert result["steps"] == 8


WHAT = {"target": "parts_of_tests:returns", "stages": 2}


@pytest.mark.parametrize(("changes", "match"), [
    ({"partition": WHAT | {"args": {"what": [["one", "two"], ["two", "three", "four"]]}}},
     r"partition\.target: 'two' is in stage 1 and again in stage 2; put each block into one stage, once"),
    ({"partition": WHAT | {"args": {"what": [["one"], ["three"]]}}},
     r"partition\.target: no stage holds 'two', 'four'; put each block into a stage"),
    ({"partition": {"cuts": ["block2"]}, "model": {"target": "parts_of_tests:tied"}},
     r"partition: block0\.weight \(stage 1\) and block3\.weight \(stage 2\) are one parameter; cut so that both are in "
     r"one stage, or make one of them nn\.Parameter\(weight\.clone\(\)\) as the model is made"),
    ({"model": {"target": "parts_of_tests:fails", "args": {"x": 1}}}, r"model: RuntimeError: out of luck.*"),
    ({"data": {"target": "parts_of_tests:fails"}}, r"data: RuntimeError: out of luck at \S+:\d+"),
    ({"partition": {"target": "parts_of_tests:fails", "stages": 2}},
     r"partition\.target: RuntimeError: out of luck at \S+:\d+"),
    ({"method": {"head": {"target": "parts_of_tests:fails"}}}, r"method\.head: RuntimeError: out of luck at \S+:\d+"),
    ({"method": {"loss": {"target": "parts_of_tests:fails"}}}, r"method\.loss: RuntimeError: out of luck at \S+:\d+"),
])
def test_what_is_wrong_with_ones_own_parts_is_said_in_a_line(changes, match, capsys):
    refused(tree("bad", **changes), capsys, match)


DRAWS = """
import random
import numpy
import torch
from torch import nn

TABLE = torch.rand(2), numpy.random.rand(), random.random()

def net():
    return [nn.Linear(2, 3), nn.Linear(3, 2)]
"""


def test_what_a_module_draws_as_it_is_imported_changes_no_weights_and_repeats(tmp_path, monkeypatch):
    """One process may import it for the model, and another for the data before."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "draws.py").write_text(DRAWS)
    built, tables = [], []
    for again in range(3):
        built.append(build_model(ModelConfig(target="draws:net"), DataSpec((2,), "float32", (), 2, 8, 8), 0))
        tables.append(sys.modules["draws"].TABLE)
        if again:  # the first time it is imported, the second it was, the third it is anew
            del sys.modules["draws"]
            torch.rand(1), random.random(), np.random.rand()
    for model, (numbers, *others) in zip(built[1:], tables[1:], strict=True):
        assert torch.equal(model[0].weight, built[0][0].weight)
        assert torch.equal(numbers, tables[0][0])
        assert others == list(tables[0][1:])


def test_a_model_whose_file_has_gone_is_told_that_it_is_called_beside_a_checkpoint_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reads.py").write_text("def net():\n    return open('gone.pt')\n")
    message = r"^model: FileNotFoundError: .*'gone\.pt' at reads\.py:2"
    hint = (r"; it is called for eval and --resume too, whose weights are the checkpoint's: have it do without that "
            "file, or put the file back")
    for pretrained, end in ((True, "$"), (False, f"{hint}$")):
        with pytest.raises(ConfigError, match=message + end):
            build_model(ModelConfig(target="reads:net"), DataSpec((2,), "float32", (), 2, 8, 8), 0, pretrained)


# Installed packages.

def test_registered_parts_have_plain_names_and_train_alike_in_one_process_and_in_two(folder, installed):
    config = tree("named", BY_NAME)
    local = train_locally(config, folder)
    assert_same_run(local, *train_in_processes([config], 2, folder))


def test_a_registered_part_is_the_one_that_its_target_would_be(folder, installed):
    own = tree("run", OWN, partition={
        "stages": 2, "target": "parts_of_tests:rest_last", "args": {"first": 1}})
    named = train_locally(tree("run", BY_NAME), folder / "named")
    assert_same_run(named, train_locally(own, folder / "own"))
    stages = json.loads((named / "result.json").read_text())["stages"]
    assert [stage["blocks"] for stage in stages] == [["one"], ["two", "three", "four"]]


def test_a_registered_transform_has_a_plain_name(installed):
    section = {"name": "synthetic", "args": {"shape": [1, 4, 4], "classes": 2, "samples": 8},
               "normalize": {"mean": [0.0], "std": [1.0]}}
    darker = {"transforms": [{"name": "darker", "args": {"by": 255}}]}
    (plain, _), (dark, _) = (next(open_data(DataConfig.model_validate(each), 0).train_batches(0, 0, 8, False))
                             for each in (section, section | {"augment": darker}))
    assert torch.equal(dark, plain.floor() / 255)


def test_a_registered_model_is_told_of_the_data(folder, installed):
    run = train_locally(tree("wide", BY_NAME, data={"target": "parts_of_tests:more_points"}), folder)
    first, later = json.loads((run / "result.json").read_text())["stages"]
    assert first["params"] == (9 + 1) * 8
    assert later["params"] == 2 * (8 + 1) * 8 + (8 + 1) * 5


ORIGIN = r"thirdparty 1\.0 \(thirdparty:{}\)"


@pytest.mark.parametrize(("changes", "match"), [
    ({"model": "point-net"}, r"model\.name: unknown 'point-net' \(did you mean 'points-net'\?\); one of .*mlp, .*"
                             r"points-net.*, or model\.target for your own"),
    ({"model": "resnet_cifra"}, r"model\.name: unknown 'resnet_cifra' \(did you mean 'resnet_cifar'\?\); one of .*"),
    ({"data": "pionts"}, r"data\.name: unknown 'pionts' \(did you mean 'points'\?\); one of .*"),
    ({"method": {"head": "narow"}}, r"method\.head\.name: unknown 'narow' \(did you mean 'narrow'\?\); one of .*"),
    ({"method": {"loss": "cooed"}}, r"method\.loss\.name: unknown 'cooed' \(did you mean 'cooled'\?\); one of .*"),
    ({"partition": {"stages": 2, "strategy": "rest"}}, r"partition\.strategy: unknown 'rest'.*; one of .*even.*, or "
                                                       r"partition\.target for your own"),
    ({"model": "odd"}, rf"model\.name: 'odd' of {ORIGIN.format('fails')} raised RuntimeError: out of luck"),
    ({"data": {"name": "odd", "args": {"x": 1}}}, rf"data\.name: 'odd' of {ORIGIN.format('fails')} raised RuntimeError "
                                                  r"with args {'x': 1}: out of luck"),
    ({"method": {"head": "odd"}}, rf"method\.head\.name: 'odd' of {ORIGIN.format('fails')} raised RuntimeError: .*"),
    ({"method": {"loss": "odd"}}, rf"method\.loss\.name: 'odd' of {ORIGIN.format('fails')} raised RuntimeError: .*"),
    ({"partition": {"strategy": "odd", "stages": 2}},
     rf"partition\.strategy: 'odd' of {ORIGIN.format('fails')} raised RuntimeError: out of luck"),
    ({"model": "gone"}, rf"model\.name: 'gone' of {ORIGIN.format('gone')} cannot be imported: AttributeError: .*; mend "
                        "or uninstall that package"),
    ({"model": "number"}, rf"model\.name: 'number' of {ORIGIN.format('number')} is a int, not a function; mend or .*"),
    ({"data": "none"}, r"data\.name: 'none': returned NoneType; expected \(train, test\), .*"),
    ({"model": {"name": "points-net", "args": {"depth": 3}}},
     r"model\.args: got an unexpected keyword argument 'depth'; it takes in_shape, classes, width"),
    ({"partition": {"strategy": "rest-last", "stages": 2, "args": {"keep": 3}}},
     r"partition\.args: got an unexpected keyword argument 'keep'; it takes first"),
    ({"partition": {"strategy": "returns", "stages": 2, "args": {"what": [["one"], ["three"]]}}},
     r"partition\.strategy: no stage holds 'two', 'four'; put each block into a stage"),
])
def test_what_is_wrong_with_a_registered_part_is_said_with_its_package(installed, changes, match, capsys):
    refused(tree("bad", BY_NAME, **changes), capsys, match)


def test_a_package_that_cannot_be_imported_is_named(installed, capsys):
    register(installed, "broken", "0.1", "raises_when_imported", models={"mine": "net"})
    refused(tree("bad", BY_NAME, model="mine"), capsys, r"model\.name: 'mine' of broken 0\.1 "
            r"\(raises_when_imported:net\) cannot be imported: RuntimeError: no luck; mend or uninstall that package")


TWICE = r"{0} is registered by blpipe itself and rival 2\.0 \(rival:make\); uninstall all but one, or give {1} " \
        "'rival:make' in place of the name"


@pytest.mark.parametrize(("group", "name", "changes", "match"), [
    ("models", "points-net", {},
     r"model\.name: 'points-net' is registered by (rival 2\.0 \(rival:make\) and thirdparty 1\.0 \(thirdparty:net\)|"
     r"thirdparty .* and rival .*); uninstall all but one, or give model\.target '.*:(net|make)' in place of the name"),
    ("losses", "cooled", {}, r"method\.loss\.name: 'cooled' is registered by .* and .*"),
    ("models", "mlp", {"model": "mlp"}, TWICE.format(r"model\.name: 'mlp'", r"model\.target")),
    ("heads", "conv", {"method": {}}, TWICE.format(r"method\.head\.name: 'conv'", r"method\.head\.target")),
    ("data", "digits", {"data": {}}, TWICE.format(r"data\.name: 'digits'", r"data\.target")),
    ("partitions", "even", {"partition": {"stages": 2}},
     TWICE.format(r"partition\.strategy: 'even'", r"partition\.target")),
])
def test_one_name_registered_twice_is_refused_when_asked_for(installed, group, name, changes, match, capsys):
    register(installed, "rival", "2.0", **{group: {name: "make"}})
    refused(tree("bad", BY_NAME, **changes), capsys, match)


def test_a_name_registered_twice_harms_no_other(installed):
    register(installed, "rival", "2.0", models={"mlp": "make", "odd": "make"})
    assert train(tree("fine", BY_NAME)) == 0
