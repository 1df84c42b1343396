"""A small vision transformer as blocks of the user's own."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from blpipe.boundary import Boundary


class Patches(nn.Module):
    """[B, 3, 32, 32] to tokens [B, 64, width] with learned positions."""

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Cut into patches of 4×4."""
        return self.project(x_BCHW).flatten(2).transpose(1, 2) + self.position


class Attention(nn.Module):
    """The first half of a pre-norm encoder layer, tokens [B, T, width] to tokens."""

    def __init__(self, layer: nn.TransformerEncoderLayer):
        super().__init__()
        self.norm, self.attention = layer.norm1, layer.self_attn

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Add what the tokens take from each other."""
        y_BTD = self.norm(x_BTD)
        return x_BTD + self.attention(y_BTD, y_BTD, y_BTD, need_weights=False)[0]


class FeedForward(nn.Module):
    """The second half, tokens [B, T, width] to tokens."""

    def __init__(self, layer: nn.TransformerEncoderLayer):
        super().__init__()
        self.norm, self.up, self.down = layer.norm2, layer.linear1, layer.linear2

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Add what each token gives by itself."""
        return x_BTD + self.down(gelu(self.up(self.norm(x_BTD))))


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
    layers = {f"layer{i}": layer for i, layer in enumerate(_layers(width, depth))}
    return OrderedDict(patches=Patches(width), **layers, classifier=Classifier(width, classes))


def half_layers(width: int = 192, depth: int = 6, classes: int = 10) -> "OrderedDict[str, nn.Module]":
    """The same network, each encoder layer as two blocks, so that a link through the last block is shorter."""
    halves = {f"{kind}{i}": half(layer) for i, layer in enumerate(_layers(width, depth))
              for kind, half in (("attention", Attention), ("feed_forward", FeedForward))}
    return OrderedDict(patches=Patches(width), **halves, classifier=Classifier(width, classes))


def layer_head(boundary: Boundary) -> nn.Module:
    """A head of an encoder layer of its own, and a classifier, for tokens [B, T, width]."""
    width = boundary.shape[-1]
    return nn.Sequential(OrderedDict(layer=_layers(width, 1)[0], classifier=Classifier(width, boundary.classes)))


def _layers(width: int, depth: int) -> list[nn.TransformerEncoderLayer]:
    return [nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
                                       norm_first=True) for _ in range(depth)]
