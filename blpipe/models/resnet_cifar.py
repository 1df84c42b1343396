"""Residual networks for small images: "Deep Residual Learning" (He et al., arXiv 1512.03385), §4.2."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters ("option A": subsample, pad with zero channels)."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, channels, H/stride, W/stride]."""
        out = F.relu(self.bn1(self.conv1(x_BCHW)))
        out = self.bn2(self.conv2(out))
        shortcut = x_BCHW[:, :, ::self.stride, ::self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(out + shortcut)


def resnet_cifar(depth: int = 20, width: float = 1.0, in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """A ResNet for images of about 32×32 as named blocks: stem, layer1_0 … layer3_{n-1}, classifier.

    Args:
        depth: 6n + 2 layers: 8, 14, 20, 32, 44, 56, 110, …
        width: a factor on the channels, 16 in the stem and layer 1, 32 in layer 2, 64 in layer 3.
        in_channels: channels of the images.
        classes: number of classes.

    Raises:
        ValueError: `depth` is not 6n + 2, or `width` leaves no channel.
    """
    if min(in_channels, classes) < 1:
        raise ValueError(f"in_channels {in_channels} and classes {classes} must be at least 1")
    if depth < 8 or (depth - 2) % 6:
        nearest = 6 * max(1, round((depth - 2) / 6)) + 2
        raise ValueError(f"depth {depth} is not 6n + 2; the nearest is {nearest}")
    widths = [int(channels * width) for channels in (16, 32, 64)]
    if min(widths) < 1:
        raise ValueError(f"width {width} leaves {min(widths)} channels; use at least 1/16")
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    blocks["stem"] = nn.Sequential(OrderedDict(
        conv=nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False), bn=nn.BatchNorm2d(widths[0]), relu=nn.ReLU()))
    channels = widths[0]
    for layer, layer_width in enumerate(widths, start=1):
        for index in range((depth - 2) // 6):
            stride = 2 if layer > 1 and index == 0 else 1
            blocks[f"layer{layer}_{index}"] = ResidualBlock(channels, layer_width, stride)
            channels = layer_width
    blocks["classifier"] = nn.Sequential(OrderedDict(
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, classes)))
    for module in blocks.values():
        module.apply(_initialise)
    return nn.Sequential(blocks)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
