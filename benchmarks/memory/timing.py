"""Seconds of a step in one process: bp, bp under checkpointing, and ours, in rounds in which all take turns."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from benchmarks.memory.cases import BP, CHECKPOINTED, GREEDY, RECOMPUTED, WHOLE_BATCHES, Case, Size, Task
from benchmarks.memory.measure import local_engine, settled
from blpipe.engines.common import seconds_since, train_epoch
from blpipe.engines.local import LocalEngine
from blpipe.plan import make_network, make_plan


@dataclass(frozen=True)
class Effort:
    """How thoroughly to measure: rounds, steps of each method in a round, CPU threads."""

    rounds: int
    steps: int
    threads: int | None


def tasks(size: Size, linked: list[Case]) -> list[Task]:
    """What takes part: at the largest K, in the cuts that need least memory and in the even ones."""
    most = size.stages[-1]
    own = [GREEDY, *[case for case in linked if case.method["link"]["length"] == 1]]
    return [*(Task("local", case, 1) for case in (BP, *CHECKPOINTED[:-1])), Task("local", CHECKPOINTED[-1], most),
            *(Task("local", case, most, cut) for cut in ("even", "least") for case in own),
            *(Task("local", case, most) for case in (*WHOLE_BATCHES, *RECOMPUTED))]


def measure(chosen: list[Task], size: Size, timed: Size, effort: Effort, device: torch.device) -> list[dict[str, Any]]:
    """A row for each task, with its seconds a step round by round; the first one's are bp's.

    Args:
        size: whose memory the cuts are for.
        timed: with the batch that is timed.
    """
    if effort.threads is not None:
        torch.set_num_threads(effort.threads)
    engines = [_engine(task, size, timed, effort.steps, device) for task in chosen]
    seconds: list[list[float]] = [[] for _ in chosen]
    for number in range(effort.rounds + 1):
        order = range(len(chosen))
        for i in order if number % 2 else reversed(order):
            started = perf_counter()
            train_epoch(engines[i], number)
            seconds[i].append(seconds_since(started, device) / effort.steps)
        print(f"time: round {number} of {effort.rounds}", flush=True)
    return [task.key(size) | {"part": "time", "timed_batch": timed.batch, "threads": effort.threads,
                              "seconds": found[1:], "ratios": _ratios(found[1:], seconds[0][1:])}
            for task, found in zip(chosen, seconds, strict=True)]


def _ratios(seconds: list[float], reference: list[float]) -> list[float]:
    return [one / other for one, other in zip(seconds, reference, strict=True)]


def _engine(task: Task, size: Size, timed: Size, steps: int, device: torch.device) -> LocalEngine:
    cuts = settled(task, size, device)[0].partition.cuts
    config, data = timed.config(task.case, task.stages, cuts=cuts), timed.data(steps)
    return local_engine(make_plan(config, data, make_network(config, data)), task.case, task.stages, device)
