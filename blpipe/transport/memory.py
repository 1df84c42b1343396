"""A queue between two stages of one process."""

from collections import deque

from torch import Tensor


class MemoryQueue:
    """Both ends of a queue."""

    def __init__(self) -> None:
        self._messages: deque[tuple[Tensor, ...]] = deque()

    def has_message(self) -> bool:
        """Whether `get` finds something."""
        return bool(self._messages)

    def put(self, *tensors: Tensor) -> None:
        """Append a message: contiguous, as after a transfer, so that kernels take the same path in every engine."""
        # Through one dimension, for the strides of axes of length 1 too: they say what layout a map has.
        self._messages.append(tuple(tensor.contiguous().view(-1).view(tensor.shape) for tensor in tensors))

    def get(self) -> tuple[Tensor, ...]:
        """The oldest message."""
        return self._messages.popleft()
