"""Whether the blocks of a model compute what it computes, seen on two samples."""

from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blpipe.data import DataSpec
from blpipe.errors import ConfigError
from blpipe.seeds import fixed_randomness


def check_same(model: nn.Module, blocks: nn.Sequential, data: DataSpec) -> None:
    """Run both on two random samples, in training and in evaluation; buffers are as before then.

    A model that cannot take them is left to who traces the shapes.

    Args:
        model: whose own modules the blocks have.

    Raises:
        ConfigError: outputs or buffers differ.
    """
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for training in (True, False):
        plain = deepcopy(model)
        plain.train(training)
        blocks.train(training)
        try:
            given, made = _run(plain, data), _run(blocks, data)
        except Exception:
            continue
        finally:
            blocks.train()
        outputs = list(map(tree_leaves, map(_parts, (given, made))))
        same = any(_close(each, outputs[1][0]) for each in outputs[0]) \
            and all(map(_close, plain.buffers(), model.buffers()))
        for buffer, value in kept:
            buffer.data.copy_(value)
        if not same:
            raise ConfigError(
                f"model: in {'training' if training else 'evaluation'} its blocks compute something else than it does. "
                "Tracing sees neither hooks nor a train() of the model's own, nor what its forward does in Python (a "
                "counter in an attribute, NumPy's random numbers, a write to part of a tensor); put that into a small "
                "module of its own, or return the blocks yourself, as an nn.Sequential, a list or a dict")


@torch.no_grad()
def _run(module: nn.Module, data: DataSpec) -> Any:
    with fixed_randomness(0):
        shape = (2, *data.shape)
        x = torch.randint(2, shape) if data.dtype == "int64" else torch.randn(shape)
        return module(x)


def _parts(output: Any) -> Any:
    return [getattr(output, field.name) for field in fields(output)] if is_dataclass(output) else output


def _close(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.shape != other.shape:
        return False
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
