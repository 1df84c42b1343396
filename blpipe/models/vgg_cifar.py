"""VGG with BatchNorm for small images, after Simonyan & Zisserman (arXiv 1409.1556), table 1."""

from collections import OrderedDict

from torch import nn

_LAYERS = {  # convolutions at each of the five resolutions
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_CHANNELS = (64, 128, 256, 512, 512)


def vgg_cifar(depth: int = 11, width: float = 1.0, hidden: int = 0, dropout: float = 0.0,
              in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """A VGG for images of at least 32×32 as named blocks: conv1_0, conv1_1, … and classifier.

    Args:
        depth: 11, 13, 16 or 19. (The depth counts the paper's three fully connected layers.)
        width: a factor on the channels 64-128-256-512-512.
        hidden: width of two hidden fully connected layers; 0 for a single layer, as is usual for small images.
        dropout: probability of a dropout before each hidden fully connected layer.
        in_channels: channels of the images.
        classes: number of classes.

    Raises:
        ValueError: an unknown `depth`, or `width` leaves no channel.
    """
    if min(in_channels, classes) < 1:
        raise ValueError(f"in_channels {in_channels} and classes {classes} must be at least 1")
    if depth not in _LAYERS:
        raise ValueError(f"depth {depth} is not one of {', '.join(map(str, _LAYERS))}")
    widths = [int(channels * width) for channels in _CHANNELS]
    if min(widths) < 1:
        raise ValueError(f"width {width} leaves {min(widths)} channels; use at least 1/64")
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for level, (layers, level_width) in enumerate(zip(_LAYERS[depth], widths, strict=True), start=1):
        for index in range(layers):
            last = index == layers - 1
            blocks[f"conv{level}_{index}"] = _conv_block(channels, level_width, pool=last)
            channels = level_width
    blocks["classifier"] = _classifier(channels, hidden, dropout, classes)
    return nn.Sequential(blocks)


def _conv_block(channels_in: int, channels: int, pool: bool) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels), relu=nn.ReLU())
    if pool:
        layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)


def _classifier(channels: int, hidden: int, dropout: float, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for width_in in (channels, hidden) if hidden else ():
        layers += [nn.Dropout(dropout), nn.Linear(width_in, hidden), nn.ReLU()]
    layers.append(nn.Linear(hidden or channels, classes))
    return nn.Sequential(*layers)
