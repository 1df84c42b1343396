"""Peaks of tensor memory: of the stages of a pipeline, and of all stages in one process.

On a GPU they are those of torch's allocator over real steps; elsewhere the same code runs on fake tensors, and the
peak is counted.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import one_f_one_b
from benchmarks.memory.cases import BP, GOAL, GREEDY, Case, Size, Task
from blpipe.balance import best_starts
from blpipe.config import Config
from blpipe.engines.alone import rehearsed_steps
from blpipe.engines.common import train_epoch
from blpipe.engines.local import LocalEngine
from blpipe.errors import ConfigError
from blpipe.forecast.costs import Profile, profile
from blpipe.forecast.ledger import Ledger, without_values
from blpipe.forecast.memory import estimated_bytes, train_alone
from blpipe.forecast.stages import settle, stage_cost
from blpipe.partition import even_starts
from blpipe.plan import Network, Plan, make_network, make_plan
from blpipe.shapes import likeness
from blpipe.specs import EVERYTHING, DataSpec, Share

CPU = torch.device("cpu")


class Batches:
    """Stands for the data: batches of random images, made when they are asked for, on the device."""

    def __init__(self, spec: DataSpec, device: torch.device):
        self._spec, self._device = spec, device

    def train_batches(self, seed: int, epoch: int, batch_size: int, drop_last: bool,
                      start_step: int = 0, share: Share = EVERYTHING) -> Iterator[tuple[Tensor, Tensor]]:
        """As of `blpipe.data.Data`, for one replica."""
        assert share == EVERYTHING
        for _ in range(start_step, self._spec.train_samples // batch_size):
            yield (torch.randn(batch_size, *self._spec.shape, device=self._device),
                   torch.randint(self._spec.classes, (batch_size,), device=self._device))


class Segment(nn.Module):
    """Blocks that keep their input alone, and run again in the backward."""

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """As the blocks'."""
        return checkpoint(self.blocks, x, use_reentrant=False, preserve_rng_state=False)  # nothing draws numbers


def checkpointed(blocks: nn.Sequential, segments: int) -> nn.Sequential:
    """The same blocks under activation checkpointing, in so many even segments."""
    bounds = pairwise([*even_starts(len(blocks), segments), len(blocks)])
    return nn.Sequential(*(Segment(blocks[start:end]) for start, end in bounds))


def local_engine(plan: Plan, case: Case, stages: int, device: torch.device) -> LocalEngine:
    """The engine of one process, on random images."""
    return LocalEngine(_with_checkpointing(plan, case, stages), Batches(plan.data, device), device)  # type: ignore[arg-type]


def _with_checkpointing(plan: Plan, case: Case, stages: int) -> Plan:
    """The plan with each of its stages in the case's segments.

    Args:
        stages: of the even cut that a stage of the plan stands for, 1 in a pipeline; "stages" has a segment for each.
    """
    counts = [case.segments(len(stage), stages) for stage in plan.stages]
    return replace(plan, stages=[stage if count is None else checkpointed(stage, count)
                                 for stage, count in zip(plan.stages, counts, strict=True)])


def measure(task: Task, size: Size, device: torch.device) -> dict[str, Any]:
    """A row of the results: the peak, or those of all stages; None where no cut keeps the limit."""
    row = task.key(size)
    try:
        config, slowest = settled(task, size, device)
    except ConfigError as error:
        return row | {"peak_bytes": None, "why": str(error)}
    if task.part == "local":
        return row | {"peak_bytes": local_peak(task, size, config, device), "cuts": config.partition.cuts}
    peaks = stage_peaks(task.case, size, config, device)
    return row | {"peak_bytes": max(peaks), "stage_bytes": peaks, "cuts": config.partition.cuts, "slowest": slowest}


def local_peak(task: Task, size: Size, config: Config, device: torch.device) -> int:
    """Peak of training in one process."""
    data = size.data(rehearsed_steps(config))
    with _tensors(device):
        plan = make_plan(config, data, _copy(make_network(config, data), device))
        return peak_bytes(plan.model, device,
                          lambda: train_epoch(local_engine(plan, task.case, task.stages, device), 0))


def stage_peaks(case: Case, size: Size, config: Config, device: torch.device) -> list[int]:
    """Peak of each stage as a process of its own. Of our methods, stages that are alike are looked at once."""
    data = size.data(1)
    known: dict[Any, int] = {}
    peaks = []
    with _tensors(device):
        plan = make_plan(config, data, _copy(make_network(config, data), device))
        for k, stage in enumerate(plan.stages):
            alike = k if config.method.name == "bp" else _likeness(plan, k)
            if alike not in known:
                known[alike] = peak_bytes(stage, device, partial(_train, case, plan, k, device))
                for parameter in stage.parameters():
                    parameter.grad = None
            peaks.append(known[alike])
    return peaks


def peak_bytes(held: nn.Module, device: torch.device, train: Callable[[], None]) -> int:
    """Peak of all tensors while `train` runs, those of `held` included, which are there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        train()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before  # `held` moved there meanwhile
    ledger = Ledger()
    for tensor in (*held.parameters(), *held.buffers()):
        ledger.count(tensor)
    with ledger:
        train()
    return ledger.peak


def _train(case: Case, plan: Plan, index: int, device: torch.device) -> None:
    if case.method["name"] == "bp":
        one_f_one_b.train_alone(_with_checkpointing(plan, case, 1), index, device)
    else:
        train_alone(plan, index, device)


def _tensors(device: torch.device) -> AbstractContextManager[object]:
    """Real tensors on a GPU, fake ones elsewhere."""
    return nullcontext() if device.type == "cuda" else FakeTensorMode(allow_non_fake_inputs=True)


def _copy(network: Network, device: torch.device) -> Network:
    fake = device.type != "cuda"
    return replace(network, model=without_values(network.model, device) if fake else copy.deepcopy(network.model))


def _likeness(plan: Plan, k: int) -> Any:
    size = plan.config.train.microbatch_size
    head = likeness(plan.build_head(k)) if k < len(plan.stages) - 1 else None
    return k == 0 or plan.outputs[size][k - 1], likeness(plan.stages[k]), head, plan.links[k]


def settled(task: Task, size: Size, device: torch.device) -> tuple[Config, float]:
    """The config with its cuts, and the slowest stage's seconds relative to those of the even cut, by estimates."""
    network = make_network(size.config(task.case, task.parts, task.microbatches), size.data(1))
    even = even_starts(len(network.model), task.parts)
    if task.cut == "even":
        return size.config(task.case, task.parts, task.microbatches, cuts=_names(network, even)), 1.0
    costs = replace(_costs(size), network=network)
    if task.cut == "limit":
        whole = Task("local", BP, 1)
        bp = local_peak(whole, size, size.config(BP, 1), device)
        wanted = size.config(task.case, task.parts, task.microbatches, strategy="balanced", costs="analytic",
                             memory_limit=int((1 - GOAL) * bp))
        cuts = settle(wanted, network, costs).partition.cuts or ()
        starts = [0, *(network.block_names.index(name) for name in cuts)]
    else:
        starts = best_starts(estimated_bytes(costs), (1.0,) * task.parts) or []
    slowest = _slowest(costs, starts) / _slowest(costs, even)
    return size.config(task.case, task.parts, task.microbatches, cuts=_names(network, starts)), slowest


@cache
def _costs(size: Size) -> Profile:
    """Of every block and of a head after each; the same for all methods."""
    return profile(make_network(size.config(GREEDY, 1), size.data(1)), CPU)


def _names(network: Network, starts: Sequence[int]) -> list[str]:
    return [network.block_names[start] for start in starts[1:]]


def _slowest(costs: Profile, starts: Sequence[int]) -> float:
    method = costs.network.config.method
    return max(float(stage_cost(costs, start, end, method).batch_seconds(method.name, 1))
               for start, end in pairwise([*starts, len(costs.blocks)]))
