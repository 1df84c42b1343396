"""A small vision transformer as blocks of the user's own."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Patches(nn.Module):
    """[B, 3, 32, 32] to tokens [B, 64, width] with learned positions."""

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Cut into patches of 4×4."""
        return self.project(x_BCHW).flatten(2).transpose(1, 2) + self.position


class Classifier(nn.Module):
    """Tokens [B, T, width] to logits [B, classes]."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise, average over tokens, classify."""
        return self.fc(self.norm(x_BTD).mean(1))


def blocks(width: int = 192, depth: int = 6, classes: int = 10) -> "OrderedDict[str, nn.Module]":
    """Patches, `depth` pre-norm encoder layers, a classifier."""
    layers = {f"layer{i}": nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, activation="gelu",
                                                      batch_first=True, norm_first=True) for i in range(depth)}
    return OrderedDict(patches=Patches(width), **layers, classifier=Classifier(width, classes))
