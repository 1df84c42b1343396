"""Parts that cannot be tried for their costs: `plan` and balanced runs name them in one line."""

import pytest
import torch
import torch.nn.functional as F
from conftest import metrics_of, small_config, train_locally
from torch import nn

from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.errors import ConfigError
from blpipe.forecast.costs import profile
from blpipe.forecast.report import make_report
from blpipe.plan import make_network

CUTS = {"cuts": ["1"], "costs": "analytic"}
BALANCED = {"stages": 2, "strategy": "balanced", "costs": "analytic"}
MEASURED = {"stages": 2, "strategy": "balanced"}


def net():
    return [nn.Sequential(nn.Flatten(), nn.Linear(128, 6)), nn.Linear(6, 6), nn.Linear(6, 4)]


def normed_net():
    blocks = net()
    return [torch.nn.utils.weight_norm(block) if isinstance(block, nn.Linear) else block for block in blocks]


class Unlucky(nn.Module):
    """Runs without values on the meta device alone."""

    def forward(self, x):
        if x.device.type != "meta":
            raise RuntimeError("out of luck")
        return x


def unlucky_net():
    return [*net()[:1], Unlucky(), *net()[1:]]


def number():
    return lambda logits, targets: 1.0


def counting():
    return lambda logits, targets: F.cross_entropy(logits, targets) * len(set(targets.numpy()))


def writing():
    return lambda logits, targets: F.cross_entropy(logits.sub_(1.0), targets)


def reading():
    return lambda logits, targets: F.cross_entropy(logits, targets) * logits.sum().item()


class AddsInPlace(nn.Linear):
    """Writes to its input."""

    def forward(self, x):
        return super().forward(x.add_(1.0))


class Looks(nn.Linear):
    """Decides by a value."""

    def forward(self, x):
        return super().forward(x + 1 if x.sum().item() > 3 else x)


def writing_head(boundary):
    return AddsInPlace(6, 4)


def reading_head(boundary):
    return Looks(6, 4)


def shy_head(boundary):
    return (AddsInPlace if boundary.index == 0 else nn.Linear)(6, 4)


def tree_of(partition, **changes):
    changes = {"model": {"target": "test_trials:net"}, "method__head": "linear", **changes}
    return small_config("tried", partition=partition, train__epochs=1, **changes)


def refused(partition, **changes):
    with pytest.raises(ConfigError) as error:
        make_report(parse_config(tree_of(partition, **changes)))
    line, = str(error.value).splitlines()
    return line


@pytest.mark.parametrize("partition", [CUTS, BALANCED, MEASURED])
@pytest.mark.parametrize(("loss", "said"), [
    ("number", "method.loss: the function must return a scalar tensor"),
    ("counting", "method.loss: RuntimeError: .numpy() "),
    ("writing", "method.loss: RuntimeError: a leaf Variable that requires grad is being used in an in-place operation"),
    ("reading", "method.loss: it reads values of its tensors (")])
def test_a_loss_that_cannot_be_tried_is_named(loss, said, partition):
    line = refused(partition, method__loss={"target": f"test_trials:{loss}"})
    assert line.startswith(said)
    assert loss == "number" or line.endswith("train with partition.cuts, which need no trial")


@pytest.mark.parametrize(("head", "partition", "said"), [
    ("writing_head", CUTS, "method.head (after block 0): RuntimeError: a leaf Variable that requires grad "),
    ("writing_head", MEASURED, "method.head (after block 0): RuntimeError: a leaf Variable that requires grad "),
    ("reading_head", CUTS, "method.head (after block 0) cannot be traced: "),
    ("reading_head", BALANCED, "method.head (after block 0): it reads values of its tensors (")])
def test_a_head_that_cannot_be_tried_is_named(head, partition, said):
    assert refused(partition, method__head={"target": f"test_trials:{head}"}).startswith(said)


def test_a_block_that_cannot_be_tried_is_named():
    line = refused(BALANCED, model={"target": "test_trials:unlucky_net"})
    assert line.startswith("model: block 1: RuntimeError: out of luck; ")


def test_a_head_that_fits_elsewhere_only_keeps_stages_from_ending_there():
    config = parse_config(tree_of(BALANCED, method__head={"target": "test_trials:shy_head"}))
    network = make_network(config, open_data(config.data, config.seed).spec)
    assert [head is not None for head in profile(network, torch.device("cpu")).heads] == [False, True, True]
    assert make_report(config).plan.config.partition.cuts == ("2",)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("partition", [BALANCED, MEASURED])
def test_weights_that_every_forward_computes_are_copied_without_their_graphs(tmp_path, partition):
    tree = tree_of(partition, model={"target": "test_trials:normed_net"}, train__replicas=2)
    assert metrics_of(train_locally(tree, tmp_path))
