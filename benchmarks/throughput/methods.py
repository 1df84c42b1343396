"""What is compared: the same model, batches and cuts, trained by each method over the same processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.throughput.rows import ROWS
from benchmarks.throughput.settings import config_of
from benchmarks.throughput.torch_schedules import SCHEDULES, TorchPipeline
from blpipe.config import Config
from blpipe.data import open_data
from blpipe.device import transfer
from blpipe.engines.common import train_epoch
from blpipe.engines.pipeline import PipelineEngine
from blpipe.optim import build_optimizer
from blpipe.plan import Plan
from blpipe.program import Factors, Kind, Op, Ports, execute, train_program
from blpipe.specs import Share
from blpipe.transport.memory import MemorySum
from blpipe.transport.messages import as_sent
from blpipe.transport.world import World

OnStep = Callable[[], None]  # called before each optimizer step of this process
Run = Callable[[OnStep], None]


@dataclass(frozen=True)
class Method:
    """One method in this process. A run goes through all batches once.

    Args:
        run: with the other processes; None where this one takes no part.
        alone: the same computing of this process, without any neighbour.
        sent_bytes: that this process has sent so far.
        wait_seconds: that it has been blocked on a neighbour so far; None where that is not measured.
        threads: of this process.
    """

    name: str
    run: Run | None
    alone: Run | None = None
    sent_bytes: Callable[[], float] = lambda: 0
    wait_seconds: Callable[[], float] | None = None
    threads: int = 1


class Batches:
    """The batches of every method and process, ready on the device; an engine reads them as its data."""

    def __init__(self, config: Config, device: torch.device):
        data, train = open_data(config.data, config.seed), config.train
        self.spec = data.spec
        self.batches = [(transfer(x, device), transfer(y, device))
                        for x, y in data.train_batches(config.seed, 0, train.batch_size, drop_last=True)]
        self.device, self.is_held_there = device, True

    def train_batches(self, *asked: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """This share, the last that is asked for, of each of them, whatever the seed, the epoch and the size."""
        share: Share = asked[-1]
        return ((x[share.of(len(x))], y[share.of(len(y))]) for x, y in self.batches)


class Constant:
    """A queue without a neighbour: gives the same message every time, and drops what it is given."""

    def __init__(self, *message: Tensor):
        self._message = message

    def has_message(self) -> bool:
        """Always."""
        return True

    def get(self) -> tuple[Tensor, ...]:
        """The message."""
        return self._message

    def put(self, *tensors: Tensor) -> None:
        """Drop them."""


def make_configs(tree: dict[str, Any], cuts: dict[str, list[str]], microbatches: int, methods: Sequence[str]
                 ) -> dict[str, Config]:
    """The config of every method, by name; `bp` for all that train end to end."""
    return {name: config_of(tree, ROWS[name], {"cuts": cuts[ROWS[name].cuts]}, microbatches) for name in methods}


def make_methods(plans: dict[str, Plan], data: Batches, worlds: dict[int, World]) -> list[Method]:
    """All methods, each with a model of its own; every process calls this in the same order.

    Args:
        plans: by name, of the configs that `make_configs` gives.
        worlds: of all processes, by the number of replicas.
    """
    return [_make_method(name, plan, data, worlds[plan.config.train.replicas]) for name, plan in plans.items()]


def _make_method(name: str, plan: Plan, data: Batches, world: World) -> Method:
    if name in SCHEDULES:
        schedule = SCHEDULES[name]
        pipeline = TorchPipeline(plan, schedule, world.rank, world.size, world.device)
        alone = None if schedule.like else partial(pipeline.alone, data.batches)
        return Method(name, partial(pipeline.run, data.batches), alone, sent_bytes=pipeline.sent_bytes)
    make = {"DDP": _data_parallel, "one process": _one_process}.get(name, partial(_stage_program, name))
    return make(plan, data, world)


def _stage_program(name: str, plan: Plan, data: Batches, world: World) -> Method:
    engine = PipelineEngine(plan, data if world.stage == 0 else None, world)  # type: ignore[arg-type]
    return Method(name, partial(train_epoch, engine, 0), partial(_program_alone, engine, data),
                  sent_bytes=lambda: sum(queue.sent_bytes for queue in engine.queues),
                  wait_seconds=lambda: sum(queue.wait_seconds for queue in engine.queues))


def _program_alone(engine: PipelineEngine, data: Batches, on_step: OnStep) -> None:
    """This process's stage runs the very program of the method on inputs and errors that are there already."""
    plan, k = engine.plan, engine.index
    size = plan.config.train.microbatch_size
    x, targets = (tensor[:size] for tensor in data.batches[0])
    if k > 0:
        x = as_sent(torch.randn(plan.outputs[size][k - 1].shape, device=x.device), plan.channels_last(k - 1))
    errors = as_sent(1e-4 * torch.randn(plan.outputs[size][k].shape, device=x.device), plan.channels_last(k))
    steps = plan.train_steps(0)
    no_other_replica = MemorySum.ends(1)[0]
    ports = Ports(Constant(x, targets), Constant(), Constant(errors), Constant(), no_other_replica)

    def watch(op: Op) -> None:
        if op.kind is Kind.STEP:
            on_step()

    for _ in execute(train_program(steps, engine.role, plan.delay), engine.stage, ports, steps,
                     lambda step: Factors(), watch):
        raise AssertionError("a constant queue never lets a stage wait")


def _data_parallel(plan: Plan, data: Batches, world: World) -> Method:
    model = plan.model.to(world.device)
    # Each process keeps its own BatchNorm statistics, and gradients are not copied to buckets: both are faster.
    known = signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name before 2.15
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, **{sync: False},
                                       device_ids=[world.device] if world.device.type == "cuda" else None)
    share = [(x.chunk(world.size)[world.rank], y.chunk(world.size)[world.rank]) for x, y in data.batches]
    train = partial(_train, optimizer=build_optimizer(plan.config.optimizer, model.parameters()))
    gradient_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    steps = 0

    def run(on_step: OnStep) -> None:
        def count() -> None:
            nonlocal steps
            steps += 1
            on_step()
        train(parallel, share, count)

    # What a ring all-reduce sends; torch does not say what its own does.
    return Method("DDP", run, sent_bytes=lambda: steps * gradient_bytes * 2 * (world.size - 1) / world.size)


def _one_process(plan: Plan, data: Batches, world: World) -> Method:
    if world.rank > 0:
        return Method("one process", None)
    model = plan.model.to(world.device)
    optimizer = build_optimizer(plan.config.optimizer, model.parameters())
    return Method("one process", lambda on_step: _train(model, data.batches, on_step, optimizer),
                  threads=world.size if world.device.type == "cpu" else 1)


def _train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], on_step: OnStep,
           optimizer: torch.optim.Optimizer) -> None:
    """A plain loop of end-to-end backpropagation."""
    model.train()
    for x, targets in batches:
        cross_entropy(model(x), targets).backward()
        on_step()
        optimizer.step()
        optimizer.zero_grad()
