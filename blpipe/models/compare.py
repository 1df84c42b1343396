"""Whether the blocks of a model compute what it computes, seen on two samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blpipe.errors import ConfigError, one_line
from blpipe.models.unchanged import unchanged
from blpipe.seeds import fixed_randomness
from blpipe.specs import DataSpec


def check_same(model: nn.Module, blocks: nn.Sequential, data: DataSpec) -> list[str]:
    """Run both on two random samples, in evaluation and in training; buffers are as before then.

    A model that cannot take them is not compared; nor in training one of several outputs, of which the blocks make
    one: others may draw random numbers, and change buffers.

    Args:
        model: whose own modules the blocks have.

    Returns:
        A note, if they could not be compared.

    Raises:
        ConfigError: outputs or buffers differ.
    """
    notes = []
    for training in (False, True):
        same, mode = True, "training" if training else "evaluation"
        with kept_buffers(model):
            try:
                same = _computes_the_same(model, blocks, training, data)
            except Exception as error:  # whatever a user's model does; the shapes that are traced later may tell
                notes.append(f"model: its blocks are not compared with it in {mode}: "
                             f"{type(error).__name__}: {one_line(error)}")
            blocks.train()
        if not same:
            raise ConfigError(
                f"model: in {mode} its blocks compute something else than it does. "
                "Tracing sees neither a train() of the model's own nor what its forward does in Python (NumPy's random "
                "numbers, a write to part of a tensor); put that into a small module of its own, or return the blocks "
                "yourself, as an nn.Sequential, a list or a dict")
    return notes[:1]


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards all modules hold what they held before, and buffers the values that they had."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with unchanged(model):
            yield
    finally:
        for buffer, value in kept:
            buffer.data.copy_(value)


def _computes_the_same(model: nn.Module, blocks: nn.Sequential, training: bool, data: DataSpec) -> bool:
    with kept_buffers(model):
        plain = _copy_of(model).train(training)
        outputs = [each for each in tree_leaves(_parts(_run(plain, data))) if isinstance(each, Tensor)]
        buffers = [buffer.clone() for buffer in plain.buffers()]
    if training and len(outputs) > 1:
        return True
    made = _run(blocks.train(training), data)
    return any(_close(each, made) for each in outputs) and all(map(_close, buffers, model.buffers()))


def _copy_of(model: nn.Module) -> nn.Module:
    """So that what a forward leaves in attributes is not left in the model, unless that cannot be copied."""
    try:
        return deepcopy(model)
    except Exception:  # such as a lock, or a tensor that was computed
        return model


@torch.no_grad()
def _run(module: nn.Module, data: DataSpec) -> Any:
    with fixed_randomness(0):
        shape = (2, *data.shape)
        return module(torch.randint(2, shape) if data.dtype == "int64" else torch.randn(shape))


def _parts(output: Any) -> Any:
    return [getattr(output, field.name) for field in fields(output)] if is_dataclass(output) else output


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = (torch.view_as_real(each) if each.is_complex() else each for each in (one, other))
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
