"""The progress display: a bar for every stage, wherever it runs, and lines every so many steps."""

from dataclasses import asdict
from time import monotonic
from typing import Any

from tqdm import tqdm

from blpipe.engines.common import Engine
from blpipe.plan import Plan
from blpipe.text import human_bytes, percent, say
from blpipe.transport.world import Meeting

_SECONDS = 0.5  # between two looks at the stages
_FORMAT = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Counts this process's steps. Rank 0 shows all stages of the first replica; these tell it, through the store.

    Args:
        first_step: steps of the run that are done already.
        meeting: with the other processes; None where there is one.
        shown: whether rank 0 has a terminal; if not, `tick` only counts.
    """

    def __init__(self, engine: Engine, plan: Plan, first_step: int, meeting: Meeting | None, shown: bool):
        self._engine, self._plan, self._meeting, self._shown = engine, plan, meeting, shown
        self._steps, self._looked = first_step, monotonic()
        self._logged = first_step, monotonic()
        last = len(plan.stages) - 1
        self._log_every = plan.config.runtime.log_every_steps if last in engine.stages and not plan.replica else 0
        self._bars: list[tqdm] = []
        if shown and (meeting is None or meeting.rank == 0):
            total = len(plan.step_sizes) * plan.config.train.epochs
            self._bars = [tqdm(total=total, initial=first_step, desc=f"stage {k + 1}", position=k, leave=False,
                               dynamic_ncols=True, bar_format=_FORMAT) for k in range(len(plan.stages))]

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars:
            bar.close()

    def tick(self) -> None:
        """Count a step; now and then look at the stages."""
        self._steps += 1
        if self._log_every and self._steps % self._log_every == 0:
            self._log()
        if not self._shown or monotonic() - self._looked < _SECONDS:
            return
        self._looked = monotonic()
        own = {k: {"steps": self._steps, **asdict(progress)} for k, progress in self._engine.progress().items()}
        if self._bars:
            others = self._meeting.notes() if self._meeting is not None else {}
            self._show(others | own)
        elif self._meeting is not None:
            for note in own.values():
                self._meeting.note(note)

    def _log(self) -> None:
        """A line about the last stage, by the process that has it; waits for the device."""
        (steps, then), now = self._logged, monotonic()
        self._logged = self._steps, now
        loss = self._engine.progress()[len(self._plan.stages) - 1].loss
        per_epoch, train = len(self._plan.step_sizes), self._plan.config.train
        epoch, step = divmod(self._steps - 1, per_epoch)
        rate = (self._steps - steps) * train.batch_size / (now - then)
        say(f"epoch {epoch + 1}/{train.epochs}  step {step + 1}/{per_epoch}"
            f"{f'  train loss {loss:.4f}' if loss is not None else ''}  {rate:,.0f} samples/s")

    def _show(self, stages: dict[int, dict[str, Any]]) -> None:
        for k, stage in sorted(stages.items()):
            bar = self._bars[k]
            bar.update(stage["steps"] - bar.n)
            rate = bar.format_dict["rate"]
            bar.set_postfix_str(stage_text(stage, rate * self._plan.config.train.batch_size if rate else None))


def stage_text(stage: dict[str, Any], samples_per_second: float | None) -> str:
    """What is known of one stage, on one line."""
    busy, wait = stage["busy_seconds"], stage["wait_seconds"]
    measured = busy is not None and wait is not None and busy + wait > 0
    parts = [
        f"loss {stage['loss']:.4f}" if stage["loss"] is not None else None,
        f"{samples_per_second:,.0f} samples/s" if samples_per_second is not None else None,
        f"busy {percent(busy / (busy + wait))}, waiting {percent(wait / (busy + wait))}" if measured else None,
        f"GPU {percent(stage['gpu_utilization'])}" if stage["gpu_utilization"] is not None else None,
        human_bytes(stage["gpu_memory_bytes"]) if stage["gpu_memory_bytes"] is not None else None,
    ]
    return ", ".join(part for part in parts if part)
