"""Blocks that run again in their backward: the run is that of blocks that keep everything, and needs less memory."""

from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, small_config, train_in_processes, train_locally
from test_checkpoints import METHODS, go_on, rewound, saved_config
from test_forecast import CPU, network_of
from torch import nn

from blpipe.config import LinkConfig, MethodConfig
from blpipe.config_file import parse_config
from blpipe.engines.common import blame
from blpipe.errors import ConfigError
from blpipe.forecast.costs import profile
from blpipe.forecast.forecast import Forecaster
from blpipe.forecast.memory import Rehearsal, estimated_bytes
from blpipe.forecast.simulate import CONNECTIONS
from blpipe.forecast.stages import stage_cost
from blpipe.recompute import Recomputed

SETTINGS = METHODS | {
    "on_time_recomputed": {"method__link": {"delay": 0, "length": 2, "keep": "recompute"}},
    "far_recomputed": {"method__link": {"length": "all", "reach": 2, "keep": "recompute"}, "train__microbatches": 2},
    "in_bf16": {"method__link": {"delay": 0, "length": "all"}, "train__precision": "bf16",
                "train__channels_last": True}}
THROUGH_ALL = [{"method__link": {"length": "all", **link}, "partition__stages": 2}
               for link in ({"delay": 0}, {"delay": 1}, {"delay": 1, "joint": True}, {"delay": 1, "keep": "recompute"})]
LATE = [{"method__link": {"length": 1, **link}, "partition__stages": 4, "train__microbatches": 2}
        for link in ({"delay": 1}, {"delay": 1, "joint": True})]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_recomputes_is_the_run_that_does_not(name, tmp_path):
    """With BatchNorm and dropout."""
    plain, again = (train_locally(saved_config(name, 0, train__epochs=1, train__recompute=on, **SETTINGS[name]),
                                  tmp_path / str(on)) for on in (False, True))
    assert_same_run(plain, again)


def test_so_it_is_in_processes(tmp_path):
    trees = [saved_config(name, 0, train__recompute=True, **METHODS[name]) for name in ("in_time", "far")]
    bp = [saved_config(f"bp_{on}", 0, train__recompute=on, **METHODS["bp"]) for on in (False, True)]
    *runs, plain, again = train_in_processes([*trees, *bp], 3, tmp_path)
    assert_same_run(plain, again)
    for tree, run in zip(trees, runs, strict=True):
        assert_same_run(run, train_locally({**tree, "train": {**tree["train"], "recompute": False}}, tmp_path))


class Counts(nn.Module):
    """Adds how often it was run in training, a buffer that it replaces, and counts all its runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        self.count = self.count + 1
        return x.sin() + self.count


def test_a_block_runs_again_in_every_backward_with_the_buffers_of_its_forward():
    block = Counts()
    run, x = Recomputed(nn.Sequential(block)), torch.ones(3, requires_grad=True)
    first, second = run(x), run(x)
    assert (first - second).tolist() == [-1.0] * 3
    for _ in range(2):
        torch.autograd.grad(first.sum(), x, retain_graph=True)
    torch.autograd.grad(second.sum(), x)
    assert block.count == 2
    assert block.runs == 5


def test_the_last_block_need_not_run_again():
    blocks = nn.Sequential(Counts(), Counts())
    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Recomputed(blocks, last=False)(x).sum(), x)
    assert [block.runs for block in blocks] == [2, 1]


class Remembers(nn.Module):
    """Has a buffer that another module has too, and one that is none at first."""

    def __init__(self):
        super().__init__()
        self.other = nn.Module()
        self.register_buffer("sum", None)
        self.register_buffer("seen", torch.zeros(()))
        self.other.register_buffer("seen", self.seen)

    def forward(self, x):
        with torch.no_grad():
            self.seen.add_(1)
            self.sum = x.mean() if self.sum is None else self.sum + x.mean()
        return (x * self.other.seen + self.sum).sin()


def test_a_buffer_may_be_that_of_two_modules_or_none():
    plain, again = Remembers(), Remembers()
    for block, run in ((plain, plain), (again, Recomputed(nn.Sequential(again)))):
        x = torch.ones(3, requires_grad=True)
        block.gradients = [torch.autograd.grad(run(scale * x).sum(), x)[0] for scale in (1, 2)]
    assert all(map(torch.equal, plain.gradients, again.gradients))
    assert torch.equal(plain.sum, again.sum)
    assert again.seen is again.other.seen
    assert again.seen == 2


@pytest.mark.parametrize("changes", [{"method": "greedy", "partition__stages": 2}, *THROUGH_ALL, *LATE])
def test_a_stage_needs_less_memory(changes):
    def network(on):
        return network_of(model={"name": "resnet_cifar", "args": {"depth": 32}}, train__recompute=on,
                          data__args={"shape": [3, 32, 32], "classes": 10, "samples": 64}, **changes)[0]

    recomputed = network(True)
    plain, again = (Rehearsal(each, CPU) for each in (network(False), recomputed))
    exact = {(start, end): again.peak_bytes(start, end) for start, end in ((0, 6), (6, 12), (16, 17))}
    assert exact[0, 6] < 0.6 * plain.peak_bytes(0, 6)
    estimates = estimated_bytes(profile(recomputed, CPU))
    for (start, end), peak in exact.items():
        assert 0.7 < estimates[start, end] / peak < 1.1


def test_what_runs_again_costs_its_forward_again():
    costs = {on: profile(network_of(partition__stages=2, train__recompute=on)[0], CPU) for on in (False, True)}

    def stage(on, **link):
        method = MethodConfig(name="backlink" if link else "greedy", link=LinkConfig(**link))
        return stage_cost(costs[on], 1, 4, method), costs[on].sums["forward"]

    def forward_again(field, **link):
        (plain, sums), (again, _) = stage(False, **link), stage(True, **link)
        return float(getattr(again, field) - getattr(plain, field)), sums

    for link in ({}, {"delay": 0}, {"delay": 1}):
        seconds, sums = forward_again("local_backward", **link)
        assert seconds == pytest.approx(sums[4] - sums[1])
    for delay in (0, 1):
        assert forward_again("link_backward", delay=delay, length=2)[0] == pytest.approx(sums[4] - sums[2])
    # The tail is run again as it is; of its blocks, all but the last run once more.
    assert forward_again("link_backward", length=2, keep="recompute")[0] == pytest.approx(sums[3] - sums[2])
    assert forward_again("link_backward", length=1, keep="recompute")[0] == 0
    assert forward_again("backward")[0] == pytest.approx(sums[4] - sums[1])


def test_a_joint_backward_runs_each_block_again_where_it_goes_back_through_it():
    costs = {on: profile(network_of(partition__stages=4, train__recompute=on)[0], CPU) for on in (False, True)}

    def stage(on, length):
        method = MethodConfig(link=LinkConfig(length=length, joint=True))
        return stage_cost(costs[on], 0, 3, method), costs[on].sums["forward"]

    for length, of_the_local_loss, of_the_link in ((1, (0, 3), (2, 3)), ("all", (0, 0), (0, 3))):
        (plain, sums), (again, _) = stage(False, length), stage(True, length)
        for field, (start, end) in (("local_backward", of_the_local_loss), ("link_backward", of_the_link)):
            assert getattr(again, field) - getattr(plain, field) == pytest.approx(sums[end] - sums[start])


def test_plan_charges_every_method_for_what_runs_again():
    def seconds(on):
        network, _ = network_of(partition__stages=3, train={"recompute": on, "batch_size": 16, "microbatches": 4})
        forecaster = Forecaster(profile(network, CPU), network.config, CONNECTIONS["cuda"])
        return {row.method: row.seconds_per_step for row in forecaster.compare(3)}

    plain, again = seconds(False), seconds(True)
    assert all(again[method] > 1.1 * plain[method] for method in plain)


class Fails(nn.Module):
    """Has a buffer, and does not run twice."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        if self.count > 1:
            raise RuntimeError("not again")
        return x.sin()


def test_a_block_that_fails_when_it_runs_again_leaves_its_buffers_as_they_were():
    block, x = Fails(), torch.ones(3, requires_grad=True)
    out = Recomputed(nn.Sequential(block))(x)
    block.count = live = block.count + 5
    block.register_forward_pre_hook(lambda module, given: setattr(module, "count", module.count + 1))
    with pytest.raises(RuntimeError, match="not again"):
        torch.autograd.grad(out.sum(), x)
    assert block.count is live


@pytest.mark.parametrize(("changes", "key"), [({"train__compile": True}, "train.compile"),
                                              ({"runtime__cuda_graphs": True}, "runtime.cuda_graphs")])
def test_it_goes_without_what_cannot_run_again(changes, key):
    with pytest.raises(ConfigError, match=f"train.recompute: true, which goes without {key}"):
        parse_config(small_config("both", train__recompute=True, **changes))


@pytest.mark.parametrize(("changes", "ways"), [
    ({"method": "greedy"}, "use train.recompute=true, more microbatches or more stages"),
    ({"train__recompute": True}, "use method.link.keep=recompute, more microbatches or more stages"),
    ({"method": "greedy", "runtime__cuda_graphs": True}, "use runtime.cuda_graphs=false, more microbatches or")])
def test_a_stage_that_runs_out_of_memory_says_what_needs_less(changes, ways):
    config = parse_config(small_config("large", **changes))
    plan = SimpleNamespace(config=config, replica=1, stages=[[], []], block_names=lambda index: ["stem", "layer1_0"])
    assert ways in str(blame(plan, 1, "step 3", torch.OutOfMemoryError("CUDA out of memory")))
    assert str(blame(plan, 1, "step 3", RuntimeError("shapes do not match"))) == (
        "stage 2 (rank 3, blocks stem…layer1_0) failed at step 3: RuntimeError: shapes do not match")


@pytest.mark.parametrize(("name", "change"), [("late", "train.recompute=true"), ("in_time", "train.recompute=true"),
                                              ("three_late", "method.link.keep=recompute")])
def test_a_run_that_goes_on_may_recompute(name, change, tmp_path):
    whole = train_locally(saved_config(name, **METHODS[name]), tmp_path)
    assert_same_run(whole, go_on(rewound(whole, 5, tmp_path / "resumed"), change))
