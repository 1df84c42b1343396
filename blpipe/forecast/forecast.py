"""The forecast of a run: what each stage costs, and what each method would make of the same devices."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import ceil, prod

import numpy as np

from blpipe.balance import Table, best_starts
from blpipe.config import Config, MethodConfig, TrainConfig
from blpipe.config_types import WirePrecision
from blpipe.engines.alone import rehearsed_steps
from blpipe.engines.build import has_graphs
from blpipe.forecast.baselines import SCHEDULES, Backward
from blpipe.forecast.costs import Profile
from blpipe.forecast.memory import Rehearsal, estimated_bytes
from blpipe.forecast.simulate import Connection, Timeline, simulate
from blpipe.forecast.stages import StageCost, seconds_table, stage_cost
from blpipe.links import Links, fitting, stage_links
from blpipe.partition import even_starts
from blpipe.plan import Plan
from blpipe.program import ACTIVATIONS_AHEAD, Kind, Op, Role, errors_ahead, train_program
from blpipe.steps import Step

# Steps simulated, of which the later half is counted; a schedule that ends each step drained needs few, one whose
# errors come back late more, as its stages do all of their work from then on alone.
_STEPS, _DRAINED_STEPS, _MANY_STAGES = 8, 2, 64
_MOST_BLOCK_RUNS = 600  # a few seconds


@dataclass(frozen=True)
class StageForecast:
    """One stage, for one batch: seconds of its own computing, bytes it sends, floating-point operations."""

    blocks: list[str]
    params: int
    flops: int
    seconds: float
    sent_forward_bytes: int
    sent_back_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class MethodForecast:
    """One method on K devices.

    Args:
        efficiency: share of the time in which the slowest stage computes: 1 without a bubble.
        speedup: over backpropagation on one device.
    """

    method: str
    stages: int
    seconds_per_step: float
    samples_per_second: float
    efficiency: float
    speedup: float


@dataclass(frozen=True)
class Method:
    """A way to train a pipeline: the programs of its stages and what their operations take.

    Args:
        config: for the stages' costs.
        program: (stage from 0, stages, steps) to operations.
        seconds: of each kind of operation in a stage.
        links: what goes back through stages with so many blocks.
        delay: of its errors, in microbatches.
    """

    name: str
    config: MethodConfig
    program: Callable[[int, int, int], Iterator[Op]]
    seconds: Callable[[StageCost], dict[Enum, float]]
    links: Callable[[Sequence[int]], list[Links]]
    delay: int = 0


def methods(config: Config) -> list[Method]:
    """What `plan` compares: the config's own method first, then BackLink, GPipe, 1F1B and zero-bubble.

    BackLink is there without a delay, one microbatch late and one batch late.
    """
    train, method = config.train, config.method
    delay = method.link.delay_in_microbatches(train.microbatches)
    own = _schedule("1F1B", train) if method.name == "bp" else _local(method, delay, train)
    backlink = method.model_copy(update={"name": "backlink"})
    others = [*(_local(backlink, delay, train) for delay in sorted({0, 1, train.microbatches}) if backlink.linked),
              *(_schedule(schedule, train) for schedule in SCHEDULES)]
    return [own, *(other for other in others if other.name != own.name)]


def _local(method: MethodConfig, delay: int, train: TrainConfig) -> Method:
    def links(sizes: Sequence[int]) -> list[Links]:
        return stage_links(fitting(method, len(sizes)), sizes)

    @cache
    def roles(stages: int) -> list[Role]:
        return [Role(k < stages - 1, of_stage.hops_out, of_stage.hops_in, train.replicas > 1)
                for k, of_stage in enumerate(links([1] * stages))]

    def program(stage: int, stages: int, steps: int) -> Iterator[Op]:
        return train_program([Step(i, (1,) * train.microbatches) for i in range(steps)], roles(stages)[stage], delay)

    def seconds(cost: StageCost) -> dict[Enum, float]:
        return {Kind.FORWARD: cost.forward, Kind.LOCAL_BACKWARD: cost.local_backward,
                Kind.LINK_BACKWARD: cost.link_backward / max(1, cost.hops), Kind.STEP: cost.step + cost.head_step}

    reach = "" if method.link.reach == 1 else f" r={method.link.reach}"
    name = f"{method.name} d={Fraction(delay, train.microbatches)}{reach}" if method.linked else method.name
    return Method(name, method, program, seconds, links, delay)


def _schedule(name: str, train: TrainConfig) -> Method:
    def program(stage: int, stages: int, steps: int) -> Iterator[Op]:
        for op in SCHEDULES[name](stage, stages, steps, train.microbatches):
            if op.kind is Kind.STEP and train.replicas > 1:
                yield Op(Kind.ALL_REDUCE, op.step)
            yield op

    def seconds(cost: StageCost) -> dict[Enum, float]:
        return {Kind.FORWARD: cost.forward, Backward.FULL: cost.backward, Backward.INPUT: cost.input_backward,
                Backward.WEIGHT: cost.weight_backward, Kind.STEP: cost.step}

    return Method(name, MethodConfig(name="bp"), program, seconds, lambda sizes: [Links() for _ in sizes])


class Forecaster:
    """Answers from one profile of a network."""

    def __init__(self, costs: Profile, config: Config, connection: Connection):
        self.costs, self.config, self.connection = costs, config, connection

    def stages(self, plan: Plan) -> list[StageForecast]:
        """A forecast of every stage of the plan, in the config's own method."""
        method, micro = self.config.method, self.config.train.microbatches
        rehearsal, estimates = Rehearsal(self.costs.network, self.costs.device), estimated_bytes(self.costs)
        there, back_wire = self._wires(method.name)
        rows = []
        for k, (start, end) in enumerate(pairwise([*plan.starts, len(self.costs.blocks)])):
            blocks = self.costs.blocks[start:end]
            head = self.costs.heads[end - 1] if method.name != "bp" else None
            last = end == len(self.costs.blocks)
            back = 0 if k == 0 else 1 if method.name == "bp" else len(plan.links[k].hops_out)
            peak = rehearsal.peak_bytes(start, end, plan.links[k]) if self._can_rehearse(end - start, plan.links[k]) \
                else None
            rows.append(StageForecast(
                plan.block_names(k), sum(parameter.numel() for parameter in plan.stages[k].parameters()),
                micro * (sum(block.flops for block in blocks) + (head.flops if head is not None else 0)),
                float(stage_cost(self.costs, start, end, method, plan.links[k]).batch_seconds(method.name, micro))
                / self._speeds(len(plan.starts))[k],
                0 if last else micro * self._forward_bytes(end, there),
                micro * back * self._sent_bytes(start, back_wire),
                int(estimates[start, end]) if peak is None else peak))
        return rows

    def _can_rehearse(self, blocks: int, links: Links) -> bool:
        """Whether a stage's own program can be run for its memory, in seconds; else an estimate has to do."""
        method, train = self.config.method, self.config.train
        recorded = has_graphs(self.config, self.costs.device)
        runs = blocks * train.microbatches * rehearsed_steps(self.config, max(links.hops_in, default=0), recorded)
        return method.name != "bp" and runs <= _MOST_BLOCK_RUNS

    def compare(self, stages: int, starts: list[int] | None = None, among: Collection[str] | None = None,
                ) -> list[MethodForecast]:
        """Every method, or those of these names, on `stages` devices, the config's own first.

        With `partition.strategy: balanced` each method has its own best cuts, without a limit on memory; else all have
        the same ones. A method for which these are no stages is left out.

        Args:
            starts: the first blocks of the config's own stages, where it has as many.
        """
        rows = []
        tables: dict[str, Table] = {}
        for number, method in enumerate(methods(self.config)):
            if among is not None and method.name not in among:
                continue
            kind = method.config.name
            if kind not in tables:
                tables[kind] = seconds_table(self.costs, method.config)
            table, shares = tables[kind], number == 0 or self.config.partition.strategy != "balanced"
            cuts = starts if starts and shares else self._starts_for(table, stages)
            checked = starts and number == 0  # by `make_plan`, which knows more of each stage than the table
            if cuts is None or not (checked or _are_allowed(table, cuts)):
                continue
            rows.append(self._forecast(method, self.timeline(method, cuts, self._steps(method, stages)), cuts))
        return rows

    def _steps(self, method: Method, stages: int) -> int:
        """How many to simulate."""
        if method.config.name == "bp":
            return _DRAINED_STEPS
        farthest = max(max(links.hops_in, default=0) for links in method.links([1] * stages))
        late = ceil(method.delay * farthest / self.config.train.microbatches)
        return max(_STEPS if stages <= _MANY_STAGES else _STEPS // 2, 4 * (late + 1))

    def timeline(self, method: Method, starts: list[int], steps: int) -> Timeline:
        """The simulation of so many steps."""
        ends, count = [*starts[1:], len(self.costs.blocks)], len(starts)
        costs = self._stage_costs(method, starts)
        speeds = self._speeds(count)
        seconds = [{kind: float(value) / speeds[k] for kind, value in method.seconds(cost).items()}
                   | {Kind.ALL_REDUCE: self._all_reduce_seconds(method, starts[k], ends[k])}
                   for k, cost in enumerate(costs)]
        most_hops = max(int(cost.hops) for cost in costs)
        errors = errors_ahead(method.delay, self.config.train.microbatches, most_hops)
        ahead = ACTIVATIONS_AHEAD, max(1, errors)  # torch's schedules take one gradient at a time
        there, back = self._wires(method.config.name)
        return simulate([method.program(k, count, steps) for k in range(count)], seconds,
                        [self._forward_bytes(end, there) for end in ends[:-1]],
                        [self._sent_bytes(end, back) for end in ends[:-1]], self.connection, ahead)

    def one_device(self) -> MethodForecast:
        """End-to-end backpropagation of the whole model on one device."""
        train = self.config.train
        cost = stage_cost(self.costs, 0, len(self.costs.blocks), self.config.method)
        seconds = float(cost.batch_seconds("bp", train.microbatches * train.replicas))
        return MethodForecast("one device", 1, seconds, train.batch_size / seconds, 1.0, 1.0)

    def _forecast(self, method: Method, timeline: Timeline, starts: list[int]) -> MethodForecast:
        train = self.config.train
        seconds = timeline.seconds_per_step()
        slowest = max(float(cost.batch_seconds(method.config.name, train.microbatches)) / speed for cost, speed in
                      zip(self._stage_costs(method, starts), self._speeds(len(starts)), strict=True))
        return MethodForecast(method.name, len(starts), seconds, train.batch_size / seconds, slowest / seconds,
                              self.one_device().seconds_per_step / seconds)

    def _all_reduce_seconds(self, method: Method, start: int, end: int) -> float:
        """What adding up the gradients of a stage's replicas takes, those of its head with them."""
        params, head = self.costs.sums["param_bytes"], self.costs.heads[end - 1]
        size = int(params[end] - params[start])
        if method.config.name != "bp" and head is not None:
            size += head.param_bytes
        return self.connection.all_reduce_seconds(size, self.config.train.replicas)

    def _stage_costs(self, method: Method, starts: list[int]) -> list[StageCost]:
        bounds = list(pairwise([*starts, len(self.costs.blocks)]))
        links = method.links([end - start for start, end in bounds])
        return [stage_cost(self.costs, start, end, method.config, links[k])
                for k, (start, end) in enumerate(bounds)]

    def _starts_for(self, table: Table, stages: int) -> list[int] | None:
        partition = self.config.partition
        if partition.strategy != "balanced":
            return even_starts(len(self.costs.blocks), stages)
        return best_starts(table, self._speeds(stages))

    def _wires(self, kind: str) -> tuple[WirePrecision, WirePrecision]:
        """The precision of activations and of what goes back; torch's schedules send tensors as they are."""
        return ("full", "full") if kind == "bp" else (self.config.train.wire, self.config.method.link.wire)

    def _forward_bytes(self, end: int, wire: WirePrecision) -> int:
        shape, dtype = self.costs.network.data.targets(self.config.train.microbatch_size)
        return self._sent_bytes(end, wire) + dtype.itemsize * prod(shape)

    def _sent_bytes(self, boundary: int, wire: WirePrecision) -> int:
        return self.costs.blocks[boundary - 1].output_bytes // (2 if wire == "bf16" else 1)

    def _speeds(self, stages: int) -> tuple[float, ...]:
        """Those of the config for as many devices as it names, else all alike."""
        speeds = self.config.partition.speeds
        return speeds if speeds and len(speeds) == stages else (1.0,) * stages


def _are_allowed(table: Table, starts: list[int]) -> bool:
    return all(np.isfinite(table[start, end]) for start, end in pairwise([*starts, len(table) - 1]))
