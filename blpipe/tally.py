"""What a stage counts of an epoch: losses, also of mixed images, and how many targets were met."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blpipe.specs import IGNORED


def mixed_loss(loss: Callable[..., Tensor], logits: Tensor, targets: Tensor, x: Tensor,
               mix_ratio: Tensor | float | None) -> Tensor:
    """The loss of images that are mixed with the one before each: of their own labels and the other's, in shares.

    It is linear in the targets where `loss` is, as cross-entropy is: then it is that of mixed labels.

    Args:
        mix_ratio: the share of their own; None where they are not mixed.
    """
    value: Tensor = loss(logits, targets, x)
    if mix_ratio is None:
        return value
    other = loss(logits, targets.roll(1, 0), x)
    share = mix_ratio.to(value.dtype) if isinstance(mix_ratio, Tensor) else mix_ratio
    return other + (value - other) * share


def main_targets(targets: Tensor, mix_ratio: float | None) -> Tensor:
    """The label of each image that has the larger share in it; see `mixed_loss`."""
    return targets if mix_ratio is None or mix_ratio >= 0.5 else targets.roll(1, 0)


class Tally:
    """Sums over an epoch, kept on the device so that counting never waits for it.

    `loss_sum` is the sum of the losses of all samples, a new float64 scalar with every microbatch.
    """

    def __init__(self) -> None:
        self.loss_sum: Tensor | float = 0.0
        self._correct: Tensor | int = 0
        self._samples = 0
        self._targets: Tensor | int = 0
        self.skipped: list[int] = []  # steps of the run

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count a microbatch: its mean loss, and the targets [B, …] with the largest of the logits [B, …, classes].

        Of targets [B, T], those that are `IGNORED` are not counted. Of values, the loss alone is.
        """
        before = self.loss_sum
        if not isinstance(before, Tensor):
            before = loss.new_full((), before, dtype=torch.double)
        self.loss_sum = torch.add(before, loss.detach(), alpha=len(targets))
        self._samples += len(targets)
        if targets.is_floating_point():
            return
        self._correct = self._correct + (logits.detach().argmax(-1) == targets).sum()
        self._targets = self._targets + (targets.numel() if targets.dim() == 1 else (targets != IGNORED).sum())

    def is_finite(self) -> bool:
        """Whether every loss counted was; waits for the device."""
        return math.isfinite(self.loss_sum)

    def take_back(self, before: "Tally") -> None:
        """Restore the sums of `before`, a copy of this tally."""
        self.loss_sum, self._correct = before.loss_sum, before._correct
        self._samples, self._targets = before._samples, before._targets

    def state(self) -> list[float]:
        """The sums, as numbers; waits for the device."""
        return [float(self.loss_sum), float(self._correct), self._samples, float(self._targets), *self.skipped]

    @classmethod
    def of(cls, state: Sequence[float]) -> "Tally":
        """A tally that goes on from the sums of `state`."""
        tally = cls()
        tally.loss_sum, tally._correct = state[0], int(state[1])
        tally._samples, tally._targets, *tally.skipped = map(int, state[2:])
        return tally

    @classmethod
    def of_all(cls, states: Sequence[Sequence[float]]) -> "Tally":
        """The sums of all replicas of a stage, from the `state` of each; they have skipped the same steps."""
        return cls.of([*map(sum, zip(*(state[:4] for state in states), strict=True)), *states[0][4:]])

    @property
    def loss(self) -> float | None:
        """Mean loss over the samples counted; None if there were none."""
        return float(self.loss_sum) / self._samples if self._samples else None

    @property
    def accuracy(self) -> float | None:
        """Share of the targets that were the most likely class, 0…1; None if there were none."""
        return int(self._correct) / int(self._targets) if self._targets else None
