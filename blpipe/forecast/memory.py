"""The peak memory of a stage: its own program, run on tensors without values."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from blpipe.balance import Table
from blpipe.config import OptimizerConfig
from blpipe.engines.common import build_stage, role
from blpipe.engines.pipeline import ACTIVATIONS_AHEAD, errors_ahead
from blpipe.forecast.costs import Profile
from blpipe.forecast.ledger import Ledger, on_meta
from blpipe.optim import build_optimizer
from blpipe.plan import Network, Step, TensorSpec, make_plan, tail_length
from blpipe.program import Ports, execute, train_program
from blpipe.transport.queues import SendQueue

_META = torch.device("meta")


def meta_network(network: Network) -> Network:
    """The same network without values."""
    return replace(network, model=on_meta(network.model))


def peak_bytes(network: Network, start: int, end: int) -> int:
    """Peak of all tensors of one stage while it trains, in a process of its own, its queues' buffers included.

    Its program runs for as many steps as it takes to have every link under way. Not counted: the process itself,
    the libraries' workspaces, and what an allocator keeps for later.

    Args:
        network: from `meta_network`; the stage holds its blocks start … end−1.
    """
    names, config = network.block_names, network.config
    cuts = tuple(names[i] for i in (start, end) if 0 < i < len(names))
    config = config.model_copy(update={
        "partition": config.partition.model_copy(update={"stages": len(cuts) + 1, "cuts": cuts}),
        "optimizer": config.optimizer.model_copy(update={  # fused kernels want values
            "args": {key: value for key, value in config.optimizer.args.items() if key != "fused"}})})
    plan, index = make_plan(config, network.data, network), 1 if start else 0
    stage = build_stage(plan, index, _META)
    ledger = Ledger()
    for part in (stage.blocks, *([stage.head] if stage.head is not None else [])):
        for tensor in (*part.parameters(), *part.buffers()):
            ledger.count(tensor)
    train, delay = config.train, config.method.link.delay
    size = train.batch_size // train.microbatches
    given = plan.outputs[size][index - 1] if index else plan.input(size)
    gives = plan.outputs[size][index]
    steps = [Step(i, (size,) * train.microbatches) for i in range(delay + 2)]
    with ledger:
        ports = Ports(_Inbox([given, plan.targets(size)], ACTIVATIONS_AHEAD if index else 0), _Outbox(),
                      _Inbox([gives], errors_ahead(config)), _Outbox())
        for _ in execute(train_program(steps, role(plan, index), delay), stage, ports, steps, lambda step: 1.0,
                         lambda op: None):
            pass
    for parameter in network.model.parameters():
        parameter.grad = None
    return ledger.peak


def estimated_bytes(costs: Profile) -> Table:
    """What a stage of the blocks i … j−1 needs at least about: [N + 1, N + 1], infinity for j ≤ i."""
    config, blocks = costs.network.config, costs.blocks
    link, train = config.method.link, config.train
    total_params = _sums(block.param_bytes for block in blocks)
    total_saved = _sums(block.saved_bytes for block in blocks)
    copies = 2 + state_copies(config.optimizer)  # the weights, their gradients and the optimizer's own
    count = len(blocks)
    table = torch.full((count + 1, count + 1), float("inf"), dtype=torch.float64).numpy()
    for start in range(count):
        for end in range(start + 1, count + 1):
            saved = total_saved[end] - total_saved[start]
            needs = copies * (total_params[end] - total_params[start])
            linked = config.method.name == "backlink" and end < count
            if config.method.name == "bp":
                saved *= min(train.microbatches, config.partition.stage_count)  # in flight in 1F1B
            elif linked:
                tail = end - tail_length(link, end - start)
                if link.delay:
                    needs += total_params[end] - total_params[tail]
                kept = total_saved[end] - total_saved[tail] if link.keep == "graph" else blocks[tail - 1].output_bytes
                saved += kept * link.delay * train.microbatches
            table[start, end] = needs + saved
    return table


def state_copies(config: OptimizerConfig) -> int:
    """How many tensors of a parameter's size the optimizer keeps for it."""
    parameter = nn.Parameter(torch.zeros(3, 5))
    parameter.grad = torch.zeros(3, 5)
    optimizer = build_optimizer(config, [parameter])
    assert optimizer is not None
    optimizer.step()
    return sum(value.shape == parameter.shape for value in optimizer.state[parameter].values()
               if isinstance(value, Tensor))


def _sums(values: Iterable[int]) -> list[int]:
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


class _Inbox:
    """Receives a message whenever asked; so many buffers wait at any time, as in `ReceiveQueue`."""

    def __init__(self, layout: list[TensorSpec], ahead: int):
        self._new: Callable[[], tuple[Tensor, ...]] = lambda: tuple(
            torch.empty(spec.shape, dtype=spec.dtype, device=_META) for spec in layout)
        self._posted = deque(self._new() for _ in range(ahead))

    def has_message(self) -> bool:
        """Always."""
        return True

    def get(self) -> tuple[Tensor, ...]:
        """A message."""
        self._posted.append(self._new())
        return self._posted.popleft()


class _Outbox:
    """Keeps the buffers of the last few messages, as `SendQueue` does."""

    def __init__(self) -> None:
        self._sent: deque[list[Tensor]] = deque(maxlen=SendQueue.IN_FLIGHT)

    def has_room(self) -> bool:
        """Always."""
        return True

    def put(self, *tensors: Tensor) -> None:
        """Send a message."""
        self._sent.append([torch.empty_like(tensor) for tensor in tensors])
