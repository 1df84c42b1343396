"""What the replicas of a stage add up, each in its own process, over torch.distributed's all-reduce."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from blpipe.transport.queues import lost_peer


@dataclass
class Packed:
    """Tensors in as few flat ones as they have types.

    Args:
        members: of each flat one, which of the tensors it holds.
    """

    shapes: list[torch.Size]
    members: list[list[int]]
    flats: list[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Packed":
        """Copies of these."""
        by_dtype: dict[torch.dtype, list[int]] = {}
        for number, tensor in enumerate(tensors):
            by_dtype.setdefault(tensor.dtype, []).append(number)
        members = list(by_dtype.values())
        return cls([tensor.shape for tensor in tensors], members,
                   [torch.cat([tensors[number].flatten() for number in alike]) for alike in members])

    def tensors(self) -> tuple[Tensor, ...]:
        """Views of the flat ones, in the order of the tensors."""
        found: dict[int, Tensor] = {}
        for flat, alike in zip(self.flats, self.members, strict=True):
            found.update(zip(alike, flat.split([self.shapes[number].numel() for number in alike]), strict=True))
        return tuple(found[number].view(shape) for number, shape in enumerate(self.shapes))


class SumQueue:
    """This process's end; see `program.Sum`. What is put is copied, so that it may be written to at once.

    Args:
        group: of the processes that add up.
        name: of the stage, for messages.
        device: where the tensors live; `via` is where they are sent from (CPU for gloo).
    """

    def __init__(self, group: dist.ProcessGroup, name: str, device: torch.device, via: torch.device):
        self._group, self._name, self._device, self._via = group, name, device, via
        self._pending: tuple[Packed, list[dist.Work]] | None = None
        self.wait_seconds = 0.0
        self.sent_bytes = 0

    def put(self, *tensors: Tensor) -> None:
        """Begin to add up; all replicas put tensors of the same shapes and types, and `get` before the next ones."""
        assert self._pending is None
        packed, works, size = Packed.of(tensors), [], dist.get_world_size(self._group)
        packed.flats = [flat.to(self._via) for flat in packed.flats]
        for flat in packed.flats:
            with lost_peer(self._name):
                work = dist.all_reduce(flat, group=self._group, async_op=True)
            assert work is not None
            works.append(work)
            self.sent_bytes += 2 * flat.nbytes * (size - 1) // size  # by a ring
        self._pending = packed, works

    def has_message(self) -> bool:
        """Always: `get` waits."""
        return True

    def get(self) -> tuple[Tensor, ...]:
        """The sums, in the order in which their summands were put."""
        assert self._pending is not None
        (packed, works), self._pending = self._pending, None
        started = perf_counter()
        with lost_peer(self._name):
            for work in works:
                work.wait()
        self.wait_seconds += perf_counter() - started
        packed.flats = [flat.to(self._device) for flat in packed.flats]
        return packed.tensors()
