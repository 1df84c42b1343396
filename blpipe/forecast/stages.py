"""What a stage costs, from its blocks, its head and its backward link; and the cuts that balance all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from blpipe.balance import Table, best_starts, cheapest_within, fewest_stages, least_maximum, refine
from blpipe.config import Config, LinkConfig, MethodConfig, PartitionConfig
from blpipe.errors import ConfigError
from blpipe.forecast.costs import Profile
from blpipe.forecast.memory import Rehearsal, estimated_bytes, most_hops, most_links, one_for_all, tail_start
from blpipe.links import Links, fitting, stage_links
from blpipe.partition import kept_together
from blpipe.plan import Network
from blpipe.text import human_bytes, stages_text

_OPTIMISM = 0.85  # on estimates of memory: no partition that fits is missed, and exact values follow


@dataclass(frozen=True)
class StageCost:
    """Seconds of a stage: for a microbatch, and the steps for a batch. Numbers, or arrays of them for many stages.

    backward, input_backward, weight_backward: of its blocks in end-to-end backpropagation, with the loss in the
    last stage. local_backward: of its own head, loss and blocks. link_backward: of all `hops` errors that come back
    for a microbatch. step, head_step: the optimizer's, for the blocks and for the head.
    """

    forward: Any
    backward: Any
    input_backward: Any
    weight_backward: Any
    local_backward: Any
    link_backward: Any
    hops: Any
    step: Any
    head_step: Any

    def batch_seconds(self, method: str, microbatches: int) -> Any:
        """What the stage computes in one batch, without any waiting."""
        if method == "bp":
            return microbatches * (self.forward + self.backward) + self.step
        each = self.forward + self.local_backward + (self.link_backward if method == "backlink" else 0.0)
        return microbatches * each + self.step + self.head_step


def stage_cost(costs: Profile, start: Any, end: Any, method: MethodConfig, links: Links | None = None) -> StageCost:
    """The cost of the blocks start … end−1 as one stage.

    Args:
        start, end: numbers, or arrays [...] that broadcast to each other.
        links: what goes back through it; without, the most that can, where it is not known which stages follow.
    """
    def total(field: str) -> Any:
        return costs.sums[field][end] - costs.sums[field][start]

    def of_first(field: str) -> Any:
        return np.append(np.diff(costs.sums[field]), 0.0)[start]

    first, last = np.equal(start, 0), np.equal(end, len(costs.blocks))
    # The input of a stage that sends no error wants no gradient.
    mute = first | (not method.linked if links is None else not links.hops_out) if method.name != "bp" else first
    backward = total("backward") - np.where(mute, of_first("backward") - of_first("weight_backward"), 0.0)
    for_input = total("input_backward") - np.where(mute, of_first("input_backward"), 0.0)
    again = total("forward") if costs.network.config.train.recompute else 0.0
    return StageCost(
        forward=np.where(first, costs.feed, 0.0) + total("forward"),
        backward=again + backward + np.where(last, costs.head_seconds[-1], 0.0),
        input_backward=again + for_input + np.where(last, costs.head_seconds[-1], 0.0),
        weight_backward=np.maximum(backward - for_input, 0.0),  # what is left, given the gradients on the way
        local_backward=np.where(last, again + backward,
                                _local_seconds(costs, start, end, again + backward, again + for_input, method, links))
        + costs.head_seconds[end],
        link_backward=_link_seconds(costs, start, end, method.link, links),
        hops=len(links.hops_in) if links else most_hops(costs, end, method.link),
        step=costs.step_call + total("step"),
        head_step=np.where(last, 0.0, costs.head_step[end]))


def _local_seconds(costs: Profile, start: Any, end: Any, backward: Any, for_input: Any, method: MethodConfig,
                   links: Links | None) -> Any:
    """Of the local loss through the blocks of a stage before the last.

    Blocks that it does not train (all at α = 0, the tail of a joint backward) only pass the error on, where a body or
    the stage before wants it.

    Args:
        backward, for_input: seconds through all blocks, with the gradients of their parameters and without.
    """
    joint = links.joint if links else method.link.joint and method.linked
    if method.local_weight and not joint:
        return backward
    passed_on = 1 in links.hops_out if links else np.greater(start, 0) & (not one_for_all(method.link))
    only_sent = np.where(passed_on, for_input, 0.0)
    if not method.local_weight:
        return only_sent
    tail = tail_start(method.link, start, end)
    for_parameters = costs.sums["backward"] - costs.sums["input_backward"]
    return np.where(np.less(start, tail), backward - (for_parameters[end] - for_parameters[tail]), only_sent)


def _link_seconds(costs: Profile, start: Any, end: Any, link: LinkConfig, links: Links | None) -> Any:
    """All link backwards of a microbatch: those that train stop in the tail, unless they are passed on.

    Which come and which are passed on is `links.hops`' rule, here for any cuts at once.
    """
    hops = len(links.hops_in) if links else most_hops(costs, end, link)
    passed: Any = np.where(start > 0, hops, 0) if one_for_all(link) else np.maximum(hops - 1, 0)
    if links:
        passed = sum(hop + 1 in links.hops_out for hop in links.hops_in)
    trains = links is None or links.weight != 0.0
    taken = hops if link.take == "every" else np.minimum(hops, 1)  # the farthest is the last to come
    both = (passed if link.take == "every" else np.where(passed == hops, taken, 0)) if trains else 0
    only_trains = taken - both if trains else 0
    tail = tail_start(link, start, end)
    backward, inputs, weights, forward = (
        costs.sums[field] for field in ("backward", "input_backward", "weight_backward", "forward"))
    # Where start ≥ end there is no stage, and the result is not used.
    after = np.minimum(tail + 1, len(costs.blocks))
    keep, recompute = link.keep == "graph", costs.network.config.train.recompute
    again = forward[end] - forward[tail] if recompute or not keep else 0.0
    if recompute and not keep:  # the tail for its output, and all of its blocks but the last for their backward
        again = again + forward[np.maximum(end - 1, tail)] - forward[tail]
    stops = backward[end] - backward[after] + weights[after] - weights[tail]
    return both * (backward[end] - backward[start]) + only_trains * stops \
        + (passed - both) * (inputs[end] - inputs[start]) + (only_trains + passed) * again


def seconds_table(costs: Profile, method: MethodConfig) -> Table:
    """Seconds of one batch in a stage of the blocks i … j−1: [N + 1, N + 1], infinity where there can be none."""
    count = len(costs.blocks)
    start, end = np.arange(count + 1)[:, None], np.arange(count + 1)[None, :]
    microbatches = costs.network.config.train.microbatches
    seconds = stage_cost(costs, start, end, method).batch_seconds(method.name, microbatches)
    floating = [True] + [spec.dtype.is_floating_point for spec in next(iter(costs.network.outputs.values()))]
    allowed = (start < end) & np.array(floating)[None, :]
    for i, j in {(first, other) for first, other, _ in kept_together(costs.network.model)}:
        allowed &= ~(((start <= i) & (end > i)) ^ ((start <= j) & (end > j)))
    first, inner = _need_all_blocks(method, costs.network.config.partition.stage_count)
    needed = np.where(start == 0, first, inner) & (end < count)
    return np.where(allowed & ~(needed & (tail_start(method.link, start, end) > start)), seconds, np.inf)


def _need_all_blocks(method: MethodConfig, stages: int) -> tuple[bool, bool]:
    """Whether errors must run through all blocks of the first stage, and of one between it and the last.

    Which of the latter it is the table does not know: where link weights differ, all are held to what one needs.
    """
    stages = max(stages, 3)
    first, *inner, _ = stage_links(fitting(method, stages), [1] * stages)
    return first.need_all_blocks, any(links.need_all_blocks for links in inner)


def balanced_starts(costs: Profile, method: str, partition: PartitionConfig) -> list[int]:
    """The first block of every stage, so that the slowest stage is fastest.

    Raises:
        ConfigError: no partition keeps `partition.memory_limit`, or none is possible at all.
    """
    stages, limit = partition.stage_count, partition.memory_limit
    method_config = costs.network.config.method.model_copy(update={"name": method})
    seconds = seconds_table(costs, method_config)
    speeds = partition.speeds or (1.0,) * stages
    starts = best_starts(seconds, speeds)
    if starts is None:
        raise ConfigError(_no_cuts(costs, method_config, stages))
    if limit is None:
        return starts
    estimates, rehearsal = estimated_bytes(costs), Rehearsal(costs.network, costs.device)
    memory = _OPTIMISM * estimates  # exact where it was asked for

    known: dict[Any, float] = {}

    def exact(start: int, end: int) -> float:
        if method == "bp":
            return float(estimates[start, end])
        # Stages of alike blocks at alike boundaries need the same.
        alike = (start == 0 or costs.blocks[start - 1].output_bytes, *costs.blocks[start:end], costs.heads[end - 1],
                 most_links(fitting(costs.network.config.method), start, end - start, len(costs.blocks) - end, stages))
        if alike not in known:
            peak = rehearsal.peak_bytes(start, end)
            known[alike] = float(estimates[start, end]) if peak is None else peak
        return known[alike]

    starts = cheapest_within(seconds, memory, exact, limit, speeds)
    if starts is None:
        raise ConfigError(_too_little_memory(np.where(np.isinf(seconds), np.inf, memory), exact, stages, limit))
    return starts


def settle(config: Config, network: Network, costs: Profile) -> Config:
    """The config with the cuts that its `balanced` strategy finds; any other config as it is.

    Raises:
        ConfigError: no partition fits.
    """
    if not config.partition.unsettled:
        return config
    starts = balanced_starts(costs, config.method.name, config.partition)
    cuts = tuple(network.block_names[start] for start in starts[1:])
    return config.model_copy(update={"partition": config.partition.model_copy(update={"cuts": cuts})})


def _no_cuts(costs: Profile, method: MethodConfig, stages: int) -> str:
    whole = method.model_copy(update={"link": method.link.model_copy(update={"length": "all"})})
    if best_starts(seconds_table(costs, whole), (1.0,) * stages) is not None:
        why = "at method.local_weight 0" if method.local_weight == 0.0 else f"at method.link.reach {method.link.reach}"
        return (f"method.link.length: {method.link.length}: no cut into {stages} stages leaves as few blocks to each "
                f"stage whose errors must run through all of them, {why}; set method.link.length=all")
    return (f"partition.stages: the model cannot be cut into {stages} stages: shared parameters or running statistics, "
            "or boundaries without a head, forbid it; use fewer stages or give a method.head.target")


def _too_little_memory(memory: Table, exact: Callable[[int, int], float], stages: int, limit: int) -> str:
    ways = []
    least = _least_limit(memory, exact, stages)
    if np.isfinite(least):
        ways.append(f"give at least {int(least):,} bytes ({human_bytes(least)})")
    enough = fewest_stages(memory <= limit)
    while enough is not None and cheapest_within(memory, memory, exact, limit, (1.0,) * enough) is None:
        enough = fewest_stages(memory <= limit)  # by exact values where estimates were too low
    if enough is not None:
        ways.append(f"use {stages_text(enough)}")
    return (f"partition.memory_limit: no partition into {stages_text(stages)} keeps every stage within "
            f"{human_bytes(limit)}; {' or '.join(ways) or 'use a smaller model or smaller microbatches'}")


def _least_limit(memory: Table, exact: Callable[[int, int], float], stages: int) -> float:
    known: set[tuple[int, int]] = set()
    while (starts := best_starts(memory, (1.0,) * stages)) is not None and refine(memory, exact, starts, known):
        pass
    return least_maximum(memory, (1.0,) * stages)
