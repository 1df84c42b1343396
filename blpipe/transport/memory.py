"""A queue between two stages of one process."""

from collections import deque

from torch import Tensor

from blpipe.transport.messages import as_sent


class MemoryQueue:
    """Both ends of a queue; see `as_sent` for `channels_last`."""

    def __init__(self, channels_last: bool = False) -> None:
        self._channels_last = channels_last
        self._messages: deque[tuple[Tensor, ...]] = deque()

    def has_message(self) -> bool:
        """Whether `get` finds something."""
        return bool(self._messages)

    def put(self, *tensors: Tensor) -> None:
        """Append a message."""
        self._messages.append(tuple(as_sent(tensor, self._channels_last) for tensor in tensors))

    def get(self) -> tuple[Tensor, ...]:
        """The oldest message."""
        return self._messages.popleft()
