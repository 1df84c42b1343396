"""Counting tensor memory, of real tensors and of fake ones, which allocate and compute nothing."""

import copy
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


class Ledger(TorchDispatchMode):
    """While active, follows the bytes of every tensor storage that an operation returns, until it is freed.

    `live` and `peak` are bytes; `traffic` is the bytes that all operations read and wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.traffic = 0
        self._storages: set[int] = set()

    def count(self, tensor: Tensor) -> None:
        """Follow a tensor that was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size

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
    return copy.deepcopy(module, memo)
