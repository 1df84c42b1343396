"""BackLink in one stage: what a stage computes, whoever its neighbours are and wherever they run.

    gradient of θ_k  =  α · ∂L_k/∂θ_k  +  λ · Σ_j (∂x_k/∂θ_k)ᵀ e_k^j

x_k is the stage's output, L_k the local loss of its own head. e_k^1 = ∂L_{k+1}/∂x_k is the error that the
backward link brings: the next stage's own local error at their boundary. The link runs through the stage's
last blocks only, its tail, and never becomes part of the error that this stage sends for its own loss.
BackLink is α = 1 and j = 1; λ = 0 is greedy local training.

A joint backward takes α · ∂L_k/∂x_k + λ · e_k^1 through the tail at once, when the error is there: the same
gradient, as both are linear. Where the error is late, so is the tail's local gradient.

With a reach r above 1, a stage also passes on what it receives: e_{k-1}^{j+1} = (∂x_k/∂x_{k-1})ᵀ e_k^j is
the error of the stage j stages on, one stage further back, and j runs from 1 to r. It is never scaled, and
never mixed with another one.

After "BackLink: Supervised Local Training with Backward Links" (arXiv 2205.07141), of which only the
abstract could be read: the formula for α = 1, r = 1 is our reading of it; α and r are ours.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blpipe.config_types import WirePrecision
from blpipe.gradients import edge_of, gradients_of, norm_of, ratio, weighted
from blpipe.graphs import Recorder, Runner
from blpipe.links import Links
from blpipe.precision import Precision, narrowed, widened
from blpipe.recompute import Recomputed
from blpipe.seeds import RandomStream
from blpipe.tail import Tail, TailRun
from blpipe.tally import Tally, main_targets, mixed_loss
from blpipe.update import Update

Held = tuple[int, int, int]
"""Step, microbatch and hop of a link whose gradients are held."""


@dataclass
class InFlight:
    """One microbatch between its forward and its local backward."""

    x: Tensor    # input, a leaf
    h: Tensor    # output of the body
    out: Tensor  # x_k, the output of the tail; the same as h without a tail
    tail_run: TailRun | None
    runner: Runner


class Stage:
    """Blocks, a head, a local loss and an optimizer. Tensors are [microbatch, …] on the stage's device.

    A microbatch goes through `forward`, `local_backward` and, for each hop, `link_backward` once that error is there,
    each hop in the order of the forwards; `step` ends a batch.

    Args:
        blocks: the stage's part of the model.
        head: from the stage's output to logits; `nn.Identity()` for the last stage, None for a stage that has
            no local loss (`bp`, or α = 0 where no stage before wants it).
        loss: of (logits, targets, x_k); not called where there is no head.
        update: of the weights of all three, at the end of a batch.
        links: which errors come and go, and how they train the stage.
        stream: this stage's random numbers.
        precision: how blocks and head are run.
        wire: the precision of activations under way, in training.
        recompute: whether a block stores only its input, and reruns its forward during its backward.
        compile: whether torch.compile compiles blocks and head, for training.
        recorder: of what is computed on each microbatch; None to run everything as it is.
    """

    def __init__(self, blocks: nn.Sequential, head: nn.Module | None, loss: nn.Module, update: Update, links: Links,
                 stream: RandomStream, *, precision: Precision | None = None, wire: WirePrecision = "full",
                 recompute: bool = False, compile: bool = False, recorder: Recorder | None = None):
        self.blocks, self.head, self.loss, self.update, self.links = blocks, head, loss, update, links
        self.stream, self.precision, self.wire = stream, precision or Precision(), wire
        compiled: Callable[[Any], Any] = _compiled if compile else lambda part: part
        called: Callable[[nn.Sequential], nn.Sequential] = Recomputed if recompute else lambda part: part
        self.body = blocks[:len(blocks) - links.tail]
        self.tail = Tail(blocks[len(blocks) - links.tail:], links, stream, self.precision, recompute, compiled)
        self.run_blocks, self._run_body = compiled(called(blocks)), compiled(called(self.body))
        self._run_head: Any = compiled(head) if head is not None else None
        self._recorder = recorder or Recorder()
        loss_and_head = [loss, *([] if head is None else [head])]
        self._head_live = [*dict.fromkeys(p for part in loss_and_head for p in part.parameters() if p.requires_grad)]
        self._body_live = [p for p in self.body.parameters() if p.requires_grad]
        self._sums = update.sums
        self._flight: InFlight | None = None
        self.held: dict[Held, dict[str, Tensor]] = {}
        self.tally = Tally()
        self._built = update.buffers()
        update.begin(self.tally)

    @property
    def parts(self) -> Sequence[nn.Module]:
        """All that has parameters and buffers, as its update has them: blocks, loss, and head where there is one."""
        return self.update.parts

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks on one microbatch; returns x_k, detached, as it goes to the next stage."""
        assert self._flight is None, "a forward before the local backward of the last one"
        runner = self._recorder.begin(x)
        with self.stream:
            x, h = runner.run("body", partial(self._run_body_from, runner), x)
            run, out = self.tail.forward(h, runner) if self.links.hops_in else (None, h)
        self._flight = InFlight(x, h, out, run, runner)
        return narrowed(out.detach(), self.wire)

    def local_backward(self, targets: Tensor, share: float, mix_ratio: float | None = None) -> Tensor | None:
        """Backpropagate the local loss L_k through head, tail and body; the blocks take α of their gradient.

        With a joint backward the tail takes it in `link_backward`; here the error only passes through the tail.

        Args:
            targets: [microbatch, …], int64 labels or float32 values.
            share: this microbatch's share of the batch: the loss is a mean over the batch.
            mix_ratio: the share of each image's own label in its loss; see `mixed_loss`.

        Returns:
            The error for the stage before, ∂L_k/∂x_{k-1}; None if it wants none.
        """
        assert self._flight is not None
        flight, self._flight = self._flight, None
        trained, sends = self._body_live if self.links.local_weight else [], 1 in self.links.hops_out
        wanted = sends or self.links.local_weight != 0.0 or self.links.normalize
        error = self._head_backward(flight, targets, share, mix_ratio, wanted) if self.head is not None else None
        if flight.tail_run is not None:
            error = self._local_backward_of_tail(flight.tail_run, error, bool(trained) or sends)
        if error is not None:
            backward = partial(gradients_of, edge_of(flight.h), trained, flight.x if sends else None, error)
            gradients, error = flight.runner.run("local backward of the body", backward)
            self._sums.add(trained, weighted(gradients, self.links.local_weight), flight.runner.repeats)
        if flight.tail_run is None:
            self._recorder.end(flight.runner)
        return self._sent(error, flight.x, flight.runner) if sends else None

    def link_backward(self, error: Tensor, hop: int = 1, factor: float = 1.0,
                      held_as: tuple[int, int] | None = None) -> Tensor | None:
        """Backpropagate the error of the loss `hop` stages on through the oldest microbatch that awaits it.

        Args:
            factor: on λ.
            held_as: the step and microbatch under which the gradients are held, in place of being added.

        Returns:
            The error for the stage before, e_{k-1}^{hop+1}; None if it wants none.
        """
        run, later = self.tail.oldest(hop)
        if not later:
            self._recorder.end(run.runner)
        weight: float | Tensor = self.links.weight * factor
        takes = (self.links.weight != 0.0 or self.links.joint) and (self.links.take == "every" or not later)
        trains = takes and (bool(weight) or self.links.joint)
        passes = hop + 1 in self.links.hops_out
        recorded = takes and run.runner.repeats  # even where λ is 0 for now: with the rest of its microbatch, or never
        if not trains and not passes and not recorded:
            return None
        if self.links.joint:
            error, weight = self._joined(run, error, weight), 1.0
        gradients, error_before = self.tail.link_backward(run, error, hop, trains or recorded, passes, later)
        if run.local_norm is not None and trains:
            weight = weight * ratio(run.local_norm, norm_of(gradients))
        summands = weighted(gradients if trains else (), weight)
        if held_as is not None:
            self._hold((*held_as, hop), summands, run.runner)
        else:
            self._sums.add(self.tail.live.values() if trains else (), summands, run.runner.repeats)
        return self._sent(error_before, run.h, run.runner) if passes else None

    def add_held(self, held_as: tuple[int, int], hop: int) -> None:
        """Add the gradients of a link that were held, now that their step has come."""
        gradients = self.held.pop((*held_as, hop), {})
        self._sums.add(self.tail.live.values(), [gradients.get(name) for name in self.tail.live])

    def to_reduce(self) -> list[Tensor]:
        """See `Update.to_reduce`."""
        return self.update.to_reduce(self.tally)

    def step(self, index: int, lr_factor: float) -> None:
        """End step `index` of the run: update the weights, with `lr_factor` on the configured learning rate."""
        self.update.step(index, lr_factor, self.tally)
        self.tail.stepped()

    def _hold(self, key: Held, gradients: Iterable[Tensor | None], runner: Runner) -> None:
        """Keep the gradients of the tail until their step; none where the link trains nothing."""
        self.held[key] = {name: gradient.clone() if runner.repeats else gradient
                          for name, gradient in zip(self.tail.live, gradients, strict=False) if gradient is not None}

    @torch.no_grad()
    def evaluate(self, x: Tensor, targets: Tensor) -> Tensor:
        """Run blocks and head in evaluation mode and count; returns x_k for the next stage."""
        averaged = self.update.averaged
        with self.stream:
            out = self.precision.run(averaged(self.blocks), x)
            if self.head is not None:
                logits = self.precision.run(averaged(self.head), out)
                self.tally.add(averaged(self.loss)(logits, targets, out), logits, targets)
        return out

    def train(self, mode: bool, tally: Tally | None = None) -> None:
        """Switch blocks, head and loss between training and evaluation, and go on with `tally`, or a new one."""
        self.blocks.train(mode)
        self.loss.train(mode)
        if self.head is not None:
            self.head.train(mode)
        self.tally = tally or Tally()
        self.update.begin(self.tally)

    def _run_body_from(self, runner: Runner, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's input as a leaf, and the output of the body."""
        buffers = self.update.buffers() if runner.repeats else self._built
        if any(now is not before for now, before in zip(buffers, self._built, strict=True)):
            raise ValueError("a module replaces a buffer; have it change its values in place")
        x = widened(x.detach(), self.wire).requires_grad_(bool(self.links.hops_out))
        return x, self.precision.run(self._run_body, x)

    def _head_backward(self, flight: InFlight, targets: Tensor, share: float, mix_ratio: float | None,
                       wanted: bool) -> Tensor | None:
        """Returns ∂L_k/∂x_k if wanted; nothing else of the head's graph is held while the blocks' backward runs."""
        backward = partial(self._head_gradients, flight.out, wanted)
        with self.stream:
            numbers = (share,) if mix_ratio is None else (share, mix_ratio)
            loss, logits, gradients, error = flight.runner.run("head", backward, targets, *numbers)
        self.tally.add(loss, logits, main_targets(targets, mix_ratio))
        self._sums.add(self._head_live, gradients, flight.runner.repeats)
        return error

    def _head_gradients(self, out: Tensor, wanted: bool, targets: Tensor, share: Tensor | float,
                        mix_ratio: Tensor | float | None = None,
                        ) -> tuple[Tensor, Tensor, Sequence[Tensor | None], Tensor | None]:
        """The local loss, the logits, the gradients of head and loss, and ∂L_k/∂x_k if wanted."""
        cut = out.detach().requires_grad_(wanted and out.requires_grad)
        logits = self.precision.run(self._run_head, cut)
        loss = mixed_loss(self.loss, logits, targets, cut, mix_ratio)
        gradients, error = gradients_of(edge_of(loss * share), self._head_live, cut, None)
        if wanted and error is None:  # a head may ignore its input
            error = torch.zeros_like(cut)
        return loss.detach(), logits.detach(), gradients, error

    def _local_backward_of_tail(self, run: TailRun, error: Tensor | None, into_body: bool) -> Tensor | None:
        """Returns ∂L_k/∂h, or None if nothing before the tail wants it."""
        alpha = self.links.local_weight
        if self.links.joint:
            run.local_error, alpha = error, 0.0
        gradients, error = self.tail.local_backward(run, error, bool(alpha) or self.links.normalize, into_body)
        if self.links.normalize:
            run.local_norm = norm_of(gradients)
        if alpha:
            self._sums.add(self.tail.live.values(), weighted(gradients, alpha), run.runner.repeats)
        return error

    def _joined(self, run: TailRun, error: Tensor, weight: float | Tensor) -> Tensor:
        """α · ∂L_k/∂x_k + λ · e_k, which one backward takes through the tail."""
        assert run.local_error is not None
        error = error.to(run.local_error.dtype)
        local, linked = *weighted([run.local_error], self.links.local_weight), *weighted([error], weight)
        run.local_error = None  # not held during that backward
        assert local is not None and linked is not None
        return local + linked if weight else local  # an error that weighs nothing may be infinite

    def _sent(self, error: Tensor | None, x: Tensor, runner: Runner) -> Tensor:
        """An error as it goes to the stage before, where it may wait longer than a runner keeps it."""
        error = torch.zeros_like(x) if error is None else error
        sent = narrowed(error, self.links.wire)
        return sent.clone() if sent is error and runner.repeats else sent


def _compiled(part: Any) -> Any:
    """Compiled, unless it computes nothing: what torch then learns of its code holds for all parts that share that."""
    empty = isinstance(part, nn.Module) and all(type(each) in (nn.Identity, nn.Sequential) for each in part.modules())
    return part if empty else torch.compile(part, dynamic=False)
