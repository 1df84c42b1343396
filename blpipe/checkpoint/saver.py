"""Writing checkpoints while training goes on."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from blpipe.checkpoint.folders import CONFIG, FileSeal, Manifest, aside, checkpoint_after, complete, prune, seals
from blpipe.checkpoint.state import state_of, without_warning
from blpipe.config_file import dump_config
from blpipe.engines.common import Engine
from blpipe.engines.reports import StageReport
from blpipe.errors import CheckpointError, one_line
from blpipe.models.build import plain_metadata
from blpipe.plan import Plan
from blpipe.text import say

T = TypeVar("T")


class Saver:
    """Saves checkpoints of a run, one at a time, each process its own stages.

    `save` copies the state to the host, and a thread of its own writes it: nothing of training waits for files. If a
    checkpoint cannot be written, a note is printed and training continues; for the last one it is an error.

    Args:
        newest: steps of the checkpoint that is there already; −1 for none.
        outlived: whether this process goes on after a failure of the run.
    """

    def __init__(self, run: Path, plan: Plan, engine: Engine, newest: int, outlived: bool = False):
        self._run, self._plan, self._engine, self._group = run, plan, engine, engine.group
        self._rank = 0 if self._group is None else dist.get_rank()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[str | None] | None = None
        self._newest = newest
        self._awaited = outlived or self._group is None

    def save(self, steps_done: int, model: StageReport | None = None) -> None:
        """Begin to save; waits for the checkpoint before, and for the device.

        Args:
            model: what the last stage did, at the end of an epoch.
        """
        if steps_done == self._newest:
            return
        problem = self._wait()
        if problem is not None and self._rank == 0:
            say(f"note: {problem}; training goes on")
        self._newest = steps_done
        state = {key: tensor.detach().to("cpu", copy=True)
                 for key, tensor in state_of(self._engine).items()}
        self._writing = self._thread.submit(self._write, steps_done, state, model)

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises CheckpointError if it could not be written."""
        problem = self._wait()
        if problem is not None:
            raise CheckpointError(problem)

    def close(self) -> None:
        """Let go of the thread. In a process that goes on, wait for it: nothing else may come to the folder while it
        writes.
        """
        self._thread.shutdown(wait=self._awaited)

    def _wait(self) -> str | None:
        """Returns what went wrong, in every process something."""
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def _write(self, steps_done: int, state: dict[str, Tensor], model: StageReport | None) -> str | None:
        target = checkpoint_after(self._run, steps_done)
        try:
            self._on_leader(partial(_begin, aside(target), self._plan))
            with without_warning():
                # Without copies ahead: the state is on the host, and CUDA is not for this thread.
                writer = dcp.FileSystemWriter(aside(target), per_thread_copy_ahead=0)
                dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            files = self._gather(partial(seals, aside(target), f"__{self._rank}_*"))
            self._on_leader(partial(self._complete, target, steps_done, model, files))
        except (Exception, dcp.CheckpointException) as error:
            if self._rank == 0:
                shutil.rmtree(aside(target), ignore_errors=True)
            cause = one_line(_cause(error))
            why = "it could not be written whole; is the disk full?" if "inline_container" in cause else cause
            return f"cannot write the checkpoint {target}: {why}; what was saved before is still there"
        return None

    def _complete(self, target: Path, steps_done: int, model: StageReport | None, files: dict[str, FileSeal]) -> None:
        files = {**files, **seals(aside(target), ".metadata"), **seals(aside(target), CONFIG)}
        names = [self._plan.block_names(k) for k in range(len(self._plan.stages))]
        accuracy, loss = (None, None) if model is None else (model.val_accuracy, model.val_loss)
        complete(target, Manifest(steps_done, accuracy, names, plain_metadata(self._plan.model), files,
                                  len(self._plan.step_sizes), loss))
        kept = self._plan.config.checkpoint
        with suppress(OSError):  # what cannot be deleted stays
            prune(self._run, kept.keep, kept.best)

    def _on_leader(self, work: Callable[[], None]) -> None:
        """Do it in the first process; its error is everybody's."""
        problem: list[Any] = [_tried(work) if self._rank == 0 else None]
        if self._group is not None:
            dist.broadcast_object_list(problem, src=0, group=self._group)
        if isinstance(problem[0], Exception):
            raise problem[0]

    def _gather(self, find: Callable[[], dict[str, FileSeal]]) -> dict[str, FileSeal]:
        """What all processes find; an error is everybody's."""
        found: list[Any] = [_tried(find)]
        if self._group is not None:
            everyones: list[Any] = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(everyones, found[0], group=self._group)
            found = everyones
        for each in found:
            if isinstance(each, Exception):
                raise each
        return {name: seal for each in found for name, seal in each.items()}


def _tried(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:
        return error


def _begin(folder: Path, plan: Plan) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(dump_config(plan.config))


def _cause(error: BaseException) -> BaseException:
    """What happened in the first process that failed; DCP adds tracebacks."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error
