"""Auxiliary heads: from what crosses a stage boundary to logits."""

from collections import OrderedDict
from math import ceil, floor

import torch.nn.functional as F
from torch import Tensor, nn

from blpipe.boundary import Boundary, Pixels, channels_first
from blpipe.config_types import Named
from blpipe.errors import ConfigError
from blpipe.models.build import out_of_place
from blpipe.models.packing import MainPart
from blpipe.plugins import call, resolve
from blpipe.seeds import derive_seed, fixed_randomness
from blpipe.specs import Shape


class ChannelsFirst(nn.Module):
    """[B, H, W, C] to [B, C, H, W]."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Permute."""
        return x_BHWC.permute(0, 3, 1, 2)


class ToTokens(nn.Module):
    """A signal [B, C, T] to [B, T, C], as tokens are."""

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Transpose."""
        return x_BCT.mT


class ToPixels(nn.Module):
    """A map [B, C, h, w], resized bilinearly, as what the model gives for every pixel."""

    def __init__(self, pixels: Pixels):
        super().__init__()
        self.pixels = pixels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """To [B, H, W, C] or [B, C, H, W]."""
        if x_BCHW.shape[2:] != self.pixels.size:
            x_BCHW = F.interpolate(x_BCHW, self.pixels.size, mode="bilinear")
        return x_BCHW.permute(0, 2, 3, 1) if self.pixels.channels_last else x_BCHW


class PoolToFeatures(nn.Module):
    """[B, C, H, W] or [B, T, D] averaged over positions to [B, C] or [B, D]; [B, D] as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """Average over positions."""
        if x.dim() == 4:
            return x.mean((2, 3))
        return x.mean(1) if x.dim() == 3 else x


def linear(boundary: Boundary) -> nn.Module:
    """Global average pool and one fully connected layer; where every token or pixel has a target, no pool."""
    layers = before_pool(boundary)
    _add_classifier(layers, boundary, boundary.features)
    return nn.Sequential(layers)


def conv(boundary: Boundary, hidden: int = 128) -> nn.Module:
    """A 3×3 convolution, BatchNorm, ReLU, global average pool, FC `hidden`, ReLU, FC.

    The convolution takes its channels and stride from what the network does next: twice the channels at
    half the resolution, but no more channels than the network's widest map and no map below 2×2. For
    widths 16-32-64: 16→32 stride 2, 32→64 stride 2, 64→64 stride 1, the head that InfoPro compares
    (arXiv 2101.10832). Tokens and flat features have no map to convolve: FC `hidden`, ReLU, FC, without the
    pool where every token has a target. Where every pixel has one: the convolution keeps channels and
    resolution, nothing is pooled, 1×1 convolutions stand for FC, and what they give is resized bilinearly.

    Raises:
        ValueError: `hidden` is below 1.
    """
    if hidden < 1:
        raise ValueError(f"hidden {hidden} must be at least 1")
    layers = before_pool(boundary)
    features = boundary.features
    if boundary.is_map:
        channels, height, width = channels_first(boundary.shape, boundary.channels_last)
        widest = max([channels, *(shape[0] for shape in boundary.later if len(shape) == 3)])
        features = channels if boundary.pixels else min(2 * channels, widest)
        stride = 2 if features > channels and min(height, width) > 2 else 1
        _add_convolution(layers, "", channels, features, 3, (stride, stride))
    _add_pool(layers, boundary)
    layers["fc1"] = _fully_connected(boundary, features, hidden)
    layers["relu1"] = nn.ReLU()
    _add_outputs(layers, "fc2", boundary, hidden)
    return nn.Sequential(layers)


def mlp_sr(boundary: Boundary, convs: int = 3, layers: int = 3) -> nn.Module:
    """The spatially reduced MLP of "Decoupled Greedy Learning of CNNs" (Belilovsky et al., arXiv 1901.08164).

    Average pool to a quarter of the height and width, rounded up; so many 1×1 convolutions (`convs`) that keep
    the channels C, each with BatchNorm and ReLU; average pool to 2×2 and flatten; so many FC `layers` of width
    4·C, each with BatchNorm and ReLU; FC. Tokens are averaged, and they and flat features go through the FC
    layers alone, of their own width. Where every token has a target, nothing is averaged, and LayerNorm stands
    for BatchNorm. Where every pixel has one, 1×1 convolutions of width C stand for the FC layers, and what they
    give is resized bilinearly.

    Raises:
        ValueError: `convs` or `layers` is below 0.
    """
    for name, number in (("convs", convs), ("layers", layers)):
        if number < 0:
            raise ValueError(f"{name} {number} must be at least 0")
    made = before_pool(boundary)
    features = boundary.features
    if boundary.is_map:
        channels, height, width = channels_first(boundary.shape, boundary.channels_last)
        made["reduce"] = nn.AdaptiveAvgPool2d((ceil(height / 4), ceil(width / 4)))
        for number in range(1, convs + 1 + (layers if boundary.pixels else 0)):
            _add_convolution(made, str(number), channels, channels, 1)
        if boundary.pixels:
            _add_outputs(made, "fc", boundary, channels)
            return nn.Sequential(made)
        made["pool"], made["flatten"] = nn.AdaptiveAvgPool2d(2), nn.Flatten()
        features = 4 * channels
    else:
        _add_pool(made, boundary)
    for number in range(1, layers + 1):
        made[f"fc{number}"] = nn.Linear(features, features)
        made[f"norm{number}"] = nn.LayerNorm(features) if boundary.per_token else nn.BatchNorm1d(features)
        made[f"fc_relu{number}"] = nn.ReLU()
    made["fc"] = nn.Linear(features, boundary.classes)
    return nn.Sequential(made)


def blocks(boundary: Boundary, count: int = 3) -> nn.Module:
    """A few layers of the shapes of later blocks, global average pool, FC: an augmented auxiliary network.

    After "Scaling Supervised Local Learning with Augmented Auxiliary Networks" (AugLocal, Ma et al., arXiv
    2402.17318). The blocks are sampled evenly from the later ones of the boundary's kind, the last of them
    included; of each map the head has a 3×3 convolution to its channels and about its resolution, BatchNorm,
    ReLU. Their number falls linearly with the position in the network, from `count` behind its first block to
    1 before its last: that paper's pyramid. Tokens: LayerNorm, FC, GELU for each; flat features: FC, ReLU.
    Where no block of this kind follows, it is the linear head. Where every pixel has a target, the head goes up
    again to the resolution of larger maps, bilinearly.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count {count} must be at least 1")
    layers = before_pool(boundary)
    features = boundary.features
    sampled = _sampled(boundary, count)
    if boundary.is_map:
        _, height, width = channels_first(boundary.shape, boundary.channels_last)
        for number, (channels, later_height, later_width) in enumerate(sampled, start=1):
            if boundary.pixels and (later_height > height or later_width > width):
                layers[f"up{number}"] = nn.Upsample((later_height, later_width), mode="bilinear")
                height, width = later_height, later_width
            down, across = _ratio(height, later_height), _ratio(width, later_width)
            _add_convolution(layers, str(number), features, channels, 3, (down, across))
            features, height, width = channels, ceil(height / down), ceil(width / across)
    else:
        tokens = len(boundary.shape) == 2
        for number, later in enumerate(sampled, start=1):
            if tokens:
                layers[f"norm{number}"] = nn.LayerNorm(features)
            layers[f"fc{number}"] = nn.Linear(features, later[-1])
            layers[f"gelu{number}" if tokens else f"relu{number}"] = nn.GELU() if tokens else nn.ReLU()
            features = later[-1]
    _add_classifier(layers, boundary, features)
    return nn.Sequential(layers)


def _ratio(size: int, later: int) -> int:
    """The stride from one resolution to another, as near as whole numbers are."""
    return max(1, floor(size / later + 0.5))


def _sampled(boundary: Boundary, count: int) -> list[Shape]:
    """The later shapes that the head `blocks` repeats, in order."""
    logits = (*boundary.target_shape, boundary.classes)
    if boundary.pixels:
        logits = (boundary.pixels.channels, *boundary.pixels.size)
    hidden = boundary.later[:-1] if boundary.later[-1:] == (logits,) else boundary.later
    alike = [shape for shape in hidden if len(shape) == len(boundary.shape)]
    last_index = boundary.index + len(boundary.later) - 1  # of the last boundary that has a head
    share = boundary.index / last_index if last_index > 0 else 0.0
    number = min(floor(count - (count - 1) * share + 0.5), len(alike))
    return [alike[ceil((i + 1) * len(alike) / number) - 1] for i in range(number)]


def before_pool(boundary: Boundary) -> "OrderedDict[str, nn.Module]":
    """The first layers of whatever reads the boundary: a map gets its channels first, and a signal becomes tokens."""
    if boundary.signal:
        return OrderedDict(transpose=ToTokens())
    return OrderedDict(permute=ChannelsFirst()) if boundary.channels_last else OrderedDict()


def _add_convolution(layers: "OrderedDict[str, nn.Module]", number: str, channels_in: int, channels: int, size: int,
                     stride: tuple[int, int] = (1, 1)) -> None:
    layers[f"conv{number}"] = convolution = nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    layers[f"bn{number}"] = nn.BatchNorm2d(channels)
    layers[f"relu{number}"] = nn.ReLU()


def _add_classifier(layers: "OrderedDict[str, nn.Module]", boundary: Boundary, features: int) -> None:
    _add_pool(layers, boundary)
    _add_outputs(layers, "fc", boundary, features)


def _add_pool(layers: "OrderedDict[str, nn.Module]", boundary: Boundary) -> None:
    if not (boundary.per_token or boundary.pixels):
        layers["pool"] = PoolToFeatures()


def _fully_connected(boundary: Boundary, features: int, made: int) -> nn.Module:
    return nn.Conv2d(features, made, 1) if boundary.pixels else nn.Linear(features, made)


def _add_outputs(layers: "OrderedDict[str, nn.Module]", name: str, boundary: Boundary, features: int) -> None:
    if boundary.pixels:
        layers[name] = _fully_connected(boundary, features, boundary.pixels.channels)
        layers["pixels"] = ToPixels(boundary.pixels)
    else:
        layers[name] = _fully_connected(boundary, features, boundary.classes)


BUILT_IN = {"linear": linear, "conv": conv, "mlp_sr": mlp_sr, "blocks": blocks}


def build_head(config: Named, boundary: Boundary, seed: int, name: str, key: str = "method.head") -> nn.Module:
    """The head at the boundary after block `name`; a `target` is a function of (boundary, **args).

    Args:
        key: of the head in the config, for messages.

    Raises:
        ConfigError: unknown name, arguments that do not fit, or a `target` that returns no module.
    """
    builder = resolve(key, config, BUILT_IN)
    with fixed_randomness(derive_seed(seed, "head", name)):
        head = call(key, builder, boundary, **config.args)
    if not isinstance(head, nn.Module):
        raise ConfigError(f"{key}: it returned a {type(head).__name__}; return an nn.Module")
    out_of_place(head)
    if boundary.packing:
        return nn.Sequential(OrderedDict(main=MainPart(boundary.packing), head=head))
    return head
