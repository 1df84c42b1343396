"""Mixing of training images with each other: torchvision's MixUp and CutMix."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blpipe.config import AugmentConfig
from blpipe.seeds import derive_seed, seeded


class Mix(NamedTuple):
    """How each image of a step is mixed with the one before it in its microbatch, the first one with the last.

    ratio: the share of an image's own label; the rest is the other's.
    """

    ratio: float
    transform: Any
    drawn: Mapping[str, Any]

    def of(self, x_BCHW: Tensor) -> Tensor:
        """These images of a microbatch, mixed."""
        mixed: Tensor = self.transform.transform(x_BCHW, {**self.drawn, "batch_size": len(x_BCHW), "labels": None})
        return mixed


class Mixing:
    """What is drawn for each step: a function of (seed, step), so that every stage knows it without being told.

    MixUp ("mixup: Beyond Empirical Risk Minimization", arXiv 1710.09412) adds two images up, in shares of a Beta(α, α)
    distribution; CutMix (arXiv 1905.04899) puts a rectangle of one into the other. Where both are on, each step has
    one of them, as likely as the other.

    Args:
        config: `mixup` and `cutmix`, the α of each.
        seed: of the run.
        shape: of an image, [C, H, W].
    """

    def __init__(self, config: AugmentConfig, seed: int, shape: tuple[int, ...]):
        from torchvision.transforms import v2
        ways = (v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)
        self._ways = [way(alpha=alpha) for way, alpha in ways if alpha]
        self._seed, self._image = seed, torch.empty(shape, device="meta")

    def of_step(self, step: int) -> Mix:
        """For a step of the run, from 0: the same for all of its microbatches."""
        with seeded(derive_seed(self._seed, "mix", step)):
            return self._drawn(self._ways[int(torch.randint(len(self._ways), ()))])

    def examples(self) -> list[Mix]:
        """One of each way, in which both images have a part."""
        found = []
        with seeded(0):
            for way in self._ways:
                even = type(way)(alpha=1.0)  # all ratios are as likely
                mix = self._drawn(even)
                while not 0.1 < mix.ratio < 0.9:
                    mix = self._drawn(even)
                found.append(mix)
        return found

    def _drawn(self, way: Any) -> Mix:
        drawn = way.make_params([self._image])
        return Mix(drawn.get("lam_adjusted", drawn.get("lam")), way, drawn)
