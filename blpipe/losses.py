"""Local losses: functions of (logits, targets) to a scalar, the mean over the batch."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from blpipe.config import Named
from blpipe.errors import ConfigError
from blpipe.plugins import call, resolve

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Cross-entropy, averaged over the batch and any positions: logits [B, …, classes], targets int64 [B, …].

    Raises:
        ValueError: `label_smoothing` outside 0…1.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {label_smoothing} must be from 0 to 1")
    return partial(_cross_entropy, label_smoothing=label_smoothing)


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)


BUILT_IN = {"cross_entropy": cross_entropy}


def build_loss(config: Named) -> Loss:
    """The loss that the config names; a `target` is a function of `args` that returns the loss function.

    Raises:
        ConfigError: unknown name, arguments that do not fit, or a `target` that returns no function.
    """
    loss = call("method.loss", resolve("method.loss", config, BUILT_IN), **config.args)
    if not callable(loss):
        raise ConfigError(f"method.loss.target: it returned a {type(loss).__name__}; "
                          "return a function of (logits, targets)")
    return loss


class Tally:
    """Sums over an epoch, kept on the device so that counting never waits for it."""

    def __init__(self) -> None:
        self._loss: Tensor | float = 0.0
        self._correct: Tensor | int = 0
        self._samples = 0
        self._targets = 0

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count a microbatch: its mean loss, and the targets [B, …] with the largest of the logits [B, …, classes]."""
        self._loss = self._loss + loss.detach().double() * len(targets)
        self._correct = self._correct + (logits.detach().argmax(-1) == targets).sum()
        self._samples += len(targets)
        self._targets += targets.numel()

    @property
    def loss(self) -> float | None:
        """Mean loss over the samples counted; None if there were none."""
        return float(self._loss) / self._samples if self._samples else None

    @property
    def accuracy(self) -> float | None:
        """Share of the targets that were the most likely class, 0…1; None if there were none."""
        return int(self._correct) / self._targets if self._targets else None
