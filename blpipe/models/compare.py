"""Whether the blocks of a model compute what it computes, seen on two samples."""

from contextlib import suppress
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blpipe.errors import ConfigError
from blpipe.seeds import fixed_randomness
from blpipe.specs import DataSpec


def check_same(model: nn.Module, blocks: nn.Sequential, data: DataSpec) -> None:
    """Run both on two random samples, in evaluation and in training; buffers are as before then.

    A model that cannot be copied, or cannot take them, is not compared; nor in training one of several outputs, of
    which the blocks make one: others may draw random numbers, and change buffers.

    Args:
        model: whose own modules the blocks have.

    Raises:
        ConfigError: outputs or buffers differ.
    """
    for training in (False, True):
        kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
        same = True
        with suppress(Exception):  # whatever a model of the user's does; the shapes that are traced later will tell
            same = _computes_the_same(deepcopy(model).train(training), model, blocks.train(training), data)
        blocks.train()
        for buffer, value in kept:
            buffer.data.copy_(value)
        if not same:
            raise ConfigError(
                f"model: in {'training' if training else 'evaluation'} its blocks compute something else than it does. "
                "Tracing sees neither hooks nor a train() of the model's own, nor what its forward does in Python (a "
                "counter in an attribute, NumPy's random numbers, a write to part of a tensor); put that into a small "
                "module of its own, or return the blocks yourself, as an nn.Sequential, a list or a dict")


def _computes_the_same(plain: nn.Module, model: nn.Module, blocks: nn.Sequential, data: DataSpec) -> bool:
    outputs = [each for each in tree_leaves(_parts(_run(plain, data))) if isinstance(each, Tensor)]
    if plain.training and len(outputs) > 1:
        return True
    made = _run(blocks, data)
    return any(_close(each, made) for each in outputs) and all(map(_close, plain.buffers(), model.buffers()))


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
