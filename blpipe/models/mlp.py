"""A multi-layer perceptron as named blocks."""

from collections import OrderedDict
from collections.abc import Sequence
from math import prod

from torch import nn


def mlp(hidden: Sequence[int] = (128, 128, 128), dropout: float = 0.0, batch_norm: bool = True,
        in_shape: Sequence[int] = (1, 8, 8), classes: int = 10) -> nn.Sequential:
    """Fully connected layers as named blocks: layer1 … layerN and classifier.

    Args:
        hidden: width of each hidden layer.
        dropout: probability of dropping a hidden unit.
        batch_norm: normalise each hidden layer over the batch.
        in_shape: shape of one sample; it is flattened.
        classes: number of classes.

    Raises:
        ValueError: a width below 1.
    """
    if classes < 1:
        raise ValueError(f"classes {classes} must be at least 1")
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden {list(hidden)} must be widths of at least 1")
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    width_in = prod(in_shape)
    for index, width in enumerate(hidden, start=1):
        layers: list[nn.Module] = [nn.Flatten()] if index == 1 else []
        layers.append(nn.Linear(width_in, width))
        if batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        blocks[f"layer{index}"] = nn.Sequential(*layers)
        width_in = width
    flatten: list[nn.Module] = [] if hidden else [nn.Flatten()]
    blocks["classifier"] = nn.Sequential(*flatten, nn.Linear(width_in, classes))
    return nn.Sequential(blocks)
