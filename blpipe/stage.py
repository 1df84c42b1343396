"""BackLink in one stage: what a stage computes, whoever its neighbours are and wherever they run.

    gradient of θ_k  =  ∂L_k/∂θ_k  +  λ · (∂x_k/∂θ_k)ᵀ e_k        e_k = ∂L_{k+1}/∂x_k

x_k is the stage's output, L_k the local loss of its own head, and e_k the error that the backward link
brings: the next stage's own local error at their boundary. The link runs through the stage's last blocks
only, its tail, and never becomes part of the error that this stage sends. λ = 0 is greedy local training.

After "BackLink: Supervised Local Training with Backward Links" (arXiv 2205.07141), of which only the
abstract could be read: the formula is our reading of it.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from blpipe.config import LinkConfig
from blpipe.losses import Tally
from blpipe.seeds import RandomStream


@dataclass
class TailRun:
    """A forward of the tail, kept until its link backward."""

    parameters: dict[str, Tensor]  # the live ones, or the snapshot that it ran with
    h: Tensor                      # its input, a leaf: the body's graph ends before it
    out: Tensor | None             # its output with its graph; None once that is given up for recomputing
    random_state: list[Tensor]     # for recomputing: where the random stream stood
    buffers: dict[str, Tensor]     # for recomputing: the tail's buffers as they were


@dataclass
class InFlight:
    """One microbatch between its forward and its local backward."""

    x: Tensor    # input, a leaf
    h: Tensor    # output of the body
    out: Tensor  # x_k, the output of the tail; the same as h without a tail
    tail_run: TailRun | None


class Stage:
    """Blocks, a head, a local loss and an optimizer. Tensors are [microbatch, …] on the stage's device.

    A microbatch goes through `forward`, `local_backward` and, where a link arrives, `link_backward` once
    its error is there, in the order of the forwards; `step` ends a batch. A link that arrives after a step
    needs the weights of its own forward: with `link.delay` ≥ 1 the tail runs on a snapshot of its
    parameters, made once a step, and the gradients are added to the live ones.

    Args:
        blocks: the stage's part of the model.
        head: from the stage's output to logits; `nn.Identity()` for the last stage, None for a stage that has
            no local loss (`bp`).
        loss: of (logits, targets, x_k); not called where there is no head.
        tail: how many of the last blocks the link runs through; 0 where none arrives.
        link: its weight λ and delay, and whether to keep the tail's graph or to recompute it.
        sends_error: whether the stage before wants this one's error.
        optimizer: over the parameters of blocks, head and loss; None if they have none.
        stream: this stage's random numbers.
    """

    def __init__(self, blocks: nn.Sequential, head: nn.Module | None, loss: nn.Module, *, tail: int, link: LinkConfig,
                 sends_error: bool, optimizer: torch.optim.Optimizer | None, stream: RandomStream):
        self.blocks, self.head, self.loss = blocks, head, loss
        self.body, self.tail = blocks[:len(blocks) - tail], blocks[len(blocks) - tail:]
        self.link, self.sends_error = link, sends_error
        self.optimizer, self.stream = optimizer, stream
        self.base_lrs = [group["lr"] for group in optimizer.param_groups] if optimizer else []
        self._tail_live: dict[str, Tensor] = {
            name: p for name, p in self.tail.named_parameters() if p.requires_grad}
        self._snapshot: dict[str, Tensor] | None = None
        self._flight: InFlight | None = None
        self._awaiting_error: deque[TailRun] = deque()
        self.tally = Tally()

    @property
    def linked(self) -> bool:
        """Whether a backward link arrives here."""
        return len(self.tail) > 0

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks on one microbatch; returns x_k, detached, for the next stage."""
        assert self._flight is None, "a forward before the local backward of the last one"
        x = x.detach().requires_grad_(self.sends_error)
        with self.stream:
            h = out = self.body(x)
            run = None
            if self.linked:
                run = self._run_tail(h)
                assert run.out is not None
                out = run.out
        self._flight = InFlight(x, h, out, run)
        return out.detach()

    def local_backward(self, targets: Tensor, share: float) -> Tensor | None:
        """Backpropagate the local loss L_k through head, tail and body.

        Args:
            targets: int64 [microbatch, …].
            share: this microbatch's share of the batch: the loss is a mean over the batch.

        Returns:
            The error for the stage before, ∂L_k/∂x_{k-1}; None if it wants none.
        """
        assert self._flight is not None and self.head is not None
        flight, self._flight = self._flight, None
        cut = flight.out.detach().requires_grad_(flight.out.requires_grad)
        with self.stream:
            logits = self.head(cut)
            loss = self.loss(logits, targets, cut)
        self.tally.add(loss, logits, targets)
        if loss.requires_grad:
            (loss * share).backward()
        # A head may ignore its input.
        error: Tensor | None = cut.grad if cut.grad is not None else torch.zeros_like(cut)
        if flight.tail_run is not None:
            error = self._local_backward_of_tail(flight.tail_run, error)
            self._awaiting_error.append(flight.tail_run)
        if flight.h.requires_grad and error is not None:
            torch.autograd.backward(flight.h, error)
        if not self.sends_error:
            return None
        return flight.x.grad if flight.x.grad is not None else torch.zeros_like(flight.x)

    def link_backward(self, error: Tensor) -> None:
        """Backpropagate λ · e_k through the tail of the oldest microbatch that awaits its error."""
        run = self._awaiting_error.popleft()
        if run.parameters:
            out = self._recompute(run) if run.out is None else run.out
            self._add_to_live(torch.autograd.grad(out, list(run.parameters.values()), self.link.weight * error,
                                                  allow_unused=True))

    def step(self, lr_factor: float) -> None:
        """Update the weights, with `lr_factor` on the configured learning rate."""
        if self.optimizer is None:
            return
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * lr_factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._snapshot = None

    @torch.no_grad()
    def evaluate(self, x: Tensor, targets: Tensor) -> Tensor:
        """Run blocks and head in evaluation mode and count; returns x_k for the next stage."""
        with self.stream:
            out = self.blocks(x)
            if self.head is not None:
                logits = self.head(out)
                self.tally.add(self.loss(logits, targets, out), logits, targets)
        return out

    def train(self, mode: bool) -> None:
        """Switch blocks, head and loss between training and evaluation, and start a new tally."""
        self.blocks.train(mode)
        self.loss.train(mode)
        if self.head is not None:
            self.head.train(mode)
        self.tally = Tally()

    def _run_tail(self, h: Tensor) -> TailRun:
        if self.link.delay == 0:
            parameters = self._tail_live  # the link's backward comes before the step that changes them
        else:
            parameters = self._snapshot = self._snapshot or {
                name: p.detach().clone().requires_grad_() for name, p in self._tail_live.items()}
        cut = h.detach().requires_grad_(h.requires_grad)
        random_state, buffers = [], {}
        if self.link.keep == "recompute":
            random_state = self.stream.read()
            buffers = {name: buffer.clone() for name, buffer in self.tail.named_buffers()}
        return TailRun(parameters, cut, functional_call(self.tail, parameters, (cut,)), random_state, buffers)

    def _local_backward_of_tail(self, run: TailRun, error: Tensor | None) -> Tensor | None:
        """Returns ∂L_k/∂h, or None if the body wants none."""
        wanted = [*run.parameters.values(), *([run.h] if run.h.requires_grad else [])]
        if not wanted:
            return None
        assert run.out is not None
        keep = self.link.keep == "graph"
        gradients = torch.autograd.grad(run.out, wanted, error, retain_graph=keep, allow_unused=True)
        if not keep:
            run.out = None
        self._add_to_live(gradients[:len(run.parameters)])
        return gradients[-1] if run.h.requires_grad else None

    def _recompute(self, run: TailRun) -> Tensor:
        """The tail's output again, bit for bit: same weights, buffers and random numbers; the live ones stay."""
        with self.stream.rewound_to(run.random_state):
            return functional_call(self.tail, {**run.parameters, **run.buffers}, (run.h.detach(),))

    def _add_to_live(self, gradients: tuple[Tensor | None, ...]) -> None:
        for live, gradient in zip(self._tail_live.values(), gradients, strict=True):
            if gradient is not None:
                live.grad = gradient if live.grad is None else live.grad + gradient
