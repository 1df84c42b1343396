"""What a message looks like: a fixed list of tensors, in one flat buffer where it goes from process to process.

Both ends derive the same layouts before the first message; nothing is described on the wire. A queue may lay its maps
[B, C, H, W] out channels last, as a model may be. A tensor comes out with the same strides whatever queue it went
through, so that kernels take the same path in every engine.
"""

from collections.abc import Iterable
from itertools import accumulate
from math import prod

from torch import Tensor

from blpipe.specs import TensorSpec

Layout = tuple[TensorSpec, ...]
IN_FLIGHT = 2  # messages of a queue under way, before its sender waits for one to arrive
_ALIGNMENT = 64  # bytes, as of torch's own allocations


def layout_of(tensors: Iterable[Tensor]) -> Layout:
    """The layout of a message of these tensors."""
    return tuple(TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def message_bytes(layout: Layout) -> int:
    """Size of a message's buffer."""
    return _offsets(layout)[-1]


def views(buffer: Tensor, layout: Layout, channels_last: bool = False) -> tuple[Tensor, ...]:
    """The tensors of a message, as views of its uint8 buffer."""
    return tuple(_shaped(buffer[start:start + prod(spec.shape) * spec.dtype.itemsize].view(spec.dtype), spec.shape,
                         channels_last)
                 for start, spec in zip(_offsets(layout), layout, strict=False))


def as_sent(tensor: Tensor, channels_last: bool = False) -> Tensor:
    """`tensor` as it comes out of a message; a copy only where it is laid out otherwise."""
    if channels_last and tensor.dim() == 4:
        return _shaped(tensor.permute(0, 2, 3, 1).contiguous().view(-1), tensor.shape, channels_last)
    return tensor.contiguous().view(-1).view(tensor.shape)  # so, axes of length 1 get their strides too


def _shaped(flat: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    if channels_last and len(shape) == 4:
        B, C, H, W = shape
        return flat.view(B, H, W, C).permute(0, 3, 1, 2)
    return flat.view(shape)


def _offsets(layout: Layout) -> list[int]:
    """Where each tensor begins, and the end of the last one."""
    sizes = (prod(shape) * dtype.itemsize for shape, dtype in layout)
    return list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
