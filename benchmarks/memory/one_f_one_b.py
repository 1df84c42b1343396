"""A stage of `bp` in the pipeline without its neighbours: torch's own schedule, over a group that sends nothing."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend "fake" known

from blpipe.engines.backprop import Backprop
from blpipe.engines.build import build_stage
from blpipe.engines.feed import Feed
from blpipe.plan import Plan
from blpipe.steps import Step
from blpipe.transport.queues import Layout

STEPS = 2  # in the second one the optimizer's state is there


class _TargetsOut:
    def put(self, *tensors: Tensor) -> None:
        """Send nothing."""

    def drain(self) -> None:
        """Nothing is under way."""


class _TargetsIn:
    def __init__(self, device: torch.device):
        self._device = device

    def expect(self, layouts: list[Layout], ahead: int) -> None:
        """Announce what `get` gives."""
        self._layouts = layouts

    def get(self) -> tuple[Tensor, ...]:
        """Targets that are all of class 0."""
        return tuple(torch.zeros(spec.shape, dtype=spec.dtype, device=self._device) for spec in self._layouts[0])


def train_alone(plan: Plan, index: int, device: torch.device) -> None:
    """Build the stage with this index, from 0, and train it by torch's schedule."""
    stages, train = len(plan.stages), plan.config.train
    dist.init_process_group("fake", rank=index, world_size=stages, store=FakeStore())
    try:
        stage = build_stage(plan, index, device)
        world = SimpleNamespace(rank=index, stage=index, stages=stages, pipeline=None, device=device,
                                control_sender=lambda stage: _TargetsOut(),
                                control_receiver=lambda stage: _TargetsIn(device))
        backprop = Backprop(plan, stage, world)  # type: ignore[arg-type]
        size = train.microbatch_size
        for step in range(STEPS):
            images = (_microbatch(plan, size, device) for _ in range(train.microbatches))
            backprop.train_step(Step(step, (size,) * train.microbatches), Feed(images) if index == 0 else None)
            stage.step(0, 1.0)
    finally:
        dist.destroy_process_group()


def _microbatch(plan: Plan, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    targets = plan.targets(size)
    return torch.randn(plan.input(size).shape, device=device), torch.zeros(targets.shape, dtype=targets.dtype,
                                                                           device=device)
