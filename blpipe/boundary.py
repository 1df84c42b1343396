"""What passes where one stage ends and the next begins, as heads and losses are built for it."""

from dataclasses import dataclass
from typing import NamedTuple

from blpipe.models.packing import Packing
from blpipe.specs import Shape


class Pixels(NamedTuple):
    """What the model gives for every pixel of a sample: [H, W, channels] if `channels_last`, else [channels, H, W]."""

    channels: int
    size: tuple[int, int]
    channels_last: bool


@dataclass(frozen=True)
class Boundary:
    """What a head or a loss is built for.

    Args:
        shape: of one sample at the boundary, without the batch: [C, H, W], or [H, W, C] if `channels_last`;
            [T, D], or [C, T] if `signal`; or [D].
        classes: number of logits; where the model gives values, its last size.
        later: shapes at the outputs of the blocks that follow, in order; maps always as [C, H, W], and signals as
            tokens [T, C]. None follow on the model's own output, the logits.
        channels_last: whether `shape` is a map with its channels last.
        target_shape: of one sample's logits without their last dimension: () for one label or a row of values, (T,)
            where every position has one, (H, W) where every pixel has.
        index: of the block right before the boundary, from 0.
        labelled: whether targets are labels of classes; if not, they are values.
        signal: whether `shape` is [C, T], channels first, as Conv1d gives them, and not tokens [T, D].
        pixels: what the model gives for each, where this is a map and the model's output is one.
        packing: of the tensors that pass, where they are several; `shape` is that of the main one, which is all that
            heads and losses are given.
    """

    shape: Shape
    classes: int
    later: tuple[Shape, ...] = ()
    channels_last: bool = False
    target_shape: Shape = ()
    index: int = 0
    labelled: bool = True
    signal: bool = False
    pixels: Pixels | None = None
    packing: Packing | None = None

    @property
    def last(self) -> bool:
        """Whether this is the model's own output."""
        return not self.later

    @property
    def is_map(self) -> bool:
        """Whether the shape is that of a map."""
        return len(self.shape) == 3

    @property
    def per_token(self) -> bool:
        """Whether every token, of a signal every moment, has a target."""
        return len(self.shape) == 2 and self.target_shape == tokens_of(self.shape, self.signal)[:1]

    @property
    def features(self) -> int:
        """The channels of a map or a signal, or the size of a token or of flat features."""
        if len(self.shape) not in (1, 2, 3):
            raise ValueError(f"a boundary of shape {list(self.shape)} is no map, tokens or features; "
                             "give a target of your own")
        if self.is_map:
            return channels_first(self.shape, self.channels_last)[0]
        return tokens_of(self.shape, self.signal)[-1]


def channels_first(shape: Shape, channels_last: bool) -> Shape:
    """The shape of a map as [C, H, W]; any other as it is."""
    return (shape[-1], *shape[:-1]) if channels_last else shape


def tokens_of(shape: Shape, signal: bool) -> Shape:
    """The shape of a signal as that of tokens, [T, C]; any other as it is."""
    return shape[::-1] if signal else shape
