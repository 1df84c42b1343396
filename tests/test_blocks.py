"""`blocks_of`: the blocks of a model as users write them compute what it computes, and follow its modules."""

import importlib
import pickle
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import keeping
import pytest
import torch
import traceable
from conftest import assert_same_run, small_config, state_of, train_in_processes, train_locally
from families import assert_same_state
from torch import nn

import blpipe
from blpipe.checkpoint.folders import newest_intact
from blpipe.checkpoint.state import model_state
from blpipe.config import PartitionConfig
from blpipe.config_file import parse_config
from blpipe.errors import ConfigError
from blpipe.models.build import as_blocks, model_notes
from blpipe.partition import partition
from blpipe.plan import make_plan, notices
from blpipe.specs import DataSpec


def line(mark: str) -> int:
    """The number of the line with this mark in the models' file."""
    lines = Path(traceable.__file__).read_text().splitlines()
    return next(i for i, text in enumerate(lines, start=1) if text.endswith(f'# line "{mark}"'))


def example(name, size=3):
    if name in ("Language", "Broadcasts", "Encoder", "CausalEncoder", "PaddedEncoder"):
        return torch.randint(0, 11, (size, 6))
    return torch.randn(size, 5, 4) if name in ("Windows", "SequenceFirst") else torch.randn(size, 4)


@pytest.mark.parametrize(("name", "blocks"), [
    ("Residuals", ["stem", "blocks_0", "blocks_1", "blocks_2", "head"]),
    ("Preactivations", ["a", "b", "c"]),
    ("Wrapped", ["inner_a", "inner_b", "inner_c"]),
    ("WrappedLayers", ["inner_a", "inner_b", "inner_c", "inner_d"]),
    ("Language", ["tokens", "layers_0", "layers_1", "layers_2", "logits"]),
    ("InPlace", ["a", "b", "c", "d"]),
    ("Tensors", ["fc"]),
    ("Recurrent", ["cell", "cell_1", "cell_2", "out"]),
    ("Auxiliary", ["a", "joined", "memory", "b"]),
    ("Asserts", ["fc"]),
    ("MakesModules", ["fc"]),
    ("SizesOneByOne", ["fc"]),
    ("DrawsForAKnownShape", ["fc"]),
    ("Encoder", ["tokens", "encoder_layers_0", "encoder_layers_1", "encoder_layers_2", "head"]),
    ("PaddedEncoder", ["tokens", "head"]),
    ("MostInOne", [*(f"narrow_{i}" for i in range(6)), "wide_up", "wide_down", "head"]),
    ("Shortcuts", ["a", "b", "c"]),
])
@pytest.mark.parametrize("known", [True, False], ids=["known shape", "any shape"])
@pytest.mark.parametrize("training", [True, False])
def test_the_blocks_are_the_model(name, blocks, known, training):
    torch.manual_seed(0)
    model = getattr(traceable, name)()
    plain, x = deepcopy(model).train(training), example(name)
    cut = blpipe.blocks_of(model, x if known else None).train(training)
    assert list(cut._modules) == blocks or (known and {*cut._modules} > {*blocks})  # more is known: it cuts no less
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted = plain(x.clone())
        torch.manual_seed(seed)
        given = x.clone()
        assert torch.equal(cut(given), wanted["out"] if isinstance(wanted, dict) else wanted)
        assert torch.equal(given, x)
    assert_same_state(plain, cut)


@pytest.mark.parametrize("name", ["Residuals", "Recurrent", "Language"])
def test_gradients_are_the_models(name):
    torch.manual_seed(0)
    model, x = getattr(traceable, name)().eval(), example(name)
    plain = deepcopy(model)
    plain(x.clone()).square().sum().backward()
    blpipe.blocks_of(model)(x).square().sum().backward()
    own = dict(model.named_parameters())
    assert own
    assert all(torch.equal(own[key].grad, parameter.grad) for key, parameter in plain.named_parameters())


@pytest.mark.parametrize(("name", "blocks"), [
    ("Residuals", ["stem", "blocks_0", "blocks_1", "blocks_2", "head"]),
    ("Language", ["tokens", "positions", "layers_0", "layers_1", "layers_2", "logits"]),
    ("Windows", ["embed", "layers_0", "layers_1"]),
    ("PassesSizesOn", ["a", "b", "c"]),
    ("FirstRows", ["a"]),
    ("SequenceFirst", ["a", "b", "d"]),
    ("CausalEncoder", ["tokens", *(f"encoder_layers_{i}{call}" for call in ("", "_1") for i in range(3)), "head"]),
])
@pytest.mark.parametrize("training", [True, False])
def test_blocks_for_a_known_shape_are_the_model_in_batches_of_any_size(name, blocks, training):
    torch.manual_seed(0)
    model = getattr(traceable, name)()
    plain = deepcopy(model).train(training)
    cut = blpipe.blocks_of(model, example(name, 1).to("meta")).train(training)
    assert list(cut._modules) == blocks
    for size in (1, 2, 3, 8, 40):
        x = example(name, size)
        torch.manual_seed(1)
        wanted = plain(x)
        torch.manual_seed(1)
        for block in cut:
            x = block(x)
            assert x.shape[0] == size
        assert torch.equal(x, wanted)


def test_sizes_decide_nothing_where_the_shape_is_not_known():
    with pytest.raises(ConfigError, match="cannot be used as inputs to control flow"):
        blpipe.blocks_of(traceable.Windows())


def test_a_decision_by_the_size_of_the_batch_holds_for_the_sizes_it_is_right_for():
    torch.manual_seed(0)
    model = traceable.Broadcasts()
    blocks = blpipe.blocks_of(model, example("Broadcasts"))
    for size in (2, 3, 40):
        x = example("Broadcasts", size)
        assert torch.equal(blocks(x), model(x))
    with pytest.raises(AssertionError, match="its forward decides by the size of the batch"):
        blocks(example("Broadcasts", 1))


def test_types_follow_autocast():
    model, x = traceable.FollowsADtype(), torch.randn(3, 4)
    blocks = blpipe.blocks_of(model, x)
    assert torch.equal(blocks(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert blocks(x).dtype == torch.bfloat16
        assert torch.equal(blocks(x), model(x))


def test_what_cannot_be_computed_without_values_leaves_sizes_to_the_blocks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            kept = self.a(x)[:, torch.tensor([True, False, True, False]).nonzero()[:, 0]]
            return self.b(kept.repeat(1, 4 // kept.shape[1])).view(x.shape[0], -1)
    net, x = Net(), torch.randn(3, 4)
    assert torch.equal(blpipe.blocks_of(net, x)(x), net(x))


@pytest.mark.parametrize("known", [True, False], ids=["known shape", "any shape"])
def test_tracing_leaves_the_model_as_it_was(known):
    model = traceable.Tensors()
    model.unused.eval()
    before, random = vars(model).keys() | set(), torch.get_rng_state()
    blpipe.blocks_of(model, torch.zeros(1, 4) if known else None)
    assert vars(model).keys() == before
    assert model.training and not model.unused.training
    assert model.count == 0
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["InPlace", "Preactivations", "Auxiliary"])
def test_a_block_does_not_write_into_its_input_nor_into_what_it_gave(name):
    x = torch.randn(3, 4)
    blocks = blpipe.blocks_of(getattr(traceable, name)())
    kept = []
    for block in blocks:
        kept.append((x, x.clone()))
        x = block(x)
    assert all(torch.equal(one, other) for one, other in kept)


@pytest.mark.parametrize(("name", "message"), [
    ("ControlFlow", 'at .*traceable.py:{control flow}: TraceError: symbolically traced variables'),
    ("InModule", r"at .*traceable.py:{control flow} \(module net\): TraceError: "),
    ("OverwritesUnderView", 'at .*traceable.py:{view}: it overwrites a tensor of which a view is used later'),
    ("OtherInTraining", 'at .*traceable.py:{mode}: its forward computes something else in training'),
    ("FixedNoise", 'at .*traceable.py:{noise}: RuntimeError: its forward draws random numbers'),
    ("MakesLayers", 'at .*traceable.py:{layer}: NameError: module is not installed as a submodule'),
    ("TwoInputs", r": TypeError: .*missing 1 required positional argument: 'y'"),
])
def test_a_model_that_cannot_be_traced_is_refused_with_the_place_and_the_ways_out(name, message):
    with pytest.raises(ConfigError) as caught:
        blpipe.blocks_of(getattr(traceable, name)())
    message = re.sub(r"\{(.+?)\}", lambda mark: str(line(mark[1])), message)
    assert re.match(f"model: cannot be traced ?{message}.*; rewrite that line .*torch.fx.wrap.*nn.Sequential, a list "
                    "or a dict$", str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_a_small_module_that_cannot_be_traced_is_kept_whole():
    blocks = blpipe.blocks_of(traceable.Residuals())
    assert isinstance(blocks.blocks_0.get_submodule("blocks.0.drop"), traceable.DropPath)
    nodes = [node for block in blpipe.blocks_of(traceable.Shortcuts()) for node in block.graph.nodes]
    assert {str(node.target) for node in nodes if node.op == "call_module"} == {
        "a", *(f"{block}.{part}" for block in "bc" for part in ("norm", "fc", "drop", "shortcut.0", "shortcut.1"))}


@pytest.mark.parametrize(("name", "notes"), [
    ("Residuals", []),
    ("Recurrent", []),
    ("Auxiliary", ["model: its forward returns 2 tensors; the blocks give one, the first that it returns in "
                   "evaluation, and what makes the others is not run"]),
    ("Checkpointed", ["model: its own activation checkpointing is not kept; set train.recompute=true"]),
    ("Masked", ["model: block layers_0 holds 86% of the parameters in one piece: a cut needs a place where a single "
                "tensor is live, and between its layers at least 2 are (gt in its forward, masked_fill in its "
                "forward); gt in its forward has no known shape"]),
    ("Encoder", []),
    ("PaddedEncoder", ["model: block tokens holds 99% of the parameters in one piece: an nn.TransformerEncoder that is "
                       "given a padding mask is left whole, as in evaluation it sets what is padded to 0; make it with "
                       "enable_nested_tensor=False to have it cut"]),
])
def test_what_tracing_leaves_out_is_told(name, notes):
    assert model_notes(blpipe.blocks_of(getattr(traceable, name)())) == notes


def test_notes_on_a_model_are_among_the_plans():
    config = parse_config({"name": "a", "model": {"target": "traceable:Masked"},
                           "partition": {"stages": 2}})
    assert len(notices(make_plan(config, DataSpec((4,), "float32", (), 2, 64, 2)))) == 1


def test_more_stages_than_blocks_are_refused_with_why_there_are_so_few():
    with pytest.raises(ConfigError, match=r"^partition\.stages: 3 stages need as many blocks, but the model has 2 "
                                          r"\(layers_0…head\); use at most 2 stages, or a model that can be cut into "
                                          r"more: block layers_0 holds 86% of the parameters in one piece: a cut needs "
                                          r"a place where .*\(gt in its forward, masked_fill in its forward\); gt in "
                                          r"its forward has no known shape$"):
        partition(PartitionConfig(stages=3), blpipe.blocks_of(traceable.Masked()))


def test_a_batch_size_that_a_model_decides_by_is_refused():
    config = parse_config({"name": "a", "model": {"target": "traceable:Broadcasts"},
                           "partition": {"stages": 2}, "train": {"batch_size": 2}})
    data = DataSpec((6,), "int64", (6,), 4, 4, 2)
    assert make_plan(config, data)
    with pytest.raises(ConfigError, match=r"^train\.batch_size: block \w+ cannot take a batch of 1: .* decides by the "
                                          r"size of the batch.*; set sizes, microbatches and train\.drop_last so"):
        make_plan(config, replace(data, train_samples=5))


def test_code_that_is_installed_need_not_be_rewritten(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/installed_by_a_test.py").write_text(Path(traceable.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    with pytest.raises(ConfigError) as caught:
        blpipe.blocks_of(importlib.import_module("installed_by_a_test").ControlFlow())
    assert str(caught.value).endswith("control flow; return the blocks yourself, as an nn.Sequential, a list or a dict")


def test_tied_parameters_stay_in_one_stage():
    blocks = blpipe.blocks_of(traceable.Language())
    with pytest.raises(ConfigError, match=r"tokens\.weight \(stage 1\) and logits\.weight \(stage 2\) are one param"):
        partition(PartitionConfig(stages=2), blocks)
    assert len(partition(PartitionConfig(stages=2), blpipe.blocks_of(traceable.Language(tied=False)))) == 2


def test_modules_with_a_forward_of_their_own_are_cut_and_containers_are_taken_as_they_are():
    class Chain(nn.ModuleList):
        def forward(self, x):
            for module in self:
                x = module(x)
            return x
    x, chain = torch.randn(3, 2), Chain([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)])
    blocks = as_blocks(chain)
    assert list(blocks._modules) == ["0", "2"]
    assert torch.equal(blocks(x), chain(x))
    taken = as_blocks(nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]))
    assert list(taken._modules) == ["0", "1"]


def test_block_names_are_free_of_dots_and_of_modules_own_names():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.append, self.a = nn.Linear(2, 2), nn.ModuleDict({"b": nn.Linear(2, 2)})

        def forward(self, x):
            return self.a["b"](self.append(x))
    assert list(blpipe.blocks_of(Net())._modules) == ["append_", "a_b"]


def test_a_size_that_is_no_batch_size_is_not_taken_for_one():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = self.a(x).view(-1, 2)
            rows = x.shape[0]
            x = self.b(x.view(-1, 4))
            return self.c(x.view(rows // 2, 4))
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 4)
    with pytest.raises(AssertionError, match="is used as the batch size, but it is another"):
        blpipe.blocks_of(net)(x)


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_every_stage_of_a_language_model_gives_logits_for_every_token(head):
    config = parse_config({"name": "a", "model": {"target": "traceable:Language", "args": {"tied": False}},
                           "partition": {"stages": 4}, "method": {"head": head}, "train": {"batch_size": 2}})
    plan = make_plan(config, DataSpec((6,), "int64", (6,), 11, 4, 2))
    assert [boundary.shape for boundary in plan.boundaries] == [(6, 8), (6, 8), (6, 8), (6, 11)]


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.net = nn.Linear(128, 4), traceable.Residuals()

    def forward(self, x):
        return self.net(self.first(x.flatten(1)))


def test_a_plain_module_trains_the_same_in_both_engines_and_exports_its_own_names(tmp_path):
    tree = small_config("plain", model={"target": "test_blocks:Flat"}, method__link={"length": "all"},
                        partition__stages=2, data__args={"shape": [2, 8, 8], "classes": 3, "samples": 48})
    run, = train_in_processes([tree], 2, tmp_path)
    local = train_locally(tree, tmp_path)
    assert_same_run(run, local)
    assert "optimizer/net.blocks.0.fc.weight/momentum_buffer" in state_of(run)
    Flat().load_state_dict(model_state(newest_intact(local)[0]), strict=True)


def test_what_a_users_code_keeps_is_made_by_its_runs_and_not_by_tracing():
    keeping.table.cache_clear()
    model, hooked = keeping.Keeping(), []
    model.first.register_forward_hook(lambda *given: hooked.append(given))
    blocks = blpipe.blocks_of(model, torch.empty(1, 8, device="meta"))
    assert not hooked and not keeping.table.cache_info().currsize
    assert model.masked.calls == 0 and model.masked.mask is None
    x = torch.randn(5, 8)
    assert torch.equal(blocks(x), model(x))
    asserts, = (note for note in model_notes(blocks) if "asserts" in note)
    assert re.fullmatch(r"model: asserts on values are not run \(tests/keeping\.py:\d+\)", asserts)


class ByBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x if x.shape[0] > 1 else -x)


def test_blocks_that_ask_for_the_batch_size_can_be_pickled():
    blocks = blpipe.blocks_of(ByBatch(), torch.empty(1, 8, device="meta"))
    x = torch.randn(5, 8)
    assert torch.equal(pickle.loads(pickle.dumps(blocks))(x), blocks(x))
