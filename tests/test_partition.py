"""Which blocks make which stage, and what cannot be cut."""

import itertools
import re
import sys
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blpipe.config import PartitionConfig
from blpipe.errors import ConfigError
from blpipe.models import resnet_cifar
from blpipe.partition import even_starts, partition

NAMES = ["stem", "layer1", "layer2", "layer3", "head"]


def model(names=NAMES) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, nn.Linear(2, 2)) for name in names))


def cut(blocks=None, **config) -> list[list[str]]:
    stages = partition(PartitionConfig.model_validate(config), model() if blocks is None else blocks)
    return [[name for name, _ in stage.named_children()] for stage in stages]


def refused(match: str, blocks=None, **config) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        cut(blocks, **config)
    assert "\n" not in str(caught.value)


# Even stages.

sizes = st.integers(1, 60).flatmap(lambda blocks: st.tuples(st.just(blocks), st.integers(1, blocks)))


@settings(deadline=None, max_examples=200)
@given(sizes=sizes)
def test_even_stages_differ_by_at_most_one_block_and_the_longer_come_last(sizes):
    blocks, stages = sizes
    starts = even_starts(blocks, stages)
    lengths = [stop - start for start, stop in itertools.pairwise([*starts, blocks])]
    assert starts[0] == 0
    assert len(lengths) == stages
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths)


@settings(deadline=None, max_examples=50)
@given(sizes=sizes)
def test_stages_are_contiguous_and_hold_every_block_once_under_its_own_name(sizes):
    blocks, stages = sizes
    whole = model([f"b{i}" for i in range(blocks)])
    parts = partition(PartitionConfig(stages=stages), whole)
    assert len(parts) == stages
    assert [key for part in parts for key in part.state_dict()] == list(whole.state_dict())
    assert all(ours is own for ours, own in zip((p for part in parts for p in part.parameters()), whole.parameters(),
                                                strict=True))


def test_even_stages_by_hand():
    assert cut(stages=2) == [NAMES[:2], NAMES[2:]]
    assert cut(stages=3) == [["stem"], ["layer1", "layer2"], ["layer3", "head"]]
    assert cut(stages=1) == [NAMES]
    assert cut(stages=5) == [[name] for name in NAMES]


@pytest.mark.parametrize("config", [{"stages": 6}, {"stages": 6, "target": "no:where"}])
def test_more_stages_than_blocks_are_refused(config):
    refused(r"^partition\.stages: 6 stages need as many blocks, but the model has 5 \(stem…head\); use at most 5 "
            "stages or a deeper model$", **config)


def test_an_unknown_strategy_is_refused():
    refused(r"^partition\.strategy: unknown 'evn' \(did you mean 'even'\?\); one of balanced, even, or "
            r"partition\.target for your own$", stages=2, strategy="evn")


# Cuts.

def test_cuts_name_the_first_block_of_each_later_stage():
    assert cut(cuts=["layer2", "head"]) == [["stem", "layer1"], ["layer2", "layer3"], ["head"]]
    assert cut(cuts=[]) == [NAMES]
    assert cut(cuts=NAMES[1:]) == [[name] for name in NAMES]


@pytest.mark.parametrize(("cuts", "message"), [
    (["layer9"], r"no block is named 'layer9' \(did you mean 'layer\d'\?\); the blocks are stem, layer1, .*, head$"),
    (["laier2"], r"no block is named 'laier2' \(did you mean 'layer2'\?\)"),
    (["zzz"], r"no block is named 'zzz'; the blocks are stem, "),
    (["layer2", "layer1"], "'layer1' is out of order: each cut must come after the one before"),
    (["layer2", "layer2"], "'layer2' is out of order: each cut must come after the one before"),
    (["stem"], "'stem' is out of order: .* the first stage begins with 'stem' anyway$"),
])
def test_cuts_that_do_not_fit_are_refused(cuts, message):
    refused(rf"^partition\.cuts: {message}", cuts=cuts)


# The user's own.

PLUGIN = """
def after_each_layer(blocks, stages, *, last="head"):
    assert stages == 3
    return ["layer1", last]

def returns(blocks, stages, what):
    return what

def fails(blocks, stages):
    raise KeyError("weights")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> str:
    """A module in the working directory; its name."""
    (tmp_path / "cuts_of_my_own.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.delitem(sys.modules, "cuts_of_my_own", raising=False)
    yield "cuts_of_my_own"
    sys.modules.pop("cuts_of_my_own", None)


def test_a_function_in_the_working_directory_cuts(plugin):
    assert cut(target=f"{plugin}:after_each_layer", stages=3) == [["stem"], ["layer1", "layer2", "layer3"], ["head"]]


def test_a_function_gets_its_args(plugin):
    assert cut(target=f"{plugin}:after_each_layer", stages=3, args={"last": "layer3"})[2] == ["layer3", "head"]


@pytest.mark.parametrize("what", [["layer1", "head"], [["stem"], ("layer1", "layer2", "layer3"), ["head"]]])
def test_a_function_returns_cuts_or_whole_stages(plugin, what):
    assert cut(target=f"{plugin}:returns", stages=3, args={"what": what}) == [["stem"], NAMES[1:4], ["head"]]


@pytest.mark.parametrize(("what", "stages", "message"), [
    ("layer1", 2, "it returned a str; return the list of the names of the blocks that stages 2, 3, … begin with, or a "
                  "list of block names for each stage$"),
    (None, 2, "it returned a NoneType; return the list"),
    ([2], 2, "no block is named 2; the blocks are stem"),
    ([["stem"], "head"], 2, r"no block is named \['stem'\].*; the blocks are stem"),
    (["layer7"], 2, r"no block is named 'layer7' \(did you mean"),
    (["head", "stem"], 3, "'stem' is out of order"),
    (["head"], 3, r"it made 2 stages; partition\.stages asks for 3$"),
    ([NAMES[:2], NAMES[2:]], 3, r"it made 2 stages; partition\.stages asks for 3$"),
    ([NAMES[:3], NAMES[2:]], 2, "'layer2' is in stage 1 and again in stage 2; put each block into one stage, once$"),
    ([["stem", "stem"], NAMES[1:]], 2, "'stem' is in stage 1 and again in stage 1; put each block into one stage"),
    ([["stem"], ["layer2", "head"]], 2, "no stage holds 'layer1', 'layer3'; put each block into a stage$"),
    ([["stem", "layer2"], ["layer1", "layer3", "head"]], 2, r"'layer2' \(stage 1\) is out of order: 'layer1' \(stage "
     r"2\) comes before it; stages are runs of blocks in the model's order$"),
    ([NAMES[2:], NAMES[:2]], 2, r"'layer2' \(stage 1\) is out of order: 'stem' \(stage 2\) comes before it"),
    ([["stem"], [], NAMES[1:]], 3, "stage 2 is empty; give each stage at least one block, or ask for fewer$"),
    ([["stem", "laier1"], NAMES[2:]], 2, r"no block is named 'laier1' \(did you mean 'layer1'\?\); the blocks are"),
    ([[["stem"]], NAMES[1:]], 2, r"no block is named \['stem'\]"),
])
def test_what_a_function_returns_is_checked(plugin, what, stages, message):
    refused(rf"^partition\.target: {message}", target=f"{plugin}:returns", stages=stages, args={"what": what})


@pytest.mark.parametrize(("function", "args", "message"), [
    ("fails", {}, r"^partition\.target: KeyError: 'weights'"),
    ("fails", {"x": 1}, r"^partition\.target\.args: got an unexpected keyword argument 'x'; it takes no arguments"),
    ("none", {}, r"^partition\.target: cannot import 'cuts_of_my_own:none': AttributeError"),
])
def test_a_function_that_cannot_be_called_is_refused(plugin, function, args, message):
    refused(message, target=f"{plugin}:{function}", stages=2, args=args)


# Tied parameters.

def tied() -> nn.Sequential:
    blocks = model()
    blocks.head.weight = blocks.layer2.weight
    return blocks


def test_a_parameter_of_two_stages_is_refused_with_both_names():
    refused(r"^partition: layer2\.weight \(stage 1\) and head\.weight \(stage 2\) are one parameter; "
            r"cut so that both are in one stage, or make one of them nn\.Parameter\(weight\.clone\(\)\) as the "
            "model is made$", tied(), cuts=["layer3"])


def test_a_parameter_tied_within_a_stage_is_fine():
    assert cut(tied(), cuts=["layer2"]) == [["stem", "layer1"], ["layer2", "layer3", "head"]]


def test_running_statistics_of_two_stages_are_refused():
    norm = nn.BatchNorm1d(3, affine=False)
    blocks = nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3), norm)
    refused(r"^partition: 3 \(stage 2\) is in stage 1 too, and has running statistics; cut so that both are in one "
            "stage, or use two modules$", blocks, cuts=["2"])


# Sequences that users write.

def composed(blocks: nn.Sequential, stages: int, x: torch.Tensor) -> torch.Tensor:
    for part in partition(PartitionConfig(stages=stages), blocks):
        x = part(x)
    return x


def test_a_module_used_twice_keeps_both_places():
    relu = nn.ReLU()
    blocks, x = nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu, nn.Linear(3, 3)), torch.randn(4, 3)
    assert torch.equal(composed(blocks, 2, x), blocks(x))


class OwnSequence(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def test_a_sequence_with_a_constructor_of_its_own_can_be_cut():
    blocks, x = OwnSequence(3), torch.randn(4, 3)
    assert torch.equal(composed(blocks, 2, x), blocks(x))


def test_the_stages_one_after_the_other_are_the_model():
    blocks, x = model(), torch.randn(4, 2)
    for stages in range(1, 6):
        assert torch.equal(composed(blocks, stages, x), blocks(x))


def test_the_order_of_the_names_in_an_error_is_the_models():
    refused(re.escape("; the blocks are " + ", ".join(NAMES)), cuts=["q"])


@pytest.mark.parametrize("cut", ["layer1_1.conv2", "layer1_1_conv2", "conv2"])
def test_a_cut_inside_a_residual_connection_is_refused_with_the_cuts_beside_it(cut):
    with pytest.raises(ConfigError, match=re.escape(f"partition.cuts: {cut!r} lies inside block 'layer1_")) as error:
        partition(PartitionConfig(cuts=(cut,)), resnet_cifar(14))
    if cut != "conv2":  # which every block has; the first one is named
        assert str(error.value).endswith("a stage can begin with 'layer1_1' or 'layer2_0'")
