"""A stage's program without neighbours: for the memory that it takes, and to have a GPU load what it runs."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import chain, islice
from math import ceil

import torch
from torch import Tensor

from blpipe.config import Config
from blpipe.data import Data
from blpipe.engines.common import role
from blpipe.engines.feed import Feed, train_microbatches
from blpipe.graphs import WARM_UP
from blpipe.plan import Plan
from blpipe.program import ACTIVATIONS_AHEAD, Factors, Inbox, Ports, errors_ahead, execute, train_program
from blpipe.stage import Stage
from blpipe.steps import Step
from blpipe.transport.messages import IN_FLIGHT, Layout, layout_of, message_bytes, views
from blpipe.transport.sums import Packed


def run_alone(stage: Stage, plan: Plan, index: int, steps: Sequence[Step], device: torch.device,
              link_factor: float = 1.0, cut: Sequence[int] = ()) -> None:
    """Train a new stage, of this index from 0, on zeros. Its microbatches are those of `steps`, of one size.

    Its queues give and take at once, and hold as many buffers as those between processes.

    Args:
        cut: the sizes that batches are cut into; the first stage then gets those of them that have the size of its
            microbatches.
    """
    stage.train(True)
    mix_ratio = 0.5 if plan.config.data.augment.mixes else None
    size, before, after = steps[0].sizes[0], _maps_last(plan, index - 1), _maps_last(plan, index)
    given = plan.activation(size, index - 1) if index else plan.input(size)
    ahead = errors_ahead(plan.delay, plan.config.train.microbatches, len(plan.links[index].hops_in))
    inbox: Inbox = _Inbox((given, plan.targets(size)), ACTIVATIONS_AHEAD if index else 0, device, before)
    if cut and not index:
        inbox = Feed(_slices(plan, size, cut, device))
    errors_in = _Inbox((plan.error(size, index),), ahead, device, after)
    ports = Ports(inbox, _Outbox(after), errors_in, _Outbox(before), _Sum())
    for _ in execute(train_program(steps, role(plan, index), plan.delay), stage, ports, steps,
                     lambda step: Factors(link=link_factor, mix_ratio=mix_ratio), lambda op: None):
        pass


def _maps_last(plan: Plan, stage: int) -> bool:
    """How messages from this stage to the next and back are laid out; what the data give is as it is."""
    return stage >= 0 and plan.channels_last(stage)


def rehearsed_steps(config: Config, farthest: int = 1, recorded: bool = False) -> int:
    """How many steps it takes to have every link under way, the farthest hop being given; and CUDA graphs made."""
    micro = config.train.microbatches
    before = ceil(WARM_UP / micro) if recorded else 0
    return before + ceil(config.method.link.delay_in_microbatches(micro) * max(1, farthest) / micro) + 2


def load_kernels(stage: Stage, plan: Plan, index: int, device: torch.device, data: Data | None) -> None:
    """Run once all that a new stage, of this index from 0, will run on a GPU, and have it be as new again.

    CUDA loads a kernel when it is first used, and may wait for all that runs on the GPU before it does ("Lazy
    Loading" in the CUDA C++ Programming Guide). A receive that was posted ahead runs there too, until its message
    comes; it may wait for this very stage, which then never gets to send. CUDA may wait before it gives or takes memory
    as well: what this has taken, torch's allocator keeps for the run. What a user's modules keep outside of parameters
    and buffers, and a user's optimizer outside of its state_dict, stays as the run leaves it.

    Args:
        data: of the first stage.
    """
    before = [tensor.detach().clone() for tensor in _tensors(stage)]
    stream = stage.stream.state
    optimizer = deepcopy(stage.update.optimizer.state_dict()) if stage.update.optimizer is not None else {}
    for sizes in dict.fromkeys(plan.step_sizes):
        for size in dict.fromkeys(sizes):
            count = rehearsed_steps(plan.config, max(plan.links[index].hops_in, default=0), recorded=True)
            steps = [Step(i, (size,) * len(sizes)) for i in range(count)]
            # It multiplies by the factor, as a schedule may.
            run_alone(stage, plan, index, steps, device, link_factor=0.5, cut=sizes)
    stage.train(False)
    for size in dict.fromkeys(plan.evaluation_sizes()):
        given = plan.outputs[size][index - 1] if index else plan.input(size)
        stage.evaluate(*_zeros((given, plan.targets(size)), device, _maps_last(plan, index - 1)))
    for count in (1, 2):  # as the watch over losses does; of one tensor, torch makes a plain copy
        torch.stack([torch.as_tensor(stage.tally.loss_sum)] * count).isfinite()
    if data is not None:
        _load_batches(plan, data)
    for tensor, values in zip(_tensors(stage), before, strict=True):
        tensor.detach().copy_(values)
    stage.stream.state = stream
    if stage.update.optimizer is not None:
        stage.update.optimizer.load_state_dict(optimizer)
    stage.update.restart_averages()
    stage.train(True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _tensors(stage: Stage) -> list[Tensor]:
    return [tensor for part in stage.parts for tensor in chain(part.parameters(), part.buffers())]


def _load_batches(plan: Plan, data: Data) -> None:
    """Prepare a batch of each size, of what is held on the device or of zeros, and mix its images in every way."""
    mixes = plan.mixing.examples() if plan.mixing else []
    for step in {step.sizes: step for step in plan.train_steps(0)}.values():
        if data.is_held_there:
            held = islice(train_microbatches(data, plan, 0, step.index), len(step.sizes))
            microbatches = [x for x, _ in held]
        else:
            x, _ = data.zeros(sum(step.sizes))
            microbatches = list(x.split(step.sizes))
        for mix in mixes:
            for x in microbatches:
                mix.of(x)


def _slices(plan: Plan, size: int, cut: Sequence[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Microbatches of this size out of batches that are cut so: kernels depend on where in memory a tensor begins."""
    while True:
        x, targets = _zeros((plan.input(sum(cut)), plan.targets(sum(cut))), device, channels_last=False)
        yield from (pair for pair in zip(x.split(cut), targets.split(cut), strict=True) if len(pair[0]) == size)


class _Inbox:
    """Receives zeros whenever asked; so many buffers wait at any time, as in `ReceiveQueue`."""

    def __init__(self, layout: Layout, ahead: int, device: torch.device, channels_last: bool):
        self._new: Callable[[], tuple[Tensor, ...]] = lambda: _zeros(layout, device, channels_last)
        self._posted = deque(self._new() for _ in range(ahead))

    def has_message(self) -> bool:
        """Always."""
        return True

    def get(self) -> tuple[Tensor, ...]:
        """A message."""
        self._posted.append(self._new())
        return self._posted.popleft()


class _Outbox:
    """Fills and keeps the buffers of the last few messages, as `SendQueue` does."""

    def __init__(self, channels_last: bool):
        self._channels_last = channels_last
        self._sent: deque[tuple[Tensor, ...]] = deque()

    def put(self, *tensors: Tensor) -> None:
        """Send a message, once the oldest has made room."""
        if len(self._sent) >= IN_FLIGHT:
            self._sent.popleft()
        self._sent.append(_zeros(layout_of(tensors), tensors[0].device, self._channels_last))
        for buffer, tensor in zip(self._sent[-1], tensors, strict=True):
            buffer.copy_(tensor)


class _Sum:
    """Gives back what was put, packed and unpacked as in `SumQueue`."""

    def put(self, *tensors: Tensor) -> None:
        """Pack them."""
        self._packed = Packed.of(tensors)

    def has_message(self) -> bool:
        """Always."""
        return True

    def get(self) -> tuple[Tensor, ...]:
        """Unpack them."""
        packed = self._packed
        del self._packed
        return packed.tensors()


def _zeros(layout: Layout, device: torch.device, channels_last: bool) -> tuple[Tensor, ...]:
    return views(torch.zeros(message_bytes(layout), dtype=torch.uint8, device=device), layout, channels_last)
