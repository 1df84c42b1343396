"""Models that configs of the tests name as `model.target`."""

from torch import nn


def conv_net(in_channels: int = 2, classes: int = 4, dropout: float = 0.2) -> nn.Sequential:
    """Six blocks with BatchNorm and dropout: what must behave the same in every engine."""
    def block(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU(),
                             nn.Dropout(dropout))
    return nn.Sequential(
        block(in_channels, 6), block(6, 6), block(6, 8, 2), block(8, 8), block(8, 8),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)))
