"""How a process computes: its threads, memory, kernels and layout; and how tensors get to a device without a wait."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from blpipe.config import Config

Module = TypeVar("Module", bound=nn.Module)

# Of glibc's malloc.h: how many blocks may have mappings of their own; the free bytes beyond which the heap shrinks.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def transfer(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; to a GPU through pinned memory, so that the host does not wait."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def free_memory(gpu: torch.device) -> int:
    """Bytes that tensors may still take on a GPU, with those that torch's allocator keeps for later."""
    return torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)


def set_up(config: Config) -> None:
    """Set up what all of this process's operations share: CPU threads, memory, precision, determinism, compiler."""
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    if config.runtime.keep_memory:
        keep_freed_memory()
    use_precision(config.train.precision)
    if config.runtime.deterministic:
        use_deterministic_algorithms()
    if config.train.compile:
        use_compiler()


@contextmanager
def settings_put_back() -> Iterator[None]:
    """Put back at the end what `set_up` sets and results depend on: a process may train other configs later."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with _precision_put_back():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)


@contextmanager
def _precision_put_back() -> Iterator[None]:
    """What `use_precision` sets: torch's older settings, and the newer ones of each library that these stand for.

    torch does not tell an older one where the newer ones differ among themselves; it is then put to what one says.
    """
    backends: Any = torch.backends
    newer = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    before = [each.fp32_precision for each in newer]
    precision, tf32 = "high" if before[0] == "tf32" else "highest", before[2] == "tf32"
    with suppress(RuntimeError):
        precision = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        tf32 = backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        backends.cudnn.allow_tf32 = tf32
        for each, value in zip(newer, before, strict=True):
            each.fp32_precision = value


def keep_freed_memory() -> None:
    """Let this process keep the host's memory that it frees, for the tensors of its next step.

    glibc gives large blocks back to the system as they are freed, and gets them again page by page, each cleared. Other
    C libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def use_precision(precision: str) -> None:
    """Whether float32 operations of this process may run as TF32, where a GPU has that: `tf32` alone allows it.

    torch's own default has TF32 off in matrix products, but on in cuDNN's convolutions.
    """
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def use_deterministic_algorithms() -> None:
    """Let torch use deterministic algorithms alone; an operation without one then raises a RuntimeError.

    cuBLAS has to be told before its first call ("Results reproducibility" in its documentation).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def use_compiler() -> None:
    """Set torch.compile up for stages.

    A link backward goes through the graph that the local backward has been through, so that must not give its buffers
    away. All stages share their code, so torch's limit on variants of it is too small; beyond it, nothing is compiled.
    """
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    functorch.donated_buffer = False
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 100_000


def spare_cudnn_norms(module: nn.Module) -> None:
    """Have torch's own kernels run the BatchNorms of `module` where their maps are channels last.

    cuDNN's need all of the GPU at once, and so wait for a receive that runs beside them (github.com/pytorch/pytorch,
    issue 80259); one that was posted ahead may wait for this very stage. Those of contiguous maps do not.
    """
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.forward = partial(_normed, norm)  # type: ignore[method-assign]


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """The backward takes the kernels of the forward."""
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.enabled
    cudnn.enabled = before and not _may_be_channels_last(x)
    try:
        return type(norm).forward(norm, x)
    finally:
        cudnn.enabled = before


def _may_be_channels_last(x: Tensor) -> bool:
    """Whether torch may take maps for channels last, as it also does contiguous ones: of a single pixel, say."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return not x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


def keep_in_place(module: nn.Module) -> None:
    """Have the recurrent layers of `module` leave their weights where they are, as what is recorded is to find them.

    They would move them into one piece of memory whenever these are other tensors than the last time, as a snapshot's
    or an average's are. cuDNN copies what is not in one piece, and torch warns that it does.
    """
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            layer.flatten_parameters = lambda: None  # type: ignore[method-assign]


def use_channels_last(module: Module) -> Module:
    """`module` itself, its tensors of four dimensions laid out channels last, which convolutions then go on with."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return module
