"""The tail of a stage: its last blocks, through which errors of later stages run back, at the weights of their forward.

An error may come after the step that follows its forward. So the tail runs on a snapshot: a copy of its parameters,
made once a step (or for each microbatch that is recorded). Until the error is there, the graph of that forward is
kept, or with `link.keep: recompute` its input alone, to run the forward again.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from blpipe.gradients import (
    Within,
    copies_of,
    edge_of,
    first_names,
    gradients_of,
    trainable_copies_of,
    with_tensors,
)
from blpipe.graphs import Runner
from blpipe.links import Links
from blpipe.precision import Precision
from blpipe.recompute import Recomputed
from blpipe.seeds import RandomStream

Backward = tuple[Sequence[Tensor | None], Tensor | None]  # gradients of the parameters, and of the input if wanted


@dataclass
class TailRun:
    """A forward of the tail, kept until its last link backward."""

    runner: Runner                 # runs what is computed on this microbatch
    parameters: dict[str, Tensor]  # the live ones, or the snapshot that it ran with
    h: Tensor                      # its input, a leaf: the body's graph ends before it
    graph: GradientEdge | None     # of its output
    dtype: torch.dtype             # of its output
    buffers: dict[str, Tensor]     # for recomputing: the tail's buffers as they were
    random_state: list[Tensor] | None = None  # for recomputing: where the random stream stood
    again: bool = False            # whether the graph was given up, and the tail must run again
    local_norm: Tensor | None = None  # for normalising: the norm of its local gradient
    local_error: Tensor | None = None  # for a joint backward: ∂L_k/∂x_k


class Tail:
    """Runs the blocks, and backpropagates errors through the runs that await them.

    Args:
        blocks: the last ones of a stage.
        links: which errors come, when, and what is kept until then.
        stream: the stage's random numbers.
        precision: how the blocks are run.
        recompute: whether a block stores only its input, and reruns its forward during its backward.
        compiled: compiles what runs in training, or returns it as it is.
    """

    def __init__(self, blocks: nn.Sequential, links: Links, stream: RandomStream, precision: Precision,
                 recompute: bool, compiled: Callable[[Any], Any]):
        self.blocks = blocks
        self.live: dict[str, Tensor] = {name: p for name, p in blocks.named_parameters() if p.requires_grad}
        self._links, self._stream, self._precision = links, stream, precision
        called = Recomputed(blocks) if recompute else blocks
        self._run, self._run_with = compiled(called), compiled(with_tensors(called))
        # When the tail runs again, its backward follows at once, and begins with the last block.
        self._run_again = with_tensors(Recomputed(blocks, last=False)) if recompute else self._run_with
        self._within = with_tensors(Within(blocks))
        self._first_names = first_names(blocks)
        self._snapshot: dict[str, Tensor] | None = None
        self._awaiting: dict[int, deque[TailRun]] = {hop: deque() for hop in links.hops_in}

    def forward(self, h: Tensor, runner: Runner) -> tuple[TailRun, Tensor]:
        """Run on the body's output h; returns what is kept of that, and x_k."""
        random_state = self._stream.read() if self._links.keep == "recompute" else None
        run, out = runner.run("tail", partial(self._forward, h, runner))
        run.random_state = random_state
        return run, out

    def local_backward(self, run: TailRun, error: Tensor | None, trains: bool, into_body: bool) -> Backward:
        """Backpropagate ∂L_k/∂x_k; from then on the run awaits its first error.

        Args:
            trains: whether gradients of the parameters are wanted.
            into_body: whether that of the input is.
        """
        keep = self._links.keep == "graph"
        backward = partial(self._backward, run, _parameters(run, trains), into_body, keep, error)
        found = run.runner.run("local backward of the tail", backward)
        if not keep:
            run.graph, run.again = None, True
        self._awaiting[self._links.hops_in[0]].append(run)
        return found

    def oldest(self, hop: int) -> tuple[TailRun, bool]:
        """The oldest run that awaits the error of this hop, and whether it awaits another one after it."""
        run = self._awaiting[hop].popleft()
        later = [other for other in self._links.hops_in if other > hop]
        if later:
            self._awaiting[later[0]].append(run)
        return run, bool(later)

    def link_backward(self, run: TailRun, error: Tensor, hop: int, trains: bool, into_body: bool,
                      later: bool) -> Backward:
        """Backpropagate an error of a later stage; see `local_backward`.

        Args:
            later: whether another error will come.
        """
        with self._stream.rewound_to(run.random_state) if run.again and run.random_state else nullcontext():
            backward = partial(self._backward, run, _parameters(run, trains), into_body, later and not run.again)
            return run.runner.run(f"link backward {hop}", backward, error)

    def stepped(self) -> None:
        """The live parameters have changed: later forwards need a new snapshot."""
        self._snapshot = None

    def _forward(self, h: Tensor, runner: Runner) -> tuple[TailRun, Tensor]:
        parameters = self.live  # the link's backward comes before the step that changes them
        if self._links.late and runner.repeats:
            parameters = trainable_copies_of(self.live)
        elif self._links.late:
            parameters = self._snapshot = self._snapshot or trainable_copies_of(self.live)
        cut = h.detach().requires_grad_(h.requires_grad)
        recompute = self._links.keep == "recompute"
        buffers = copies_of(dict(self.blocks.named_buffers())) if recompute else {}
        before = cut._version
        out = self._precision.run(self._run if parameters is self.live else self._having(parameters, self._run_with),
                                  cut)
        if recompute and cut._version != before:
            raise ValueError("a block writes to its input, which method.link.keep=recompute runs it on again; have it "
                             "make a new tensor")
        return TailRun(runner, parameters, cut, edge_of(out), out.dtype, buffers), out

    def _having(self, tensors: dict[str, Tensor], run: Callable[..., Any]) -> Callable[[Any], Any]:
        """`run`, which is `with_tensors`, with these in place of the tail's own."""
        return partial(run, {name: tensors[first] for name, first in self._first_names.items() if first in tensors})

    def _backward(self, run: TailRun, parameters: Sequence[Tensor], into_body: bool, keep: bool,
                  error: Tensor | None) -> Backward:
        tensors, x, graph = run.parameters, run.h, run.graph
        if run.again:  # bit for bit: the same weights, buffers and random numbers; the live ones stay
            tensors = {**run.parameters, **copies_of(run.buffers)}  # a forward may write to buffers
            x = run.h.detach().requires_grad_(into_body)
            graph = edge_of(self._precision.run(self._having(tensors, self._run_again), x))
        error = error.to(run.dtype) if error is not None else None
        backward = partial(gradients_of, graph, parameters, x if into_body else None, error, keep)
        # A block may run again in its backward: with the weights of its forward, not those that are live by now.
        return backward() if tensors is self.live else self._having(tensors, self._within)(backward)


def _parameters(run: TailRun, wanted: bool) -> list[Tensor]:
    return list(run.parameters.values()) if wanted else []
