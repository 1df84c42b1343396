"""Forecasts of parameters, methods and optimizers that are not like most."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_forecast import CPU, network_of
from torch import nn

from blpipe.config_file import parse_config
from blpipe.forecast.costs import profile
from blpipe.forecast.memory import Rehearsal, estimated_bytes
from blpipe.forecast.report import make_report
from blpipe.forecast.stages import seconds_table, settle, stage_cost
from blpipe.plan import make_plan

DEEP = {"name": "mlp", "args": {"hidden": [64] * 8, "batch_norm": False}}
FAR = {"head": "linear", "link": {"reach": "all", "length": "all"}}


def frozen_net(width=256, depth=6):
    """Wide layers that are not trained, and a scale in each block that is."""
    class Scaled(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            self.layer, self.scale = nn.Linear(inputs, width).requires_grad_(False), nn.Parameter(torch.ones(width))

        def forward(self, x):
            return torch.tanh(self.layer(x.flatten(1))) * self.scale
    return [Scaled(128), *(Scaled(width) for _ in range(depth)), nn.Linear(width, 4)]


def repeated_net(width=128, depth=4):
    """One layer, several times."""
    layer = nn.Linear(width, width)
    return [nn.Sequential(nn.Flatten(), nn.Linear(128, width)),
            *(nn.Sequential(layer, nn.Tanh()) for _ in range(depth)), nn.Linear(width, 4)]


@pytest.mark.parametrize(("model", "method"), [
    (DEEP, FAR), ({"target": "test_forecast_corners:frozen_net"}, {}),
    ({"target": "test_forecast_corners:repeated_net"}, {})], ids=["far", "frozen", "repeated"])
def test_a_limit_that_stages_keep_is_no_reason_to_refuse_them(model, method):
    changes = {"model": model, "method": method, "optimizer": {"name": "adamw", "lr": 0.01},
               "partition": {"stages": 2, "strategy": "balanced", "costs": "analytic"}}
    network, data = network_of(**changes)
    config = settle(network.config, network, profile(network, CPU))
    plan = make_plan(config, data.spec, network)
    peaks = [Rehearsal(network, CPU).peak_bytes(start, end, plan.links[k])
             for k, (start, end) in enumerate(pairwise([*plan.starts, len(network.block_names)]))]
    changes["partition"] = {**changes["partition"], "memory_limit": max(peaks)}
    limited, _ = network_of(**changes)
    assert len(settle(limited.config, limited, profile(limited, CPU)).partition.cuts) == 1


def test_a_layer_that_is_there_several_times_is_counted_once():
    config = parse_config({"name": "repeated", "model": {"target": "test_forecast_corners:repeated_net"},
                           "data": {"name": "synthetic", "args": {"shape": [2, 8, 8], "classes": 4, "samples": 32}},
                           "partition": {"stages": 2, "cuts": ["5"], "costs": "analytic"}, "train": {"batch_size": 16}})
    first, last = make_report(config).stages
    assert (first.params, last.params) == (2 * (128 * 128 + 128), 128 * 4 + 4)


@pytest.mark.parametrize("changes", [
    {"optimizer": {"name": "adafactor", "lr": 0.01}}, {"optimizer": {"name": "asgd", "lr": 0.01}},
    {"train__replicas": 2, "method__link": {"length": "all", "joint": True}}], ids=["adafactor", "asgd", "replicas"])
def test_where_a_rehearsal_would_need_values_memory_is_estimated(changes):
    network, data = network_of(model=DEEP, partition={"stages": 2, "costs": "analytic"}, **changes)
    plan = make_plan(network.config, data.spec, network)
    assert Rehearsal(network, CPU).peak_bytes(0, 4, plan.links[0]) is None
    estimate = int(estimated_bytes(profile(network, CPU))[0, plan.starts[1]])
    assert make_report(network.config).stages[0].peak_memory_bytes == estimate > 0


def test_an_optimizer_of_matrices_alone_is_timed_with_one():
    network, data = network_of(model={"target": "test_forecast_corners:matrices"}, partition__stages=2,
                               method__head={"target": "test_forecast_corners:matrix"},
                               optimizer={"name": "muon", "lr": 0.01})
    assert profile(network, CPU, data).step_call > 0


def matrices():
    return [nn.Sequential(nn.Flatten(), nn.Linear(128, 8, bias=False)), nn.Linear(8, 4, bias=False)]


def matrix(boundary):
    return nn.Linear(boundary.shape[0], boundary.classes, bias=False)


def test_stages_that_send_no_error_are_not_charged_for_one():
    network, data = network_of(model=DEEP, partition__stages=4, method={"name": "greedy", "head": "linear"})
    costs, config = profile(network, CPU), network.config
    block = costs.blocks[2]
    alone = stage_cost(costs, 2, 3, config.method)
    assert alone.local_backward == pytest.approx(block.weight_backward + costs.head_seconds[3])
    plan = make_plan(config, data.spec, network)
    assert alone.local_backward == stage_cost(costs, 2, 3, config.method, plan.links[1]).local_backward
    assert np.isclose(seconds_table(costs, config.method)[2, 3], alone.batch_seconds("greedy", 1))
    linked = stage_cost(costs, 2, 3, config.method.model_copy(update={"name": "backlink"}))
    assert linked.local_backward == pytest.approx(block.backward + costs.head_seconds[3])
