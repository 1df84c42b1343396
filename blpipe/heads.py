"""Auxiliary heads: from what crosses a stage boundary to logits."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blpipe.config import Named
from blpipe.errors import ConfigError
from blpipe.models.build import out_of_place
from blpipe.plugins import call, resolve
from blpipe.seeds import derive_seed

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Boundary:
    """What a head is built for.

    Args:
        shape: of one sample at the boundary, without the batch: [C, H, W], or [H, W, C] if `channels_last`;
            [T, D] or [D].
        classes: number of logits.
        later: shapes at the outputs of the blocks that follow, in order; maps always as [C, H, W].
        channels_last: whether `shape` is a map with its channels last.
        target_shape: of one sample's targets: () for a class label, (T,) where every position has one.
    """

    shape: Shape
    classes: int
    later: tuple[Shape, ...] = ()
    channels_last: bool = False
    target_shape: Shape = ()


class ChannelsFirst(nn.Module):
    """[B, H, W, C] to [B, C, H, W]."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Permute."""
        return x_BHWC.permute(0, 3, 1, 2)


class PoolToFeatures(nn.Module):
    """[B, C, H, W] or [B, T, D] averaged over positions to [B, C] or [B, D]; [B, D] as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """Average over positions."""
        if x.dim() == 4:
            return x.mean((2, 3))
        return x.mean(1) if x.dim() == 3 else x


def linear(boundary: Boundary) -> nn.Module:
    """Global average pool and one fully connected layer; where every token has a target, no pool."""
    layers = _before_pool(boundary)
    if not _per_token(boundary):
        layers["pool"] = PoolToFeatures()
    layers["fc"] = nn.Linear(_features(boundary), boundary.classes)
    return nn.Sequential(layers)


def conv(boundary: Boundary, hidden: int = 128) -> nn.Module:
    """A 3×3 convolution, BatchNorm, ReLU, global average pool, FC `hidden`, ReLU, FC.

    The convolution takes its channels and stride from what the network does next: twice the channels at
    half the resolution, but no more channels than the network's widest map and no map below 2×2. For
    widths 16-32-64: 16→32 stride 2, 32→64 stride 2, 64→64 stride 1, the head that InfoPro compares
    (arXiv 2101.10832). Tokens and flat features have no map to convolve: FC `hidden`, ReLU, FC, without the
    pool where every token has a target.

    Raises:
        ValueError: `hidden` is below 1.
    """
    if hidden < 1:
        raise ValueError(f"hidden {hidden} must be at least 1")
    layers = _before_pool(boundary)
    features = _features(boundary)
    if len(boundary.shape) == 3:
        channels, height, width = channels_first(boundary.shape, boundary.channels_last)
        widest = max([channels, *(shape[0] for shape in boundary.later if len(shape) == 3)])
        features = min(2 * channels, widest)
        stride = 2 if features > channels and min(height, width) > 2 else 1
        layers["conv"] = convolution = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers["bn"] = nn.BatchNorm2d(features)
        layers["relu"] = nn.ReLU()
    if not _per_token(boundary):
        layers["pool"] = PoolToFeatures()
    layers["fc1"] = nn.Linear(features, hidden)
    layers["relu1"] = nn.ReLU()
    layers["fc2"] = nn.Linear(hidden, boundary.classes)
    return nn.Sequential(layers)


def channels_first(shape: Shape, channels_last: bool) -> Shape:
    """The shape of a map as [C, H, W]; any other as it is."""
    return (shape[-1], *shape[:-1]) if channels_last else shape


def _before_pool(boundary: Boundary) -> "OrderedDict[str, nn.Module]":
    return OrderedDict(permute=ChannelsFirst()) if boundary.channels_last else OrderedDict()


def _per_token(boundary: Boundary) -> bool:
    return len(boundary.shape) == 2 and boundary.target_shape == boundary.shape[:1]


def _features(boundary: Boundary) -> int:
    if len(boundary.shape) not in (1, 2, 3):
        raise ValueError(f"a boundary of shape {list(boundary.shape)} is no map, tokens or features; "
                         "give method.head.target")
    return boundary.shape[0] if len(boundary.shape) == 3 and not boundary.channels_last else boundary.shape[-1]


BUILT_IN = {"linear": linear, "conv": conv}


def build_head(config: Named, boundary: Boundary, seed: int, name: str) -> nn.Module:
    """The head at the boundary after block `name`; a `target` is a function of (boundary, **args).

    Raises:
        ConfigError: unknown name, arguments that do not fit, or a `target` that returns no module.
    """
    builder = resolve("method.head", config, BUILT_IN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "head", name))
        head = call("method.head", builder, boundary, **config.args)
    if not isinstance(head, nn.Module):
        raise ConfigError(f"method.head.target: it returned a {type(head).__name__}; return an nn.Module")
    out_of_place(head)
    return head
