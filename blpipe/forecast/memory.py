"""The peak memory of a stage: its own program, run on tensors without values."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from blpipe.balance import Table
from blpipe.config import LinkConfig, MethodConfig, OptimizerConfig, PartitionConfig
from blpipe.engines.alone import rehearsed_steps, run_alone
from blpipe.engines.build import build_stage, has_graphs
from blpipe.forecast.costs import Profile
from blpipe.forecast.ledger import Ledger, Pool, without_values
from blpipe.graphs import Recorder
from blpipe.links import Links, fitting, stage_links
from blpipe.optim import build_optimizer
from blpipe.plan import Network, Plan, make_plan
from blpipe.plugins import call
from blpipe.program import ACTIVATIONS_AHEAD, errors_ahead
from blpipe.steps import Step
from blpipe.transport.messages import IN_FLIGHT

Result = TypeVar("Result")


class KeptMemory:
    """Counts as CUDA graphs do: a part runs once, and what it allocated stays taken; see `graphs.Runner`."""

    repeats = True

    def __init__(self, ledger: Ledger):
        self._ledger, self._pool = ledger, Pool()
        self._results: dict[str, Any] = {}
        self._inputs: list[Tensor] = []

    def run(self, part: str, function: Callable[..., Result], *inputs: Tensor | float) -> Result:
        """`function(*inputs)`; later calls return what the first one did."""
        if part not in self._results:
            own = [torch.empty_like(x) if isinstance(x, Tensor) else x for x in inputs]
            self._inputs += [x for x in own if isinstance(x, Tensor)]
            with self._ledger.into(self._pool):
                self._results[part] = function(*own)
        result: Result = self._results[part]
        return result


class Rehearsal:
    """Runs stages of a network on fake tensors, for the memory that they take."""

    def __init__(self, network: Network, device: torch.device):
        self._mode, self._device = FakeTensorMode(allow_non_fake_inputs=True), device
        train = network.config.train.model_copy(update={  # of compiled code and of losses nothing can be known
            "compile": False, "on_nonfinite": "ignore"})
        with self._mode:
            self._network = replace(network, model=without_values(network.model, device),
                                    config=network.config.model_copy(update={"train": train}))

    def peak_bytes(self, start: int, end: int, links: Links | None = None) -> int | None:
        """Peak of all tensors of a stage of the blocks start … end−1 while it trains in a process of its own.

        None where something, such as an optimizer, reads their values.
        Its program runs for as many steps as it takes to have every link under way, its queues' buffers included.
        With `runtime.cuda_graphs` on a GPU, all that a recording keeps counts.
        Not counted: the process itself, the libraries' workspaces, and what an allocator keeps for later.

        Args:
            links: of that stage; without, as if each block before and after it were a stage.
        """
        try:
            with self._mode, self._device:  # where heads are made too: fake tensors cannot be moved
                return self._rehearse(start, end, links)
        except DataDependentOutputException:
            return None
        finally:
            for parameter in self._network.model.parameters():
                parameter.grad = None

    def _rehearse(self, start: int, end: int, links: Links | None) -> int:
        names, config = self._network.block_names, self._network.config
        inner = [i for i in (start, end) if 0 < i < len(names)]
        cuts = tuple(names[i] for i in inner)
        partition = PartitionConfig(stages=len(cuts) + 1, cuts=cuts)
        own = [self._network.stage_of_block[i - 1] for i in (*inner, len(names))]
        method, index = fitting(config.method.with_parts_of(own)), 1 if start else 0
        unlinked = method if method.name == "bp" else method.model_copy(update={"name": "greedy", "local_weight": 1.0})
        optimizer = config.optimizer.model_copy(update={"lr_factors": {}})  # which may name heads of other cuts
        plan = make_plan(config.model_copy(update={"partition": partition, "method": unlinked, "optimizer": optimizer}),
                         self._network.data, self._network)
        links = links or most_links(method, start, end - start, len(names) - end, config.partition.stage_count)
        plan = replace(plan, links=[links if k == index else other for k, other in enumerate(plan.links)])
        ledger = Ledger()
        for tensor in (*plan.stages[index].parameters(), *plan.stages[index].buffers()):
            ledger.count(tensor)
        recorder = Recorder(record=partial(KeptMemory, ledger)) if has_graphs(config, self._device) else None
        with ledger:
            train_alone(plan, index, self._device, recorder)
        return ledger.peak


def train_alone(plan: Plan, index: int, device: torch.device, recorder: Recorder | None = None) -> None:
    """Build the stage with this index, from 0, and train it as in a process of its own, without neighbours.

    It does as many steps as it takes to have every link under way, in recordings where there are any.
    """
    train = plan.config.train
    count = rehearsed_steps(plan.config, max(plan.links[index].hops_in, default=0), recorder is not None)
    steps = [Step(i, (train.microbatch_size,) * train.microbatches) for i in range(count)]
    run_alone(build_stage(plan, index, device, recorder), plan, index, steps, device)


def most_links(method: MethodConfig, before: int, blocks: int, after: int, stages: int) -> Links:
    """Of one of so many stages, of so many blocks, where each block before and after it may be a stage."""
    before, after = min(before, stages - 1), min(after, stages - 1)
    return stage_links(method, [*[1] * before, blocks, *[1] * after])[before]


def estimated_bytes(costs: Profile) -> Table:
    """About what a stage of the blocks i … j−1 needs: [N + 1, N + 1], infinity for j ≤ i."""
    count = len(costs.blocks)
    start, end = np.arange(count + 1)[:, None], np.arange(count + 1)[None, :]
    return np.where(start < end, _estimate(costs, np.minimum(start, end), end), np.inf)


def _estimate(costs: Profile, start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.float64]:
    config, passing = costs.network.config, _passing_bytes(costs)
    all_bytes, trained_bytes = _weight_bytes(costs.network)
    own, trained = all_bytes[end] - all_bytes[start], trained_bytes[end] - trained_bytes[start]
    computing = _computing_bytes(costs, start, end)
    if config.train.replicas > 1:
        computing = np.maximum(computing, trained)  # the sums of gradients, when nothing else is computed
    # The gradients, the averages, and the optimizer's own.
    copies = 1 + (config.train.ema is not None) + state_copies(config.optimizer, costs.device)
    needs = own + copies * trained + computing
    if config.method.name == "bp":
        return needs
    there, back = (0.5 if wire == "bf16" else 1.0 for wire in (config.train.wire, config.method.link.wire))
    needs = needs + passing[start] + there * (ACTIVATIONS_AHEAD * passing[start] + IN_FLIGHT * passing[end])
    if config.method.linked:
        linked = _linked_bytes(costs, start, end, computing, trained_bytes, back)
        needs = needs + np.where(end < len(costs.blocks), linked, 0) + IN_FLIGHT * back * passing[start]
    return needs


def _weight_bytes(network: Network) -> list[NDArray[np.int64]]:
    """Of the parameters of the blocks 0 … i−1, and of those that are trained; one of several blocks counts once."""
    seen: set[Tensor] = set()
    sums = [[0], [0]]
    for block in network.model:
        new = [parameter for parameter in block.parameters() if parameter not in seen]
        seen.update(new)
        for each, chosen in zip(sums, (new, [p for p in new if p.requires_grad]), strict=True):
            each.append(each[-1] + sum(parameter.nbytes for parameter in chosen))
    return [np.array(each) for each in sums]


def _passing_bytes(costs: Profile) -> NDArray[np.int64]:
    """What passes each boundary; that before the first block counts as nothing, as does the model's output."""
    return np.array([0] + [block.output_bytes for block in costs.blocks[:-1]] + [0])


def _computing_bytes(costs: Profile, start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.float64]:
    """What forwards keep for their own backwards, at the most."""
    config, saved, outputs = costs.network.config, costs.sums["saved_bytes"], costs.sums["output_bytes"]
    held = outputs if config.train.recompute else saved
    if config.method.name == "bp":
        in_flight = min(config.train.microbatches, config.partition.stage_count)  # in 1F1B
        if config.train.recompute:
            return (in_flight - 1) * (held[end] - held[start]) + _again(costs)[start, end]
        return in_flight * (held[end] - held[start])
    heads = np.array([0] + [head.saved_bytes if head is not None else 0 for head in costs.heads])
    computing = held[end] - held[start] + heads[end] + 2 * _passing_bytes(costs)[end]
    return np.maximum(computing, _again(costs)[start, end]) if config.train.recompute else computing


def _linked_bytes(costs: Profile, start: NDArray[np.int64], end: NDArray[np.int64], computing: NDArray[np.float64],
                  trained: NDArray[np.int64], back: float) -> NDArray[np.float64]:
    """What a stage that is not the last keeps for the errors to come, and these.

    Args:
        computing: see `_computing_bytes`.
        trained: of `_weight_bytes`.
        back: the share of an error's bytes that is sent.
    """
    config, passing = costs.network.config, _passing_bytes(costs)
    link, train = config.method.link, config.train
    held = costs.sums["output_bytes" if train.recompute else "saved_bytes"]
    tail = tail_start(link, start, end)
    kept = passing[tail]
    if link.keep == "graph":
        kept = kept + held[end] - held[tail] - (passing[end] if train.recompute else 0)
    if link.joint:
        kept = kept + passing[end]  # the local error
    hops = most_hops(costs, end, link)
    farthest = _stages_after(costs, end) if one_for_all(link) else hops
    delay = link.delay_in_microbatches(train.microbatches)
    received = hops * errors_ahead(delay, train.microbatches, 1) * back * passing[end]
    if has_graphs(config, costs.device):  # a recording, and a snapshot, for each microbatch under way
        return delay * farthest * (computing + trained[end] - trained[tail]) + received
    snapshots = np.ceil(delay * farthest / train.microbatches) * (trained[end] - trained[tail])
    return snapshots + delay * farthest * kept + received


def _again(costs: Profile) -> Table:
    """The most that the blocks i … j−1 take while they run again, the last one first: [N + 1, N + 1]."""
    before = costs.sums["output_bytes"][:-1]
    own = np.array([block.saved_bytes + block.output_bytes for block in costs.blocks])  # the latter for a gradient
    table = np.zeros((len(own) + 1, len(own) + 1))
    for start in range(len(own)):
        table[start, start + 1:] = np.maximum.accumulate((before + own)[start:]) - before[start]
    return table


def one_for_all(link: LinkConfig) -> bool:
    """Whether a single error, that of the last loss, goes through all stages."""
    return link.take == "farthest" and link.reach == "all"


def most_hops(costs: Profile, end: Any, link: LinkConfig) -> Any:
    """How many errors can come back for a microbatch to a stage that ends before block `end`, a number or an array."""
    after = _stages_after(costs, end)
    if link.off:
        return np.zeros_like(after)
    most = 1 if one_for_all(link) else link.reach
    return after if most == "all" else np.minimum(most, after)


def _stages_after(costs: Profile, end: Any) -> Any:
    """At most."""
    return np.minimum(len(costs.blocks) - end, costs.network.config.partition.stage_count - 1)


def tail_start(link: LinkConfig, start: Any, end: Any) -> Any:
    """The first block of the tail of the stage start … end−1, or of many stages: numbers, or arrays of them."""
    return start if link.length == "all" else np.maximum(start, end - link.length)


def state_copies(config: OptimizerConfig, device: torch.device) -> int:
    """How many tensors of a parameter's size the optimizer keeps for it."""
    parameter = nn.Parameter(torch.zeros(3, 5, device=device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(config, [parameter])
    assert optimizer is not None
    call("optimizer", optimizer.step)
    return sum(value.shape == parameter.shape for value in optimizer.state[parameter].values()
               if isinstance(value, Tensor))
