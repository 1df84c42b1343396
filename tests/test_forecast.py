"""Costs of blocks and stages, balanced cuts under limits, and the memory of a stage against what torch allocates."""

import json
import re
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_same_run, small_config, train_in_processes, train_locally
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from blpipe.config import LinkConfig, MethodConfig
from blpipe.config_file import load_config, parse_config
from blpipe.data import open_data
from blpipe.engines.build import build_stage
from blpipe.engines.common import role
from blpipe.errors import ConfigError
from blpipe.forecast.costs import profile
from blpipe.forecast.forecast import Forecaster
from blpipe.forecast.memory import Rehearsal, estimated_bytes
from blpipe.forecast.report import make_report
from blpipe.forecast.simulate import CONNECTIONS, Connection
from blpipe.forecast.stages import balanced_starts, seconds_table, settle, stage_cost
from blpipe.links import Links
from blpipe.plan import make_network, make_plan
from blpipe.program import Factors, Ports, errors_ahead, execute, train_program
from blpipe.steps import Step

CPU = torch.device("cpu")
LAST_LOSS = {"local_weight": 0.0, "link": {"length": "all", "reach": "all", "take": "farthest"}}
MLP = {"name": "mlp", "args": {"hidden": [32] * 6, "batch_norm": False}}


def network_of(**changes):
    config = parse_config(small_config("forecast", **changes))
    data = open_data(config.data, config.seed)
    return make_network(config, data.spec), data


def test_alike_blocks_cost_alike_and_flops_are_counted():
    network, _ = network_of(model=MLP, partition__stages=2)
    costs = profile(network, CPU)
    assert costs.blocks[2] == costs.blocks[3]
    assert costs.blocks[0] != costs.blocks[2]
    # A forward, and a backward for the input and for the weights: 3 products of 16 × 32 × 32.
    assert costs.blocks[2].flops == 3 * 2 * 16 * 32 * 32
    assert costs.blocks[2].params == 32 * 32 + 32
    assert costs.blocks[2].output_bytes == 4 * 16 * 32
    assert not costs.measured


def test_measured_costs_are_seconds_and_leave_the_model_as_it_is():
    network, data = network_of(partition__stages=2)
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    random_state = torch.get_rng_state()
    costs = profile(network, CPU, data)
    assert costs.measured
    assert all(0 < block.forward < 1 and 0 < block.backward < 1 for block in costs.blocks)
    assert costs.feed > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in network.model.state_dict().items())
    assert all(parameter.grad is None for parameter in network.model.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    assert network.model.training


def linked(**link):
    return MethodConfig(link=LinkConfig(**link))


def test_a_stage_costs_its_blocks_its_head_and_its_link():
    network, _ = network_of(partition__stages=2)
    costs = profile(network, CPU)
    blocks, count = costs.blocks, len(costs.blocks)
    for start, end in ((0, 2), (1, 4), (2, count)):
        stage = stage_cost(costs, start, end, linked(length=1))
        inner = blocks[start:end]
        assert stage.forward == pytest.approx(sum(b.forward for b in inner))
        for_input = blocks[0].backward - blocks[0].weight_backward if start == 0 else 0.0
        head = costs.heads[end - 1]
        assert stage.local_backward == pytest.approx(
            sum(b.backward for b in inner) - for_input + head.forward + head.backward)
        assert stage.link_backward == pytest.approx(0.0 if end == count else inner[-1].weight_backward)
        assert stage.batch_seconds("backlink", 4) == pytest.approx(
            4 * (stage.forward + stage.local_backward + stage.link_backward) + stage.step + stage.head_step)
    both = stage_cost(costs, 1, 4, linked(length=2))
    assert both.link_backward == pytest.approx(blocks[2].weight_backward + blocks[3].backward)
    again = stage_cost(costs, 1, 4, linked(length=2, keep="recompute"))
    assert again.link_backward == pytest.approx(both.link_backward + blocks[2].forward + blocks[3].forward)
    assert stage_cost(costs, 0, 4, linked(weight=0.0)).link_backward == 0.0


def test_errors_that_reach_further_cost_a_backward_through_the_stage_for_each_hop_but_the_last():
    network, _ = network_of(partition__stages=4)
    costs = profile(network, CPU)
    stage, count = costs.blocks[1:3], len(costs.blocks)
    one, three, far = (stage_cost(costs, 1, 3, linked(length="all", **link))
                       for link in ({}, {"reach": 3}, {"reach": 3, "take": "farthest"}))
    assert (one.hops, three.hops) == (1, 3)
    assert three.link_backward == pytest.approx(one.link_backward + 2 * sum(b.backward for b in stage))
    assert far.link_backward == pytest.approx(one.link_backward + 2 * sum(b.input_backward for b in stage))
    assert stage_cost(costs, 1, count - 1, linked(length="all", reach=3)).hops == 1
    trains_and_passes, passes = (sum(getattr(b, field) for b in stage) for field in ("backward", "input_backward"))
    for links, take, expected in ((Links((1,), (1, 2), 2), "every", trains_and_passes),
                                  (Links((1,), (1,), 2), "every", one.link_backward),
                                  (Links((1,), (1, 2), 2, weight=0.0), "every", passes),
                                  (Links((1, 2), (1, 2, 3), 2), "farthest", passes + trains_and_passes)):
        known = stage_cost(costs, 1, 3, linked(length="all", reach=3, take=take), links)
        assert known.link_backward == pytest.approx(expected)
    alone = stage_cost(costs, 1, 3, MethodConfig(local_weight=0.0))
    weights = sum(b.backward - b.input_backward for b in stage)
    assert alone.local_backward == pytest.approx(one.local_backward - weights)


def test_a_joint_backward_saves_the_local_one_but_for_the_error_that_is_sent():
    network, _ = network_of(partition__stages=4)
    costs = profile(network, CPU)
    for start, end, links in ((0, 2, Links((1,), (), 2)), (1, 3, Links((1,), (1,), 2))):
        twice, once = linked(length="all"), linked(length="all", joint=True)
        known = [stage_cost(costs, start, end, once, of_stage) for of_stage in (None, replace(links, joint=True))]
        before, stage = stage_cost(costs, start, end, twice, links), costs.blocks[start:end]
        sent = sum(b.input_backward for b in stage) if start else 0.0
        for joint in known:
            assert joint.link_backward == pytest.approx(before.link_backward)
            assert joint.local_backward == pytest.approx(costs.head_seconds[end] + sent)
        greedy = MethodConfig(name="greedy", link=once.link)  # which sends nothing
        saved = stage[0].backward - stage[0].weight_backward if start else 0.0
        assert stage_cost(costs, start, end, greedy).local_backward == pytest.approx(before.local_backward - saved)


def test_a_joint_backward_through_a_tail_saves_the_local_gradients_of_its_parameters():
    network, _ = network_of(partition__stages=4)
    costs = profile(network, CPU)
    saved = costs.blocks[2].backward - costs.blocks[2].input_backward
    for start in (0, 1):
        twice, once = (stage_cost(costs, start, 3, linked(length=1, joint=joint)) for joint in (False, True))
        known = stage_cost(costs, start, 3, linked(length=1, joint=True), Links((1,), (1,) * start, 1, joint=True))
        for cost in (once, known):
            assert cost.link_backward == twice.link_backward
            assert cost.local_backward == pytest.approx(twice.local_backward - saved)


@pytest.mark.parametrize(("length", "joint"), [("all", False), ("all", True), (1, True)])
@pytest.mark.parametrize("name", ["backlink", "greedy"])
def test_tables_for_all_stages_say_what_each_stage_says(name, length, joint):
    network, _ = network_of(partition__stages=2, method={"name": name, "link": {"length": length, "joint": joint}})
    costs, method = profile(network, CPU), linked(length=length, joint=joint)
    table = seconds_table(costs, method.model_copy(update={"name": "backlink"}))
    for start in range(len(costs.blocks)):
        for end in range(start + 1, len(costs.blocks) + 1):
            assert table[start, end] == stage_cost(costs, start, end, method).batch_seconds("backlink", 1)
    assert np.isinf(np.tril(table)[np.tril_indices(len(table))]).all()


def test_a_faster_device_gets_more_blocks():
    network, _ = network_of(model=MLP, partition={"stages": 2, "strategy": "balanced"})
    costs = profile(network, CPU)
    even, = balanced_starts(costs, "bp", parse_config(small_config("x", partition={
        "stages": 2, "strategy": "balanced"})).partition)[1:]
    fast, = balanced_starts(costs, "bp", parse_config(small_config("x", partition={
        "stages": 2, "strategy": "balanced", "speeds": [1, 3]})).partition)[1:]
    assert fast < even


def test_no_cut_between_blocks_that_share_a_parameter():
    network, _ = network_of(model={"target": "models_under_test:tied_net"}, partition__stages=3)
    costs = profile(network, CPU)
    partition = parse_config(small_config("x", partition={"stages": 3, "strategy": "balanced"})).partition
    starts = balanced_starts(costs, "backlink", partition)
    assert not {2, 3} & set(starts)
    with pytest.raises(ConfigError, match="cannot be cut into 5 stages: shared parameters"):
        balanced_starts(costs, "backlink", partition.model_copy(update={"stages": 5}))


def test_no_cut_between_blocks_that_share_running_statistics():
    network, data = network_of(model={"target": "test_forecast:normed_net"}, method__head="linear", partition={
        "stages": 2, "strategy": "balanced", "costs": "analytic"})
    config = settle(network.config, network, profile(network, CPU))
    assert config.partition.cuts == ("3",)
    assert len(make_plan(config, data.spec, network).stages) == 2


def normed_net():
    """Most work in its first block, whose statistics the second one has too."""
    norm = nn.BatchNorm1d(64, affine=False)
    first = nn.Sequential(nn.Flatten(), nn.Linear(128, 64), norm)
    return [first, nn.Sequential(nn.Linear(64, 64), norm), nn.Linear(64, 8), nn.Linear(8, 4)]


@pytest.mark.parametrize(("hidden", "stages", "method", "exact"), [
    # Work is where balance would leave more blocks than that to a stage that errors must run through.
    ([16, 16, 16, 16, 16, 128], 2, {"local_weight": 0.0, "link": {"length": 3}}, True),
    ([128, 128, 4, 4, 4, 128, 128], 3, {"link": {"reach": 2, "length": 2}}, True),
    ([128, 128, 4, 4, 128, 128], 4, {"link": {"reach": 2, "length": 1, "weight": [0, 1, 1]}}, False),  # stage 3 alone
])
def test_stages_that_errors_must_run_through_stay_within_the_links_length(hidden, stages, method, exact):
    changes = {"model": {"name": "mlp", "args": {"hidden": hidden, "batch_norm": False}},
               "method": {"head": "linear", **method}}
    network, data = network_of(**changes, partition={"stages": stages, "strategy": "balanced", "costs": "analytic"})
    costs, names = profile(network, CPU), network.block_names
    table = seconds_table(costs, network.config.method)

    def is_refused(cuts):
        config = parse_config(small_config("forecast", **changes, partition={"cuts": [names[cut] for cut in cuts]}))
        try:
            make_plan(config, data.spec, network)
        except ConfigError:
            return True
        return False

    assert not is_refused([names.index(cut) for cut in settle(network.config, network, costs).partition.cuts])
    refused = {cuts for cuts in combinations(range(1, len(names)), stages - 1) if is_refused(cuts)}
    infinite = {cuts for cuts in combinations(range(1, len(names)), stages - 1)
                if any(np.isinf(table[start, end]) for start, end in pairwise([0, *cuts, len(names)]))}
    assert refused
    assert infinite == refused if exact else infinite > refused


@pytest.mark.parametrize("limit", [None, "1GB"])
def test_where_no_cut_keeps_the_links_length_that_is_said(limit):
    network, _ = network_of(model={"target": "test_forecast:normed_net"}, partition={
        "stages": 2, "strategy": "balanced", "costs": "analytic", "memory_limit": limit},
        method={"head": "linear", "local_weight": 0.0, "link": {"length": 1}})
    with pytest.raises(ConfigError) as caught:
        settle(network.config, network, profile(network, CPU))
    assert str(caught.value) == (
        "method.link.length: 1: no cut into 2 stages leaves as few blocks to each stage whose errors must run through "
        "all of them, at method.local_weight 0; set method.link.length=all")


def test_a_forecast_of_cuts_that_a_plan_takes_begins_with_their_own_method():
    report = make_report(parse_config(small_config(
        "own", model=MLP, partition={"cuts": ["layer2", "layer5", "layer6"], "costs": "analytic"},
        method={"head": "linear", "link": {"reach": 2, "weight": [0, 1, 1]}})))
    assert report.methods[0].method == "backlink d=1 r=2"


@pytest.mark.parametrize("changes", [
    {}, {"train__microbatches": 4}, {"method__link": {"length": "all", "delay": 2}},
    {"method__link": {"length": "all", "keep": "recompute"}},
    {"method": "greedy", "optimizer": {"name": "adamw", "lr": 0.1}},
    {"method": {"link": {"reach": 2, "length": "all", "wire": "bf16"}, "local_weight": 0.0},
     "train__wire": "bf16", "partition__stages": 3},
    {"method__link": {"length": "all", "joint": True}, "partition__stages": 3},
    {"train__replicas": 2, "method__link": {"delay": 0}}, {"train__ema": 0.9, "train__microbatches": 8}])
def test_predicted_peak_memory_is_within_15_percent_of_what_torch_allocates(changes):
    network, data = network_of(model={"name": "resnet_cifar", "args": {"depth": 14}}, **{
        "partition__stages": 2, "data__args": {"shape": [3, 32, 32], "classes": 10, "samples": 64}, **changes})
    plan = make_plan(network.config, data.spec, network)
    for k, (start, end) in enumerate(pairwise([*plan.starts, len(network.block_names)])):
        predicted = Rehearsal(network, CPU).peak_bytes(start, end, plan.links[k])
        assert predicted == pytest.approx(allocated_bytes(plan, k), rel=0.15)


def allocated_bytes(plan, index):
    """The peak of torch's own allocator over a few steps of one stage, two messages waiting on each side."""
    config = plan.config
    size = config.train.microbatch_size
    stage = build_stage(plan, index, CPU)
    stage.train(True)
    held = sum(t.nbytes for part in (stage.blocks, stage.head) for t in (*part.parameters(), *part.buffers()))
    held += sum(tensor.nbytes for average in stage.update.averages.values() for tensor in average.tensors.values())
    steps = [Step(i, (size,) * config.train.microbatches) for i in range(5)]

    class Queue:
        def __init__(self, specs, ahead):
            self.specs, self.waiting = specs, [self.new(specs) for _ in range(ahead)]

        def new(self, specs):
            return tuple(torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs)

        def has_message(self):
            return True

        def get(self):
            self.waiting.append(self.new(self.specs))
            return self.waiting.pop(0)

        def put(self, *tensors):
            self.waiting = [*self.waiting, tuple(tensor.clone() for tensor in tensors)][-2:]

    class Sums(Queue):
        def __init__(self):
            super().__init__([], 0)

        def put(self, *tensors):
            self.flat, self.shapes = torch.cat([tensor.flatten() for tensor in tensors]), [t.shape for t in tensors]

        def get(self):
            parts = self.flat.split([shape.numel() for shape in self.shapes])
            del self.flat
            return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))

    given = plan.activation(size, index - 1) if index else plan.input(size)
    with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        errors = errors_ahead(plan.delay, config.train.microbatches, len(plan.links[index].hops_in))
        ports = Ports(Queue([given, plan.targets(size)], 2 if index else 0), Queue([], 0),
                      Queue([plan.error(size, index)], errors), Queue([], 0), Sums())
        for _ in execute(train_program(steps, role(plan, index), plan.delay), stage, ports, steps,
                         lambda step: Factors(), lambda op: None):
            pass
    live = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return held + peak


def test_estimates_for_the_search_are_near_the_exact_memory():
    network = small_resnet()
    estimates, exact = estimated_bytes(profile(network, CPU)), Rehearsal(network, CPU)
    for start, end in ((0, 3), (2, 5), (4, 8)):
        assert estimates[start, end] == pytest.approx(exact.peak_bytes(start, end), rel=0.15)


@pytest.mark.parametrize("changes", [
    {}, {"method__link": {"length": 0}}, {"method__name": "greedy", "train__wire": "bf16"},
    {"method__head": "blocks"}, {"method__head": "blocks", "train__recompute": True},
    {"method__link": {"delay": 2, "wire": "bf16"}, "train__microbatches": 2, "train__wire": "bf16"},
    {"method": LAST_LOSS}, {"method": {**LAST_LOSS, "head": "none"}}])
def test_the_search_misses_no_partition_that_fits(changes):
    network = small_resnet(**changes)
    estimates, exact = estimated_bytes(profile(network, CPU)), Rehearsal(network, CPU)
    blocks = len(network.block_names)
    for start, end in ((0, 1), (0, 3), (2, 5), (4, blocks), (blocks - 1, blocks)):
        assert 0.85 * estimates[start, end] <= exact.peak_bytes(start, end)


def test_backpropagation_is_not_charged_for_heads():
    network, _ = network_of(partition__stages=2, optimizer={"name": "adamw", "lr": 0.1})
    costs = profile(network, CPU)
    stage, blocks = stage_cost(costs, 1, 3, linked(length=1)), costs.blocks[1:3]
    assert stage.batch_seconds("bp", 1) == pytest.approx(sum(b.forward + b.backward + b.step for b in blocks))
    assert stage.head_step == costs.heads[2].step > 0


def test_heads_that_are_left_out_cost_nothing():
    network, _ = network_of(partition__stages=2, method={**LAST_LOSS, "head": "none"})
    costs = profile(network, CPU)
    assert not costs.head_seconds[1:-1].any()
    assert not costs.head_step[:-1].any()
    assert costs.head_seconds[-1] > 0  # the last loss


@pytest.fixture
def graphs(monkeypatch):
    """Has memory be foretold as on a GPU with `runtime.cuda_graphs`."""
    monkeypatch.setattr("blpipe.forecast.memory.has_graphs", lambda config, device: True)


def small_resnet(**changes):
    return network_of(model={"name": "resnet_cifar", "args": {"depth": 14}}, partition__stages=2,
                      data__args={"shape": [3, 32, 32], "classes": 10, "samples": 64}, **changes)[0]


def test_every_microbatch_under_way_has_cuda_graphs_that_keep_all_that_it_computes(graphs):
    peaks = [Rehearsal(small_resnet(method__link__delay=delay), CPU).peak_bytes(2, 5) for delay in (0, 1, 2)]
    greedy = Rehearsal(small_resnet(method__name="greedy"), CPU).peak_bytes(2, 5)
    assert greedy < peaks[0] < 1.5 * greedy
    assert all(later - earlier > 0.6 * greedy for earlier, later in pairwise(peaks))


def test_on_a_cpu_cuda_graphs_take_no_memory():
    plain, recorded = (Rehearsal(small_resnet(runtime__cuda_graphs=on), CPU).peak_bytes(2, 5) for on in (False, True))
    assert plain == recorded


@pytest.mark.parametrize("changes", [{"method__link__delay": 2}, {"method__name": "greedy"},
                                     {"method__link": {"length": "all"}}])
def test_estimates_are_near_the_exact_memory_with_cuda_graphs_too(changes, graphs):
    network = small_resnet(**changes)
    estimates, exact = estimated_bytes(profile(network, CPU)), Rehearsal(network, CPU)
    for start, end in ((0, 3), (2, 5), (4, 8)):
        assert 0.7 < estimates[start, end] / exact.peak_bytes(start, end) < 1.1


def test_links_weighted_by_stage_are_balanced_within_a_limit():
    network, _ = network_of(model=MLP, partition={"stages": 3, "strategy": "balanced", "memory_limit": "1GiB"},
                            method__link={"weight": [1.0, 0.5]})
    assert len(settle(network.config, network, profile(network, CPU)).partition.cuts) == 2


@pytest.mark.parametrize("measured", [False, True])
def test_a_head_for_maps_alone_lets_stages_end_with_maps(measured):
    network, data = network_of(model={"target": "models_under_test:maps_then_features"}, partition__stages=2,
                               method__head={"target": "models_under_test:maps_head"})
    heads = profile(network, CPU, data if measured else None).heads
    assert [head is not None for head in heads] == [True, True, False, True]


def test_blocks_after_whole_numbers_are_measured_on_whole_numbers():
    network, data = network_of(model={"target": "models_under_test:quantised_net"}, partition__stages=2)
    assert all(block.forward > 0 for block in profile(network, CPU, data).blocks)


@pytest.mark.parametrize(("method", "limit"), [("backlink", "3MB"), ("bp", "2MB")])
def test_where_no_partition_keeps_the_limit_the_error_says_which_would(method, limit):
    changes = {"model": {"name": "mlp", "args": {"hidden": [256] * 7}}, "method": method}

    def settled(**partition):
        network, _ = network_of(partition={"strategy": "balanced", **partition}, **changes)
        return settle(network.config, network, profile(network, CPU)).partition.cuts

    with pytest.raises(ConfigError) as error:
        settled(stages=2, memory_limit=limit)
    message = str(error.value)
    assert message.startswith("partition.memory_limit: no partition into 2 stages keeps every stage within")
    least = int(re.search(r"at least ([\d,]+) bytes", message)[1].replace(",", ""))
    stages = int(re.search(r"use (\d+) stages", message)[1])
    assert len(settled(stages=2, memory_limit=least)) == 1
    assert len(settled(stages=stages, memory_limit=limit)) == stages - 1
    with pytest.raises(ConfigError, match="no partition into 2 stages"):
        settled(stages=2, memory_limit=least - 1)
    with pytest.raises(ConfigError, match="no partition into 8 stages.*give at least"):
        settled(stages=8, memory_limit=1000)


def test_balanced_runs_are_equal_in_both_engines_and_keep_their_cuts(tmp_path):
    balanced = {"stages": 3, "strategy": "balanced", "costs": "analytic"}
    trees = [small_config("analytic", partition=balanced, runtime__trace=True),
             small_config("measured", partition={"stages": 3, "strategy": "balanced"})]
    analytic, measured = train_in_processes(trees, 3, tmp_path)
    local = train_locally(trees[0], tmp_path)
    assert_same_run(analytic, local)
    cuts = load_config(analytic / "config.yaml").partition.cuts
    assert len(cuts) == 2
    # What measuring found may differ from run to run; the run's own config repeats it.
    kept = yaml.safe_load((measured / "config.yaml").read_text())
    assert_same_run(measured, train_locally(kept, tmp_path))
    for run in (analytic, local):
        events = [e for e in json.loads((run / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
        assert {e["tid"] for e in events} == {0, 1, 2}
        steps = {(e["tid"], e["args"]["step"]) for e in events if e["name"] == "step"}
        assert steps == {(k, step) for k in range(3) for step in range(6)}
        assert all(e["dur"] >= 0 for e in events)


def test_the_best_partition_for_each_method_is_no_slower_than_an_even_one():
    network, _ = network_of(model={"name": "resnet_cifar", "args": {"depth": 20}}, partition__stages=4,
                            data__args={"shape": [3, 32, 32], "classes": 10, "samples": 64}, train__microbatches=8)
    costs = profile(network, CPU)
    even = Forecaster(costs, network.config, CONNECTIONS["cuda"]).compare(4)
    partition = network.config.partition.model_copy(update={"strategy": "balanced"})
    config = network.config.model_copy(update={"partition": partition})
    best = Forecaster(costs, config, CONNECTIONS["cuda"]).compare(4)
    assert [row.method for row in best] == ["backlink d=1", "backlink d=0", "backlink d=1/8", "GPipe", "1F1B",
                                               "zero-bubble"]
    assert all(a.seconds_per_step <= b.seconds_per_step * 1.001 for a, b in zip(best, even, strict=True))
    by_name = {row.method: row for row in best}
    assert by_name["backlink d=1"].efficiency > 0.97
    assert by_name["1F1B"].efficiency < by_name["zero-bubble"].efficiency < 1


def test_a_forecast_knows_which_errors_come_to_each_stage():
    def forecast(**link):
        config = parse_config(small_config("far", partition__stages=4, method__link={"length": "all", **link}))
        network = make_network(config, open_data(config.data, 0).spec)
        plan = make_plan(config, network.data, network)
        forecaster = Forecaster(profile(network, CPU), config, CONNECTIONS["cpu"])
        assert all(0 < row.efficiency <= 1.0 for row in forecaster.compare(4, plan.starts))
        return [stage.seconds for stage in forecaster.stages(plan)]

    assert forecast(reach="all") == forecast(reach=3)
    every, last = forecast(weight=[1.0, 1.0, 1.0]), forecast(weight=[0.0, 0.0, 1.0])
    assert last[0] < every[0]
    assert last[1] < every[1]
    assert last[2] < every[2]  # whose error the stage before does not want
    assert last[3] == every[3]


def test_a_bf16_wire_makes_backlink_faster_over_a_slow_link_and_not_torchs_schedules():
    rows = []
    for wire in ("full", "bf16"):
        network, _ = network_of(train__wire=wire, method__link={"wire": wire})
        forecaster = Forecaster(profile(network, CPU), network.config, Connection(0.0, 1e5))
        rows.append({row.method: row.seconds_per_step for row in forecaster.compare(3)})
    full, half = rows
    assert half["backlink d=1"] < 0.7 * full["backlink d=1"]
    assert half["1F1B"] == full["1F1B"]
    assert half["GPipe"] == full["GPipe"]


@pytest.mark.parametrize("link", [{"reach": "all", "length": "all"}, {"delay": 8},
                                  {"reach": "all", "length": "all", "delay": 1, "delay_unit": "microbatch"}])
def test_no_stage_is_busy_for_longer_than_a_step_however_late_its_errors_are(link):
    network, data = network_of(model={"name": "mlp", "args": {"hidden": [32] * 9}}, partition__stages=10,
                               train__microbatches=2, method__link=link)
    forecaster = Forecaster(profile(network, CPU), network.config, Connection(1e-12, 1e15))
    assert forecaster.compare(10)[0].efficiency == pytest.approx(1.0)


def test_other_numbers_of_devices_than_speeds_are_named_for_are_all_alike():
    speeds = {"stages": 2, "strategy": "balanced", "speeds": [1.0, 0.25]}
    plain, slower = (network_of(model=MLP, partition=partition)[0] for partition in (
        {"stages": 2, "strategy": "balanced"}, speeds))
    three = [Forecaster(profile(network, CPU), network.config, CONNECTIONS["cpu"]).compare(3)
             for network in (plain, slower)]
    assert three[0] == three[1]
