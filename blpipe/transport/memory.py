"""A queue between two stages of one process, and what replicas of a stage add up there."""

from collections import deque
from collections.abc import Sequence
from functools import reduce

import torch
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


class MemorySum:
    """One replica's end of what they add up; see `program.Sum`.

    Args:
        ends: of all replicas, in order: the summands that each has from every one.
    """

    def __init__(self, ends: Sequence[Sequence[deque[tuple[Tensor, ...]]]], replica: int):
        self._ends, self._replica = ends, replica

    @classmethod
    def ends(cls, replicas: int) -> list["MemorySum"]:
        """One for each replica."""
        ends = [[deque[tuple[Tensor, ...]]() for _ in range(replicas)] for _ in range(replicas)]
        return [cls(ends, replica) for replica in range(replicas)]

    def put(self, *tensors: Tensor) -> None:
        """Give copies to all."""
        copies = tuple(tensor.clone() for tensor in tensors)
        for end in self._ends:
            end[self._replica].append(copies)

    def has_message(self) -> bool:
        """Whether all have given theirs."""
        return all(self._ends[self._replica])

    def get(self) -> tuple[Tensor, ...]:
        """The sums."""
        given = [summands.popleft() for summands in self._ends[self._replica]]
        return tuple(reduce(torch.add, each) for each in zip(*given, strict=True))
