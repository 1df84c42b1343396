"""The schedules of torch.distributed.pipelining over the stages of our plan."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.nn.functional import cross_entropy

from blpipe.optim import build_optimizer
from blpipe.plan import Plan
from blpipe.specs import TensorSpec


class Schedule(NamedTuple):
    """One of torch's schedules.

    Args:
        vee: whether two stages of a process lie as a V, the first and the last one in one process, instead of K apart.
        like: the schedule with the same stages in each process.
    """

    kind: Any
    vee: bool = False
    like: str | None = None

    def stages_of(self, rank: int, processes: int, stages: int) -> list[int]:
        """The one or two stages of a process, from 0."""
        if stages == processes:
            return [rank]
        return [rank, stages - 1 - rank if self.vee else processes + rank]


SCHEDULES = {
    "GPipe": Schedule(ScheduleGPipe, like="1F1B"),
    "1F1B": Schedule(Schedule1F1B),
    "1F1B, own cuts": Schedule(Schedule1F1B),
    "interleaved 1F1B": Schedule(ScheduleInterleaved1F1B),
    "zero-bubble": Schedule(ScheduleZBVZeroBubble, vee=True),
}


class Part(nn.Module):
    """A stage's blocks; torch's schedules send the output as it is, and gloo sends only what is contiguous."""

    def __init__(self, blocks: nn.Sequential):
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        """[microbatch, …] to the stage's output."""
        return self.blocks(x).contiguous()


class CountedStage(PipelineStage):
    """A stage of torch's that counts the bytes it sends to other processes."""

    sent_bytes = 0

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[torch.distributed.P2POp]:
        """The sends of a microbatch's activations."""
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[torch.distributed.P2POp]:
        """The sends of a microbatch's gradients."""
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def _counted(self, ops: list[torch.distributed.P2POp]) -> list[torch.distributed.P2POp]:
        self.sent_bytes += sum(op.tensor.nbytes for op in ops)
        return ops


class TorchPipeline:
    """One process's part in a schedule; the targets are given to the last stage, since torch sends activations only.

    Args:
        plan: of the K or 2K stages that `schedule` wants.
    """

    def __init__(self, plan: Plan, schedule: Schedule, rank: int, processes: int, device: torch.device):
        self.plan, self.indices = plan, schedule.stages_of(rank, processes, len(plan.stages))
        self.parts = [Part(plan.stages[index]).to(device).train() for index in self.indices]
        self.microbatches = plan.config.train.microbatches
        self.optimizer = build_optimizer(plan.config.optimizer, [p for part in self.parts for p in part.parameters()])
        self._stages = [CountedStage(part, index, len(plan.stages), device, input_args=_example(self._input(index)),
                                     output_args=_example(self._output(index)))
                        for part, index in zip(self.parts, self.indices, strict=True)]
        # The mean over the batch, without torch's own pass over all gradients to divide them.
        self._schedule = schedule.kind(self._stages if self._stages[1:] else self._stages[0], self.microbatches,
                                       loss_fn=self._loss, scale_grads=False)

    def run(self, batches: list[tuple[Tensor, Tensor]], on_step: Any) -> None:
        """Train all batches once."""
        for x, targets in batches:
            given = [x] if 0 in self.indices else []
            target = targets if self._is_last(self.indices[-1]) else None
            self._schedule.step(*given, target=target, return_outputs=False)
            self._step(on_step)

    def alone(self, batches: list[tuple[Tensor, Tensor]], on_step: Any) -> None:
        """Forward and backward of this process's stages, on inputs and gradients that are there already."""
        x, targets = (tensor.chunk(self.microbatches)[0] for tensor in batches[0])
        inputs = [x if index == 0 else torch.randn(self._input(index).shape, device=x.device)
                  for index in self.indices]
        gradients = [1e-4 * torch.randn(self._output(index).shape, device=x.device) for index in self.indices]
        for _ in batches:
            for _ in range(self.microbatches):
                for index, part, given, gradient in zip(self.indices, self.parts, inputs, gradients, strict=True):
                    out = part(given.detach().requires_grad_(index > 0))
                    if self._is_last(index):
                        self._loss(out, targets).backward()
                    else:
                        out.backward(gradient)
            self._step(on_step)

    def sent_bytes(self) -> int:
        """Bytes that this process has sent so far."""
        return sum(stage.sent_bytes for stage in self._stages)

    def _step(self, on_step: Any) -> None:
        on_step()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _is_last(self, index: int) -> bool:
        return index == len(self.plan.stages) - 1

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets) / self.microbatches

    def _input(self, index: int) -> TensorSpec:
        size = self.plan.config.train.microbatch_size
        return self._output(index - 1) if index else self.plan.input(size)

    def _output(self, index: int) -> TensorSpec:
        return self.plan.outputs[self.plan.config.train.microbatch_size][index]


def _example(spec: TensorSpec) -> Tensor:
    """What torch asks for instead of running the stage on a trial: a tensor without values."""
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta", requires_grad=spec.dtype.is_floating_point)
