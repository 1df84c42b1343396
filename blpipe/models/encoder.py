"""torch's `nn.TransformerEncoder`, layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_its_layers(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module is an encoder that, so called, does what its layers do one after the other.

    With a mask of the padding it may do more: in evaluation it sets what is padded to 0.
    """
    if type(module) is not nn.TransformerEncoder:
        return False
    padding = kwargs.get("src_key_padding_mask", args[2] if len(args) > 2 else None)
    return padding is None or not module.use_nested_tensor


def layer_by_layer(encoder: nn.Module, src: Any, mask: Any = None, src_key_padding_mask: Any = None,
                   is_causal: bool | None = None) -> Any:
    """The forward of such an encoder. It does not look at a mask's values for the hint that it is causal.

    The mask holds without the hint, which only chooses a kernel: results may round otherwise.
    """
    assert isinstance(encoder, nn.TransformerEncoder)
    for layer in encoder.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
    return src if encoder.norm is None else encoder.norm(src)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """The fast path of such layers, in evaluation, does not run on the meta device."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
