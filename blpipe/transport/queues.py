"""Queues between two processes, over torch.distributed point-to-point.

A message is one flat buffer, so that it costs one send, whatever it holds. Both ends derive the same layouts
before the first message (`world.shake_hands` compares them). A process uses all of its queues from one thread.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from blpipe.errors import PeerLostError
from blpipe.text import dtype_name
from blpipe.transport.messages import IN_FLIGHT, Layout, layout_of, message_bytes, views


@contextmanager
def lost_peer(doing: str) -> Iterator[None]:
    """What torch.distributed raises, as a PeerLostError that says what this process was doing.

    What a GPU has to say of this process's own kernels, which may only come up here, stays what it is.
    """
    try:
        yield
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise PeerLostError(f"{doing}: that process ended, or did not answer within "
                            "runtime.timeout_seconds") from error


class _End:
    """What the two ends of a queue share.

    Args:
        group: a group of this process and `peer` that serves this queue alone.
        peer: rank of the other process.
        name: of the stages at both ends, for messages.
        device: where the tensors live; `via` is where they are sent from (CPU for gloo).
        channels_last: how maps are laid out on their way.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, name: str, device: torch.device, via: torch.device,
                 channels_last: bool = False):
        self._group, self._peer, self._name = group, peer, name
        self._device, self._via, self._channels_last = device, via, channels_last
        self._pin = device.type == "cuda" and via.type == "cpu"  # page-locked memory is copied to a GPU at full speed
        self.wait_seconds = 0.0
        self.sent_bytes = 0

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._via, pin_memory=self._pin)

    def _wait(self, work: dist.Work) -> None:
        started = perf_counter()
        with lost_peer(self._name):
            work.wait()
        self.wait_seconds += perf_counter() - started


class SendQueue(_End):
    """The sending end. Few messages are under way at a time, from as many buffers in turn.

    A buffer is written again once its send is complete.

    Args:
        layouts: those that the other end may expect; None for any.
    """

    def __init__(self, *args: object, layouts: Collection[Layout] | None = None, **kwargs: object):
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._layouts = layouts
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()
        self._free = [self._buffer(0) for _ in range(IN_FLIGHT)]

    def put(self, *tensors: Tensor) -> None:
        """Send a message; waits for an earlier one where too many are under way.

        Raises:
            ValueError: the plan has no such layout, and the other end would misread it.
        """
        layout = layout_of(tensors)
        if self._layouts is not None and layout not in self._layouts:
            shape, dtype = layout[0]
            raise ValueError(f"it gives {dtype_name(dtype)} {list(shape)}, and did not when its shapes were traced "
                             "without values; its output's shape and type must not depend on values")
        if not self._free:
            self._complete_one()
        size, buffer = message_bytes(layout), self._free.pop()
        if len(buffer) < size:
            buffer = self._buffer(size)
        for view, tensor in zip(views(buffer, layout, self._channels_last), tensors, strict=True):
            view.copy_(tensor)
        with lost_peer(self._name):
            work = dist.isend(buffer[:size], self._peer, self._group)
        assert work is not None
        self._sends.append((work, buffer))
        self.sent_bytes += size

    def drain(self) -> None:
        """Wait until everything sent has arrived, and let go of the buffers: what follows may be smaller."""
        while self._sends:
            self._complete_one()
        self._free = [self._buffer(0) for _ in range(IN_FLIGHT)]

    def _complete_one(self) -> None:
        work, buffer = self._sends.popleft()
        self._wait(work)
        self._free.append(buffer)


class ReceiveQueue(_End):
    """The receiving end, for the messages that `expect` announced. Receives are posted ahead.

    A message's tensors are views of the buffer that it came in, which lives as long as they do: nothing is copied.
    torch's allocators, of a GPU's memory and of pinned memory, then give it to a later receive.
    """

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._layouts: Iterator[Layout] = iter(())
        self._posted: deque[tuple[dist.Work, Tensor, Layout]] = deque()

    def expect(self, layouts: Iterable[Layout], ahead: int) -> None:
        """Announce the messages to come, all earlier ones being through; `ahead` of them are posted at any time."""
        assert not self._posted and next(self._layouts, None) is None, f"{self._name}: not drained"
        self._layouts = iter(layouts)
        for layout in islice(self._layouts, ahead):
            self._post(layout)

    def has_message(self) -> bool:
        """Always: `get` waits for one."""
        return True

    def get(self) -> tuple[Tensor, ...]:
        """The next message, on this stage's device."""
        work, buffer, layout = self._posted.popleft()
        self._wait(work)
        for following in islice(self._layouts, 1):
            self._post(following)
        return tuple(tensor.to(self._device, non_blocking=self._pin)
                     for tensor in views(buffer, layout, self._channels_last))

    def _post(self, layout: Layout) -> None:
        buffer = self._buffer(message_bytes(layout))
        with lost_peer(self._name):
            work = dist.irecv(buffer, self._peer, self._group)
        assert work is not None
        self._posted.append((work, buffer, layout))
