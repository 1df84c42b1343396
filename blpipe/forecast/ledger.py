"""Counting tensor memory, of real tensors and of fake ones, which allocate and compute nothing."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blpipe.models.copies import computed

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Pool:
    """Memory that is kept for what is allocated in it, as a CUDA graph's: bytes in use, and bytes that it has."""

    live: int = 0
    size: int = 0


class Ledger(TorchDispatchMode):
    """While active, follows the bytes of every tensor storage that an operation returns, until it is freed.

    `live` and `peak` are bytes; `traffic` is the bytes that all operations read and wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.traffic = 0
        self._storages: set[int] = set()
        self._pool: Pool | None = None

    @contextmanager
    def into(self, pool: Pool) -> Iterator[None]:
        """What is allocated here comes from this pool, which keeps what is freed of it."""
        before, self._pool = self._pool, pool
        try:
            yield
        finally:
            self._pool = before

    def count(self, tensor: Tensor) -> None:
        """Follow a tensor that was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages.add(key)
            self._take(storage.nbytes(), self._pool)
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, storage.nbytes(), self._pool)

    def _take(self, size: int, pool: Pool | None) -> None:
        if pool is None:
            self.live += size
            return
        pool.live += size
        self.live += max(0, pool.live - pool.size)
        pool.size = max(pool.live, pool.size)

    def _freed(self, key: int, size: int, pool: Pool | None) -> None:
        self._storages.discard(key)
        if pool is None:
            self.live -= size
        else:
            pool.live -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self.count(tensor)
        if not function.is_view:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.traffic += sum(tensor.nbytes for tensor in read + tensors)
        return returned


def without_values(module: Module, device: torch.device) -> Module:
    """A copy of `module` on `device`, made of fake tensors; to be called and used under one `FakeTensorMode`."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device=device)
    for tensor in computed([module]):  # not to be looked at more closely: it has a graph
        memo[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return deepcopy(module, memo)
