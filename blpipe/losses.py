"""Local losses: from (logits, targets), and a stage's output too, to a scalar, the mean over the batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blpipe.boundary import Boundary
from blpipe.config_types import Named
from blpipe.errors import ConfigError
from blpipe.heads import PoolToFeatures, before_pool
from blpipe.models.build import out_of_place
from blpipe.models.packing import MainPart, Packing
from blpipe.plugins import call, resolve, takes
from blpipe.seeds import derive_seed, fixed_randomness
from blpipe.specs import IGNORED


class LocalLoss(nn.Module):
    """A loss function as a module, which every stage calls with (logits, targets, x).

    Args:
        function: of (logits, targets), or also of the stage's output x [B, …] if `takes_x`.
    """

    def __init__(self, function: Callable[..., Tensor], takes_x: bool):
        super().__init__()
        # A lambda, which copies of this module share with whatever the user's function holds.
        self.function = function if isinstance(function, nn.Module) else lambda *given: function(*given)
        self.takes_x = takes_x

    def forward(self, logits: Tensor, targets: Tensor, x: Tensor) -> Tensor:
        """The loss."""
        return self.function(logits, targets, x) if self.takes_x else self.function(logits, targets)


class OfMainPart(nn.Module):
    """A loss that is given the main part of a stage's packed output."""

    def __init__(self, loss: nn.Module, packing: Packing):
        super().__init__()
        self.loss, self.main = loss, MainPart(packing)

    def forward(self, logits: Tensor, targets: Tensor, packed: Tensor) -> Tensor:
        """The loss."""
        value: Tensor = self.loss(logits, targets, self.main(packed))
        return value


class CrossEntropy(nn.Module):
    """See `cross_entropy`; what else it is given, it ignores."""

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor, x: Tensor | None = None) -> Tensor:
        """Logits [B, …, classes], targets int64 [B, …] or float32 [B, …, classes]."""
        if targets.is_floating_point():
            if targets.shape != logits.shape:
                raise ValueError("of values, it takes the probabilities of all classes; make labels integers, or use "
                                 "mse or bce")
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten(0, -2), label_smoothing=self.label_smoothing)
        loss = partial(F.cross_entropy, logits.flatten(0, -2), targets.flatten(), label_smoothing=self.label_smoothing)
        if targets.dim() == 1:
            return loss()
        kept = (targets != IGNORED).sum().clamp(min=1)  # where none is, the loss is 0, and torch's mean is not
        return loss(reduction="sum") / kept


def cross_entropy(label_smoothing: float = 0.0) -> nn.Module:
    """Cross-entropy, averaged over the batch and any positions: logits [B, …, classes], targets int64 [B, …].

    Positions whose target is `IGNORED` are left out. Targets float32 [B, …, classes] are probabilities.

    Raises:
        ValueError: `label_smoothing` outside 0…1.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {label_smoothing} must be from 0 to 1")
    return CrossEntropy(label_smoothing)


def mse() -> Callable[[Tensor, Tensor], Tensor]:
    """Mean squared error, over the batch and all that the model gives for a sample: targets float32, as many values."""
    return lambda outputs, targets: F.mse_loss(outputs, _values(targets, outputs))


def bce() -> Callable[[Tensor, Tensor], Tensor]:
    """Binary cross-entropy of logits, averaged likewise: targets float32, as many, each from 0 to 1."""
    return lambda logits, targets: F.binary_cross_entropy_with_logits(logits, _values(targets, logits))


def _values(targets: Tensor, outputs: Tensor) -> Tensor:
    """The targets, laid out as the outputs are."""
    if not targets.is_floating_point():
        raise ValueError("it takes values, and these are labels; make them floats, or use cross_entropy")
    if targets.numel() != outputs.numel():
        raise ValueError("it takes as many targets as the model gives values; make them alike")
    return targets.reshape(outputs.shape)


class PredSim(nn.Module):
    """See `pred_sim`."""

    def __init__(self, boundary: Boundary, beta: float):
        super().__init__()
        self.beta, self.cross_entropy = beta, CrossEntropy()
        layers, size = before_pool(boundary), boundary.features
        if boundary.is_map:
            layers["conv"] = nn.Conv2d(size, size, 3, 1, 1, bias=False)
        else:
            layers["pool"], layers["fc"] = PoolToFeatures(), nn.Linear(size, size, bias=False)
        self.projection = nn.Sequential(layers)

    def forward(self, logits: Tensor, targets: Tensor, x: Tensor) -> Tensor:
        """Logits [B, classes], targets int64 [B], x [B, …]."""
        similarity = _similarity(_spread(self.projection(x)))
        # Of one-hot rows, less their mean: 1 within a class, −1 / (classes − 1) between two.
        between = -1.0 / max(logits.shape[1] - 1, 1)
        wanted = torch.where(targets[:, None] == targets, 1.0, between).to(similarity)
        return (1 - self.beta) * self.cross_entropy(logits, targets) + self.beta * F.mse_loss(similarity, wanted)


def pred_sim(boundary: Boundary, beta: float = 0.99) -> nn.Module:
    """Prediction and similarity matching: (1 − β) · cross-entropy + β · mean (S(z) − S(one-hot targets))².

    "Training Neural Networks with Local Error Signals" (Nøkland, Eidnes, arXiv 1901.06656). S is the matrix
    [B, B] of cosine similarities between the samples of a microbatch, each less its mean. z is a 3×3
    convolution of the stage's output, reduced to the standard deviation of each feature map (not so below 4
    channels, or of a single position); of tokens, averaged, and of flat features an FC layer. At the model's
    own output it is the cross-entropy.

    Raises:
        ValueError: `beta` outside 0…1, or targets that are not one label a sample.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta {beta} must be from 0 to 1")
    _need_a_label_a_sample("pred_sim", boundary)
    return CrossEntropy() if boundary.last else PredSim(boundary, beta)


class SupCon(nn.Module):
    """See `supcon`."""

    def __init__(self, boundary: Boundary, temperature: float, weight: float):
        super().__init__()
        self.temperature, self.weight, self.cross_entropy = temperature, weight, CrossEntropy()
        layers, size = before_pool(boundary), boundary.features
        layers["pool"] = PoolToFeatures()
        layers["fc1"], layers["relu"], layers["fc2"] = nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 128)
        self.projection = nn.Sequential(layers)

    def forward(self, logits: Tensor, targets: Tensor, x: Tensor) -> Tensor:
        """Logits [B, classes], targets int64 [B], x [B, …]."""
        z = F.normalize(self.projection(x), dim=1)
        return self.weight * _contrast(z @ z.T / self.temperature, targets) + self.cross_entropy(logits, targets)


def supcon(boundary: Boundary, temperature: float = 0.1, weight: float = 1.0) -> nn.Module:
    """Supervised contrast, and cross-entropy: `weight` · L_out(z, targets) + cross-entropy.

    "Supervised Contrastive Learning" (Khosla et al., arXiv 2004.11362), which InfoPro uses as a local loss
    (arXiv 2101.10832). z is the stage's output, averaged over positions, through FC, ReLU and FC 128, of length
    1. A sample whose class no other one of the microbatch has contributes nothing. At the model's own output it
    is the cross-entropy.

    Raises:
        ValueError: `temperature` is not above 0, `weight` below 0, or targets that are not one label a sample.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature {temperature} must be above 0")
    if not weight >= 0.0:
        raise ValueError(f"weight {weight} must be at least 0")
    _need_a_label_a_sample("supcon", boundary)
    return CrossEntropy() if boundary.last else SupCon(boundary, temperature, weight)


def _need_a_label_a_sample(name: str, boundary: Boundary) -> None:
    if not boundary.labelled:
        raise ValueError(f"{name} needs labels, and the targets are values; use mse or bce")
    if boundary.target_shape != ():
        raise ValueError(f"{name} needs one label a sample, and targets of shape {list(boundary.target_shape)} are "
                         "more; use cross_entropy")


def _spread(z: Tensor) -> Tensor:
    """Maps [B, C, H, W] as the standard deviation of each [B, C]; what has too few of them as it is, flat."""
    if z.dim() == 4 and z.shape[1] > 3 and z.shape[2] * z.shape[3] > 1:
        return z.flatten(2).std(2)
    return z.flatten(1)


def _similarity(z: Tensor) -> Tensor:
    """Cosine similarities [B, B] of the rows of z [B, D], each less its mean."""
    z = F.normalize(z - z.mean(1, keepdim=True), dim=1)
    return z @ z.T


def _contrast(similarity: Tensor, targets: Tensor) -> Tensor:
    """The mean over the batch of L_out, from similarities [B, B] divided by the temperature."""
    itself = torch.eye(len(targets), dtype=torch.bool, device=targets.device)
    others = similarity.masked_fill(itself, torch.finfo(similarity.dtype).min)  # finite: one sample has no others
    log_share = similarity - others.logsumexp(1, keepdim=True)
    positive = (targets[:, None] == targets) & ~itself
    return -(torch.where(positive, log_share, 0.0).sum(1) / positive.sum(1).clamp(min=1)).mean()


BUILT_IN: dict[str, Callable[..., Any]] = {"cross_entropy": cross_entropy, "mse": mse, "bce": bce,
                                           "pred_sim": pred_sim, "supcon": supcon}


def build_loss(config: Named, boundary: Boundary, seed: int, name: str, key: str = "method.loss") -> nn.Module:
    """The loss at the boundary after block `name`, as a module that is called with (logits, targets, x).

    A `target` is a function of `args` that returns a function of (logits, targets). If it takes `boundary` too,
    what it returns is called with the stage's output as well.

    Args:
        key: of the loss in the config, for messages.

    Raises:
        ConfigError: unknown name, arguments that do not fit, or a `target` that returns no function.
    """
    builder = resolve(key, config, BUILT_IN)
    takes_x = takes(builder, "boundary")
    with fixed_randomness(derive_seed(seed, "loss", name)):
        loss = call(key, partial(builder, boundary=boundary) if takes_x else builder, **config.args)
    if not callable(loss):
        raise ConfigError(f"{key}: it returned a {type(loss).__name__}; "
                          f"return a function of (logits, targets{', x' if takes_x else ''})")
    if not (takes_x and isinstance(loss, nn.Module)):
        loss = LocalLoss(loss, takes_x)
    out_of_place(loss)
    return OfMainPart(loss, boundary.packing) if takes_x and boundary.packing else loss
