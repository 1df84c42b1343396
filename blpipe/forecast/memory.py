"""The peak memory of a stage: its own program, run on tensors without values."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blpipe.balance import Table
from blpipe.config import LinkConfig, MethodConfig, OptimizerConfig
from blpipe.engines.alone import rehearsed_steps, run_alone
from blpipe.engines.common import build_stage
from blpipe.forecast.costs import Profile
from blpipe.forecast.ledger import Ledger, without_values
from blpipe.optim import build_optimizer
from blpipe.plan import Links, Network, Plan, Step, fitting, make_plan, stage_links
from blpipe.program import ACTIVATIONS_AHEAD, errors_ahead
from blpipe.transport.messages import IN_FLIGHT


class Rehearsal:
    """Runs stages of a network on fake tensors, for the memory that they take."""

    def __init__(self, network: Network, device: torch.device):
        self._mode, self._device = FakeTensorMode(allow_non_fake_inputs=True), device
        train = network.config.train.model_copy(update={  # of compiled code and of losses nothing can be known
            "compile": False, "on_nonfinite": "ignore"})
        with self._mode:
            self._network = replace(network, model=without_values(network.model, device),
                                    config=network.config.model_copy(update={"train": train}))

    def peak_bytes(self, start: int, end: int, links: Links | None = None) -> int:
        """Peak of all tensors of a stage of the blocks start … end−1 while it trains in a process of its own.

        Its program runs for as many steps as it takes to have every link under way, its queues' buffers included.
        Not counted: the process itself, the libraries' workspaces, and what an allocator keeps for later.

        Args:
            links: of that stage; without, as if each block before and after it were a stage.
        """
        with self._mode, self._device:  # where heads are made too: fake tensors cannot be moved
            peak = self._rehearse(start, end, links)
        for parameter in self._network.model.parameters():
            parameter.grad = None
        return peak

    def _rehearse(self, start: int, end: int, links: Links | None) -> int:
        names, config = self._network.block_names, self._network.config
        inner = [i for i in (start, end) if 0 < i < len(names)]
        cuts = tuple(names[i] for i in inner)
        partition = config.partition.model_copy(update={"stages": len(cuts) + 1, "cuts": cuts})
        own = [self._network.stage_of_block[i - 1] for i in (*inner, len(names))]
        method, index = fitting(config.method.with_parts_of(own)), 1 if start else 0
        unlinked = method if method.name == "bp" else method.model_copy(update={"name": "greedy", "local_weight": 1.0})
        plan = make_plan(config.model_copy(update={"partition": partition, "method": unlinked}), self._network.data,
                         self._network)
        links = links or most_links(method, start, end - start, len(names) - end)
        plan = replace(plan, links=[links if k == index else other for k, other in enumerate(plan.links)])
        ledger = Ledger()
        for tensor in (*plan.stages[index].parameters(), *plan.stages[index].buffers()):
            ledger.count(tensor)
        with ledger:
            train_alone(plan, index, self._device)
        return ledger.peak


def train_alone(plan: Plan, index: int, device: torch.device) -> None:
    """Build the stage with this index, from 0, and train it as in a process of its own, without neighbours.

    It does as many steps as it takes to have every link under way.
    """
    train = plan.config.train
    count = rehearsed_steps(plan.config, max(plan.links[index].hops_in, default=0))
    steps = [Step(i, (train.microbatch_size,) * train.microbatches) for i in range(count)]
    run_alone(build_stage(plan, index, device), plan, index, steps, device)


def most_links(method: MethodConfig, before: int, blocks: int, after: int) -> Links:
    """Of a stage of so many blocks, where each block before and after it may be a stage."""
    links = stage_links(method, [*[1] * before, blocks, *[1] * after])
    return links[before]


def estimated_bytes(costs: Profile) -> Table:
    """About what a stage of the blocks i … j−1 needs: [N + 1, N + 1], infinity for j ≤ i."""
    count = len(costs.blocks)
    start, end = np.arange(count + 1)[:, None], np.arange(count + 1)[None, :]
    return np.where(start < end, _estimate(costs, np.minimum(start, end), end), np.inf)


def _estimate(costs: Profile, start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.float64]:
    config, blocks = costs.network.config, costs.blocks
    link, train = config.method.link, config.train
    params = np.cumsum([0] + [block.param_bytes for block in blocks])
    saved = np.cumsum([0] + [block.saved_bytes for block in blocks])
    # What passes each boundary; that before the first block counts as nothing, as does the model's output.
    passing = np.array([0] + [block.output_bytes for block in blocks[:-1]] + [0])
    heads = np.array([0] + [head.saved_bytes if head is not None else 0 for head in costs.heads])
    copies = 2 + state_copies(config.optimizer, costs.device)  # the weights, their gradients and the optimizer's own
    needs = copies * (params[end] - params[start])
    if config.method.name == "bp":
        in_flight = min(train.microbatches, config.partition.stage_count)  # in 1F1B
        return needs + in_flight * (saved[end] - saved[start])
    needs = needs + saved[end] - saved[start] + heads[end] + 2 * np.maximum(passing[start], passing[end])
    needs = needs + (ACTIVATIONS_AHEAD + 1) * passing[start] + IN_FLIGHT * passing[end]
    if config.method.name == "backlink":
        tail = tail_start(link, start, end)
        kept = saved[end] - saved[tail] if link.keep == "graph" else passing[tail]
        after = np.minimum(len(blocks) - end, config.partition.stage_count - 1)
        farthest = after if link.reach == "all" else np.minimum(link.reach, after)
        hops = np.minimum(farthest, 1) if one_for_all(link) else farthest
        delay = link.delay_in_microbatches(train.microbatches)
        snapshots = np.ceil(delay * farthest / train.microbatches) * (params[end] - params[tail])
        received = hops * errors_ahead(delay, train.microbatches, 1) * passing[end]
        linked = snapshots + delay * farthest * kept + received
        needs = needs + np.where(end < len(blocks), linked, 0) + IN_FLIGHT * passing[start]
    return needs


def one_for_all(link: LinkConfig) -> bool:
    """Whether a single error, that of the last loss, goes through all stages."""
    return link.take == "farthest" and link.reach == "all"


def tail_start(link: LinkConfig, start: Any, end: Any) -> Any:
    """The first block of the tail of the stage start … end−1, or of many stages: numbers, or arrays of them."""
    return start if link.length == "all" else np.maximum(start, end - link.length)


def state_copies(config: OptimizerConfig, device: torch.device) -> int:
    """How many tensors of a parameter's size the optimizer keeps for it."""
    parameter = nn.Parameter(torch.zeros(3, 5, device=device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(config, [parameter])
    assert optimizer is not None
    optimizer.step()
    return sum(value.shape == parameter.shape for value in optimizer.state[parameter].values()
               if isinstance(value, Tensor))
