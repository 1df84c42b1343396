"""The end of a batch in one stage: from the gradients of its parameters to new weights, alike in all replicas."""

from collections.abc import Callable, Sequence
from copy import copy
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from blpipe.ema import Average
from blpipe.gradients import GradientSums, norm_of, weighted
from blpipe.tally import Tally


class Update:
    """Holds a stage's optimizer, the averages of its weights, and the state before a step that may be skipped.

    Args:
        parts: all that has parameters and buffers.
        optimizer: over their parameters; None if they have none.
        clip_norm: what the gradients' norm is scaled down to where it is larger; None to leave it.
        skip_nonfinite: whether a step whose loss or gradients are not finite leaves everything as it was before; this
            waits for the device in every step.
        leads: whether it is the one that other replicas of the stage take their buffers from.
        ema: the decay of the moving averages of weights, with which the stage is evaluated; None for none.
    """

    def __init__(self, parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None, *,
                 clip_norm: float | None = None, skip_nonfinite: bool = False, leads: bool = True,
                 ema: float | None = None):
        self.parts, self.optimizer, self._clip_norm = parts, optimizer, clip_norm
        self._skip_nonfinite, self._leads = skip_nonfinite, leads
        self._base_lrs = [group["lr"] for group in optimizer.param_groups] if optimizer else []
        self.sums = GradientSums()
        self.averages = {part: Average(part, ema) for part in parts} if ema is not None else {}
        self._losses_of_all: Sequence[Tensor] = ()  # summed over replicas
        self._before: tuple[list[Tensor], Tally] | None = None  # the buffers and the tally before a step

    def begin(self, tally: Tally) -> None:
        """A step begins: what it changes may have to be undone."""
        if self._skip_nonfinite:
            self._before = [buffer.clone() for buffer in self.buffers()], copy(tally)

    def lead(self) -> list[Tensor]:
        """What replicas of the stage add up before they begin: all values, from the one that leads."""
        return self._led(self._values())

    def follow(self, sums: Sequence[Tensor]) -> None:
        """Begin with the values of the one that leads."""
        self._take(self._values(), sums)
        self.restart_averages()

    def restart_averages(self) -> None:
        """Have them begin with the weights as they are now."""
        for average in self.averages.values():
            average.restart()

    def averaged(self, part: nn.Module) -> Callable[..., Any]:
        """A part as it is evaluated: with the averages of its weights, where there are any."""
        return self.averages.get(part, part)

    def to_reduce(self, tally: Tally) -> list[Tensor]:
        """What the replicas of the stage add up before a step: losses, which parameters have gradients, these, and
        buffers, from the one that leads, as in torch's DistributedDataParallel.
        """
        losses, trained = tally.loss_sum, self._trained()
        # For whether a step is skipped, which all must agree on.
        self._losses_of_all = [losses.float()] if self._skip_nonfinite and isinstance(losses, Tensor) else []
        given = [torch.ones(len(trained), device=trained[0].device)] if trained else []
        for index, parameter in enumerate(trained):
            if parameter.grad is None:  # a block may not use all of its parameters every time
                given[0][index] = 0.0
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in trained)
        return [*self._losses_of_all, *given, *gradients, *self._led(self.buffers())]

    def take_reduced(self, sums: Sequence[Tensor]) -> None:
        """Go on with the sums of what all replicas gave: then they step alike."""
        rest, trained = iter(sums), self._trained()
        self._losses_of_all = [next(rest) for _ in self._losses_of_all]
        givers = [next(rest)] if trained else []
        gradients = [next(rest) for _ in trained]
        if any(parameter.grad is None for parameter in trained):
            chosen = [index for index, count in enumerate(givers[0].tolist()) if count]  # this waits for the device
            trained, gradients = [trained[index] for index in chosen], [gradients[index] for index in chosen]
        for parameter in trained:
            parameter.grad = None
        self.sums.clear()
        self.sums.add(trained, gradients)
        self._take(self.buffers(), list(rest))

    def step(self, index: int, lr_factor: float, tally: Tally) -> None:
        """End step `index` of the run: update the weights, with `lr_factor` on the configured learning rate."""
        if self._before is not None and not self._is_finite(tally):
            self._undo(index, tally, *self._before)
        else:
            if self.optimizer is not None:
                self._optimize(self.optimizer, lr_factor)
            for average in self.averages.values():
                average.advance()
        for parameter in self._trained():
            parameter.grad = None
        self.sums.clear()
        self.begin(tally)

    def buffers(self) -> list[Tensor]:
        """Of all parts."""
        return [buffer for part in self.parts for buffer in part.buffers()]

    def _optimize(self, optimizer: torch.optim.Optimizer, lr_factor: float) -> None:
        for group, lr in zip(optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * lr_factor
        if self._clip_norm is not None:
            self._clip(self._clip_norm)
        optimizer.step()

    def _clip(self, largest: float) -> None:
        """Scale the gradients down to this norm, all together; not in place, as autograd may share what it gave."""
        trained = [parameter for parameter in self._trained() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in trained]
        share = (largest / norm_of(gradients)).clamp(max=1.0)
        for parameter, gradient in zip(trained, weighted(gradients, share), strict=True):
            parameter.grad = gradient

    def _is_finite(self, tally: Tally) -> bool:
        """Whether the losses and gradients of this step are."""
        losses = tally.is_finite() and all(map(isfinite, self._losses_of_all))
        return losses and bool(norm_of(parameter.grad for parameter in self._trained()).isfinite())

    def _undo(self, index: int, tally: Tally, buffers: list[Tensor], before: Tally) -> None:
        for buffer, value in zip(self.buffers(), buffers, strict=True):
            _set(buffer, value)
        tally.take_back(before)
        tally.skipped.append(index)

    def _led(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Their bytes, or zeros where another replica leads, so that sums are what leads, bit for bit."""
        given = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors if _is_writable(tensor)]
        return given if self._leads else [torch.zeros_like(each) for each in given]

    def _take(self, tensors: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """The inverse of `_led`."""
        if not self._leads:
            for tensor, each in zip(filter(_is_writable, tensors), given, strict=True):
                _set(tensor, each.clone().view(tensor.dtype).view(tensor.shape))  # a clone, as types need alignment

    def _values(self) -> list[Tensor]:
        return [*(p for part in self.parts for p in part.parameters()), *self.buffers()]

    def _trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]] if self.optimizer else []


def _is_writable(tensor: Tensor) -> bool:
    """False for an expanded view, whose elements share memory."""
    return all(stride or size == 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _set(tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value)  # of .data, as the graphs of late links would take it for a change of theirs
