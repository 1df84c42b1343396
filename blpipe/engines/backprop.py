"""`bp` in the pipeline: end-to-end backpropagation by torch.distributed.pipelining, the baseline.

1F1B where there are at least as many microbatches as stages, as torch's schedule requires, else GPipe.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from blpipe.engines.common import factors, forward_with_graph, loss_with_graph
from blpipe.engines.feed import Feed
from blpipe.errors import PeerLostError
from blpipe.plan import Plan
from blpipe.specs import TensorSpec
from blpipe.stage import Stage
from blpipe.steps import Step
from blpipe.transport.queues import ReceiveQueue, SendQueue
from blpipe.transport.world import World

Schedule = Schedule1F1B | ScheduleGPipe


class _Part(nn.Module):
    """A stage's blocks, run as it does."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.blocks, self._run = stage.blocks, partial(forward_with_graph, stage)

    def forward(self, x: Tensor) -> Tensor:
        """[microbatch, …] to the stage's output, contiguous: torch's schedules send it as it is."""
        return self._run(x).contiguous()


class Backprop:
    """One rank's part in torch's schedules, over the stages of our plan.

    torch's schedules take microbatches of one size. A last batch that is smaller runs as two schedules,
    one for its full microbatches and one for the rest, into the same gradients.
    """

    def __init__(self, plan: Plan, stage: Stage, world: World):
        self.plan, self.stage, self.world = plan, stage, world
        self.first, self.last = world.stage == 0, world.stage == world.stages - 1
        self._schedules: dict[tuple[int, int], Schedule] = {}
        self._share = 1.0
        self._mix_ratio: float | None = None
        # torch carries activations only; the targets go straight from the first stage to the last.
        several = world.stages > 1
        self._targets_out: SendQueue | None = world.control_sender(world.stages - 1) if several and self.first else None
        self._targets_in: ReceiveQueue | None = world.control_receiver(0) if several and self.last else None

    def train_step(self, step: Step, feed: Feed | None) -> None:
        """Accumulate the gradients of one batch; `feed` is the first stage's."""
        self._mix_ratio = factors(self.plan, step.index).mix_ratio
        for size, count in sorted(Counter(step.sizes).items(), reverse=True):
            if (size, count) not in self._schedules:
                self._schedules[size, count] = self._new_schedule(size, count)
            schedule = self._schedules[size, count]
            self._share = size / step.samples
            with self.stage.stream, self._lost_peer():
                if feed is not None:
                    xs, targets = (torch.cat(each) for each in zip(*(feed.get() for _ in range(count)), strict=True))
                    if self._targets_out is not None:
                        self._targets_out.put(targets)
                    schedule.step(xs, target=targets if self.last else None, return_outputs=False)
                elif self._targets_in is not None:
                    self._targets_in.expect([(self.plan.targets(size * count),)], ahead=1)
                    schedule.step(target=self._targets_in.get()[0], return_outputs=False)
                else:
                    schedule.step(return_outputs=False)

    def drain(self) -> None:
        """Wait until everything sent has arrived."""
        if self._targets_out is not None:
            self._targets_out.drain()

    @contextmanager
    def _lost_peer(self) -> Iterator[None]:
        """torch's schedules raise a lost connection and a failing block alike; gloo's messages name its sources."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                me = f"stage {self.world.stage + 1} (rank {self.world.rank})"
                raise PeerLostError(f"{me} in torch's schedule: another process ended, or did not answer within "
                                    "runtime.timeout_seconds") from error
            raise

    def _new_schedule(self, size: int, count: int) -> Schedule:
        k, outputs = self.world.stage, self.plan.outputs[size]
        part = PipelineStage(_Part(self.stage), k, self.world.stages, self.world.device,
                             input_args=self._example(self.plan.input(size) if self.first else outputs[k - 1]),
                             output_args=self._example(outputs[k]), group=self.world.pipeline)
        kind = Schedule1F1B if count >= self.world.stages else ScheduleGPipe
        return kind(part, count, loss_fn=self._loss, scale_grads=False)

    def _example(self, spec: TensorSpec) -> Tensor:
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta", requires_grad=spec.dtype.is_floating_point)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return loss_with_graph(self.stage, logits, targets, self._mix_ratio) * self._share
