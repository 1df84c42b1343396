"""Looking at what a forward does without leaving anything in the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards all modules hold what they held before: the same attributes, parameters and buffers.

    A forward may keep a table that it makes once, and one of a trial has no values, or those of the trial. What it
    writes to tensors that were there stays.
    """
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
