"""Models that configs of the tests name as `model.target`."""

import os
import signal
import time
from typing import Any

import torch
from torch import Tensor, nn


def conv_net(in_channels: int = 2, classes: int = 4, dropout: float = 0.2) -> nn.Sequential:
    """Six blocks with BatchNorm and dropout: what must behave the same in every engine."""
    def block(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU(),
                             nn.Dropout(dropout))
    return nn.Sequential(
        block(in_channels, 6), block(6, 6), block(6, 8, 2), block(8, 8), block(8, 8),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)))


def volumes_net() -> nn.Sequential:
    """Its boundaries have three dimensions beside the channels: no built-in head fits."""
    return nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 4, 1), nn.Conv3d(4, 4, 1), nn.Flatten(),
                         nn.Linear(4 * 2 * 8 * 8, 4))


def wider_net() -> nn.Sequential:
    """`conv_net` for weights of another shape."""
    net = conv_net()
    net[0][0] = nn.Conv2d(2, 6, 5, 1, 2)
    return net


class Fails(nn.Module):
    """Passes its input on, and raises at the given real forward."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.forwards = at, 0

    def forward(self, x: Tensor) -> Tensor:
        """Identity, until it fails."""
        if x.device != torch.device("meta"):
            self.forwards += 1
            if self.forwards == self.at:
                raise RuntimeError("out of luck")
        return x


def failing_net(at: int = 3, in_channels: int = 2) -> dict[str, nn.Module]:
    """`conv_net` whose third block fails."""
    blocks = {f"block{i}": block for i, block in enumerate(conv_net(in_channels))}
    blocks["block2"] = nn.Sequential(blocks["block2"], Fails(at))
    return blocks


class Waits(nn.Module):
    """Passes its input on, and looks at a value of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Identity."""
        if x.device != torch.device("meta"):
            x.flatten()[0].item()
        return x


def waiting_net(in_channels: int = 2) -> nn.Sequential:
    """`conv_net` whose third block waits for the device."""
    net = conv_net(in_channels)
    net[2] = nn.Sequential(net[2], Waits())
    return net


class Stalls(nn.Module):
    """Passes its input on; in training, the forward with this number, from 0, does not end."""

    def __init__(self, at: int):
        super().__init__()
        self.left = at

    def forward(self, x: Tensor) -> Tensor:
        """Identity."""
        if self.training and x.device != torch.device("meta"):
            self.left -= 1
            if self.left < 0:
                print("stalled", flush=True)
                time.sleep(600)
        return x


def stalling_net(at: int = 3) -> list[nn.Module]:
    """`conv_net` which stalls in its first block."""
    return [Stalls(at), *conv_net()]


class Averages(nn.Module):
    """Subtracts a running mean, a buffer that every forward in training replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """The difference."""
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


def averaging_net() -> dict[str, nn.Module]:
    """`conv_net` whose third block averages."""
    blocks = {f"block{i}": block for i, block in enumerate(conv_net())}
    blocks["block2"] = nn.Sequential(blocks["block2"], Averages())
    return blocks


class Explodes(nn.Module):
    """Passes its input on, but for NaN at the given real forward in training."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.forwards = at, 0

    def forward(self, x: Tensor) -> Tensor:
        """Identity, but once."""
        if self.training and type(x) is Tensor and x.device.type != "meta":
            self.forwards += 1
            if self.forwards == self.at:
                return x * torch.nan
        return x


def exploding_net(at: int) -> dict[str, nn.Module]:
    """`conv_net` whose third block explodes."""
    blocks = {f"block{i}": block for i, block in enumerate(conv_net())}
    blocks["block2"] = nn.Sequential(Explodes(at), blocks["block2"])
    return blocks


class Mortal(nn.Module):
    """Passes its input on, and kills its process at a given forward.

    Args:
        deaths: for each time that torchrun has started the processes again, at which; 0: not this block, this time.
        by: the signal's name.
    """

    def __init__(self, deaths: list[int], by: str):
        super().__init__()
        self.signal = signal.Signals[by]
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.left = deaths[restarts] if restarts < len(deaths) else 0

    def forward(self, x: Tensor) -> Tensor:
        """Identity, while it lives."""
        if x.device != torch.device("meta"):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signal)
        return x


def mortal_net(first: list[int], last: list[int], by: str = "SIGKILL") -> dict[str, nn.Module]:
    """`conv_net` whose first and last blocks are mortal."""
    blocks = {f"block{i}": block for i, block in enumerate(conv_net())}
    return {"first": nn.Sequential(blocks.pop("block0"), Mortal(first, by)), **blocks,
            "last": Mortal(last, by)}


class Tied(nn.Module):
    """A linear layer with another one's weight."""

    def __init__(self, other: nn.Linear):
        super().__init__()
        self.weight = other.weight

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] to [B, D]."""
        return nn.functional.linear(x, self.weight)


def tied_net() -> dict[str, nn.Module]:
    """Blocks of which the second and the fourth share a weight."""
    second = nn.Linear(16, 16)
    return {"a": nn.Sequential(nn.Flatten(), nn.Linear(128, 16)), "b": second, "c": nn.ReLU(), "d": Tied(second),
            "e": nn.Linear(16, 16), "f": nn.Linear(16, 4)}


def maps_then_features(in_channels: int = 2, classes: int = 4) -> list[nn.Module]:
    """Two blocks of maps, one of features, and the classifier."""
    return [nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(4, classes)]


def maps_head(boundary: Any) -> nn.Module:
    """A head that takes maps [B, C, H, W] alone."""
    return nn.Sequential(nn.Conv2d(boundary.shape[0], boundary.classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def pixels_net(in_channels: int = 3, classes: int = 4) -> list[nn.Module]:
    """BatchNorm of maps of a single pixel, as in squeeze-and-excitation."""
    def block(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    return [nn.Sequential(block(in_channels), nn.AdaptiveAvgPool2d(1), block(8)), block(8), block(8),
            nn.Sequential(block(8), nn.Flatten(), nn.Linear(8, classes))]


class Recurrent(nn.Module):
    """A GRU over the rows of its input."""

    def __init__(self, taken: int, given: int):
        super().__init__()
        self.layer = nn.GRU(taken, given)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, taken] to [B, T, given]."""
        return self.layer(x.transpose(0, 1))[0].transpose(0, 1)


def recurrent_net(classes: int = 4) -> list[nn.Module]:
    """Blocks whose weights a GPU's libraries want in one piece."""
    return [nn.Sequential(nn.Flatten(1, 2), Recurrent(8, 8)), Recurrent(8, 8), Recurrent(8, 8),
            nn.Sequential(nn.Flatten(), nn.Linear(128, classes))]


class Quantised(nn.Module):
    """Whole numbers 0 … 15, one for each value."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, …] to int64 [B, D]."""
        return (8 * x.flatten(1)).long().clamp(0, 15)


class MeanEmbedding(nn.Module):
    """The mean of the embeddings of whole numbers."""

    def __init__(self, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(16, dim)

    def forward(self, x: Tensor) -> Tensor:
        """int64 [B, D] to [B, dim]."""
        return self.embedding(x).mean(1)


def quantised_net(classes: int = 4) -> list[nn.Module]:
    """A block that gives whole numbers, and blocks that take them."""
    return [Quantised(), MeanEmbedding(8), nn.Linear(8, classes)]


class TwiceTheSame(nn.Module):
    """A plain model in which one layer is there twice, so that two of its blocks share it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(128, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, …] to logits [B, 4]."""
        x = self.first(x.flatten(1)).relu()
        return self.last(self.again(self.again(x).relu()).relu())


class Counts(nn.Flatten):
    """A module whose state_dict holds more than tensors."""

    def get_extra_state(self) -> Any:
        """What its state_dict has beside tensors."""
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        """Takes it back."""


def counting_net() -> list[nn.Module]:
    """Blocks of which the first counts."""
    return [Counts(), nn.Linear(128, 8), nn.Linear(8, 4)]


def sparse_net() -> list[nn.Module]:
    """A block whose gradients are sparse."""
    blocks = quantised_net()
    blocks[1].embedding = nn.Embedding(16, 8, sparse=True)
    return blocks


def data_of_this_rank() -> tuple[Any, Any]:
    """More training samples in each process than in the one before."""
    samples = 32 + _rank()
    return tuple((torch.zeros(count, 2, 8, 8), torch.arange(count) % 4) for count in (samples, 8))


class Experts(nn.Module):
    """Runs one of two layers at random, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, 12] to [B, 12]."""
        chosen = int(torch.randint(0, 3, ())) if x.device.type == "cpu" else 0
        return x + self.layers[chosen](x) if chosen < 2 else x


class CountsRuns(nn.Module):
    """Scales by how often it has run, a whole number, and holds buffers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("constant", torch.ones(1).expand(12), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 12] to [B, 12]."""
        if self.training:
            self.runs += 1
            self.seen[:] = self.runs % 2 == 1
        return x * (1 + 0.1 * (self.runs % 3)) * self.constant


def unlike_net() -> list[nn.Module]:
    """Blocks whose replicas differ in which parameters they use, how often they run, and in several processes in
    what they begin with.
    """
    first = nn.Sequential(nn.Flatten(), nn.Linear(128, 12))
    nn.init.constant_(first[1].bias, float(torch.rand((), generator=torch.Generator().manual_seed(_rank()))))
    return [first, Experts(), CountsRuns(), nn.Linear(12, 12), nn.Linear(12, 4)]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
