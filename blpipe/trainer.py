"""From a checked config to a running engine, and from an engine to epochs."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from blpipe import launch
from blpipe.config import Config
from blpipe.data import Data
from blpipe.engines.common import Engine, OnStep
from blpipe.engines.local import LocalEngine
from blpipe.engines.pipeline import PipelineEngine, contract
from blpipe.engines.reports import StageReport
from blpipe.errors import ConfigError
from blpipe.plan import Plan
from blpipe.text import say
from blpipe.transport.horizon import Horizon
from blpipe.transport.world import Meeting, World, choose_device, prepare_launches


@dataclass(frozen=True)
class Epoch:
    """One finished epoch, from 0; `reports` (one a stage) on the leading process alone."""

    index: int
    reports: list[StageReport] | None


@dataclass(frozen=True)
class Reached:
    """Where training is: optimizer steps done, the epoch that ends there, and whether it was asked to stop there."""

    steps_done: int
    epoch: Epoch | None
    stopped: bool


def choose_engine(config: Config) -> str:
    """"pipeline" under torchrun, else "local", or as `runtime.engine` says where that is possible.

    Raises:
        ConfigError: an engine, a device or a number of processes that does not fit the launch or the stages.
    """
    launched, wanted, needed = launch.world_size(), config.runtime.engine, config.processes
    stages, replicas = config.partition.stage_count, config.train.replicas
    command = f"torchrun --standalone --nproc-per-node={needed} -m blpipe train …"
    if launched is not None and launched > 1 and wanted == "local":
        raise ConfigError(f"runtime.engine: local, but torchrun started {launched} processes; "
                          "run `python -m blpipe train …`")
    if launched is None and wanted == "pipeline":
        raise ConfigError(f"runtime.engine: pipeline needs a process a stage; run `{command}`")
    if launched is not None and launched != needed and wanted != "local":
        each = f" in {replicas} replicas" if replicas > 1 else ""
        raise ConfigError(f"partition.stages: {stages} stages{each} need {needed} processes, torchrun started "
                          f"{launched}; run `{command}`, set {_fitting(config, launched)}, or leave torchrun out")
    device, own_gpu = choose_device(config.runtime.device)
    if launched is None or needed == 1 or wanted == "local":
        return "local"
    if config.method.name == "bp" and device.type == "cuda" and not own_gpu:
        raise ConfigError("method.name: bp in the pipeline needs a GPU for each stage, and there are fewer here; "
                          "use runtime.device=cpu, or leave torchrun out")
    return "pipeline"


def _fitting(config: Config, processes: int) -> str:
    """What of a config would need so many processes."""
    stages, replicas = config.partition.stage_count, config.train.replicas
    shares, rest = divmod(processes, stages)
    if not rest and config.train.batch_size % (shares * config.train.microbatches) == 0:
        return f"train.replicas={shares}"
    more = "" if processes % replicas == 0 else " and train.replicas=1"
    stages = processes if more else processes // replicas
    cut = config.partition.cuts is not None
    return (f"'partition={{stages: {stages}}}'" if cut else f"partition.stages={stages}") + more


def open_local(plan: Plan, data: Data) -> Engine:
    """All stages in this process."""
    device, _ = choose_device(plan.config.runtime.device)
    _use(device)
    return LocalEngine(plan, data.to(device), device)


def open_pipeline(plan: Plan, data: Data | None, meeting: Meeting) -> Engine:
    """This process's stage, connected to its neighbours; `data` on the processes of the first stage alone.

    Raises:
        UserError: neighbours that do not fit together.
    """
    device, own_gpu = choose_device(plan.config.runtime.device)
    if device.type == "cuda" and not own_gpu and meeting.rank == 0:
        say("note: there are more processes than GPUs here; they share them, and send through host memory")
    if own_gpu:
        prepare_launches()
    _use(device)
    agreed = {**contract(plan), "data": (plan.data if data is None else data.spec).to_json()}
    data = None if data is None else data.to(device)
    return PipelineEngine(plan, data, World(meeting, device, own_gpu, agreed, len(plan.stages)))


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()
        # Of another run in this process: its recordings and its stages are parts of cycles.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def is_due(epochs_done: int, every: int, epochs: int) -> bool:
    """Whether what happens after every so many epochs (0: never), and always at the end, happens now."""
    return epochs_done == epochs or (every > 0 and epochs_done % every == 0)


def train(engine: Engine, plan: Plan, start: int, horizon: Horizon, on_step: OnStep) -> Iterator[Reached]:
    """Train from step `start` of the run on, and evaluate after every so many epochs.

    Yields at the end of every epoch, at each step that `checkpoint.every_steps` names, and where `horizon` ends; the
    pipeline is drained then.
    """
    per_epoch, every = len(plan.step_sizes), plan.config.checkpoint.every_steps
    config, step = plan.config.train, start
    while step < per_epoch * config.epochs:
        index = step // per_epoch
        end = (index + 1) * per_epoch
        until = min(end, (step // every + 1) * every) if every else end
        step = engine.train(index, step, partial(_should_run, until, horizon), on_step)
        epoch = None
        if step == end:
            if is_due(index + 1, config.eval_every_epochs, config.epochs):
                engine.evaluate()
            epoch = Epoch(index, engine.reports())
        yield Reached(step, epoch, stopped=step < until)
        if step < until:
            return


def _should_run(until: int, horizon: Horizon, step: int) -> bool:
    return step < until and horizon.covers(step)
