"""Random samples, as a `data.target`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


def samples(shape: Sequence[int], classes: int, tokens: int | None = None,
            every_position: bool = False) -> tuple[TensorDataset, TensorDataset]:
    """(train, test) of two samples each: images, or texts of so many different tokens; a label each or every position.

    Args:
        tokens: None for images.
    """
    train = TensorDataset(batch(shape, tokens), torch.randint(classes, (2, *(shape if every_position else ()))))
    train.classes = range(classes)  # type: ignore[attr-defined]
    return train, train


def batch(shape: Sequence[int], tokens: int | None = None) -> Tensor:
    """Two images, or two texts."""
    return torch.rand(2, *shape) if tokens is None else torch.randint(tokens, (2, *shape))
