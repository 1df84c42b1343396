"""What a run leaves for people and programs: rows, results, tables."""

import json
import platform
from dataclasses import asdict
from importlib.util import find_spec
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

import blpipe
from blpipe.config import Config
from blpipe.engines.common import factors
from blpipe.errors import CheckpointError, ConfigError, UserError, one_line
from blpipe.files import sync, write_text
from blpipe.plan import Plan
from blpipe.text import blocks_text, percent, stages_text, table
from blpipe.trainer import Epoch


def check_tensorboard(config: Config) -> None:
    """Raises a ConfigError where the config asks for TensorBoard and the package is missing."""
    if config.runtime.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("runtime.tensorboard: the package is missing; run `pip install tensorboard`, or leave it out")


class RunLog:
    """Writes `metrics.jsonl` and `result.json` of one run folder; the leading process has one.

    With `runtime.tensorboard` also all numbers of the rows as scalars, over the steps done.

    Args:
        run: the run folder.
        epochs_done: rows of later epochs, left by an interrupted run, are dropped.

    Raises:
        UserError: the files cannot be written.
    """

    def __init__(self, run: Path, plan: Plan, engine: str, epochs_done: int = 0):
        self._plan, self._engine = plan, engine
        self._rows_path, self._result_path = run / "metrics.jsonl", run / "result.json"
        self._rows = [row for row in read_rows(run) if row["epoch"] <= epochs_done]
        self._unwritten = False  # whether rows of earlier epochs could not be written
        try:
            self._write_all()
        except OSError as error:
            raise UserError(f"{self._rows_path}: cannot be written: {error.strerror}; mend that, and go on") from error
        self._board: Any = None
        if plan.config.runtime.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What an interrupted run left of later steps is dropped.
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=epochs_done * len(plan.step_sizes) + 1)

    def add(self, epoch: Epoch) -> list[str]:
        """Append a row for every stage, in place of those of the same epoch.

        Returns what a user may want to know of that.
        """
        assert epoch.reports is not None
        last_step = (epoch.index + 1) * len(self._plan.step_sizes) - 1
        lr = self._plan.config.optimizer.lr * factors(self._plan, last_step).lr
        rows = [{"epoch": epoch.index + 1, "stage": number, "blocks": blocks_text(self._plan.block_names(number - 1)),
                 "lr": lr, "samples_per_second": self._plan.samples_per_epoch / report.train_seconds, **asdict(report)}
                for number, report in enumerate(epoch.reports, start=1)]
        others = [row for row in self._rows if row["epoch"] != epoch.index + 1]
        self._unwritten |= len(others) < len(self._rows)  # an epoch that is evaluated later has new ones
        self._rows = [*others, *rows]
        return [*self._append(rows), *self._draw(rows, last_step + 1)]

    def rows(self) -> list[dict[str, Any]]:
        """All so far, as `read_rows` reads them back."""
        return [json.loads(_line(row)) for row in self._rows]

    def catch_up(self) -> None:
        """Write the rows that could not be written before, if now they can: no checkpoint should be ahead of them."""
        if self._unwritten:
            self._append([])

    def _draw(self, rows: list[dict[str, Any]], steps_done: int) -> list[str]:
        """Give TensorBoard the numbers of the rows."""
        if self._board is None:
            return []
        try:
            for row in rows:
                for key, value in row.items():
                    if isinstance(value, int | float) and key not in ("epoch", "stage"):
                        self._board.add_scalar(f"{key}/stage {row['stage']}", value, steps_done)
            self._board.flush()
        except OSError as error:
            folder, self._board = self._board.log_dir, None
            return [f"cannot write {folder}: {error.strerror}; training goes on without TensorBoard"]
        return []

    def _append(self, rows: list[dict[str, Any]]) -> list[str]:
        try:
            if self._unwritten:
                self._write_all()
            else:
                with self._rows_path.open("a") as file:
                    file.writelines(map(_line, rows))
                    sync(file)
        except OSError as error:
            self._unwritten = True
            return [f"cannot write {self._rows_path}: {error.strerror}; training goes on, and its rows are kept"]
        self._unwritten = False
        return []

    def _write_all(self) -> None:
        write_text(self._rows_path, "".join(map(_line, self._rows)))

    def finish(self, epochs: int, ended_by: str) -> dict[str, Any]:
        """Write and return the result, of so many epochs; what lost rows would say of it is None."""
        plan = self._plan
        last = {row["stage"]: row for row in self._rows if row["epoch"] == epochs}
        accuracies, losses = ([last.get(number, {}).get(key) for number in range(1, len(plan.stages) + 1)]
                              for key in ("val_accuracy", "val_loss"))
        first = [row for row in self._rows if row["stage"] == 1]
        seconds = sum(row["train_seconds"] for row in first)
        result = {
            "engine": self._engine,
            "method": plan.config.method.name,
            "val_accuracy": accuracies[-1],
            "stage_val_accuracy": accuracies,
            "val_loss": losses[-1],
            "stage_val_loss": losses,
            "samples_per_second": plan.samples_per_epoch * len(first) / seconds if first else None,
            "train_seconds": seconds if len(first) == epochs else None,
            "epochs": epochs,
            "ended_by": ended_by,
            "steps": epochs * len(plan.step_sizes),
            "stages": [row | {
                "busy_seconds": _total(rows, "busy_seconds"),
                "wait_seconds": _total(rows, "wait_seconds"),
                "peak_memory_bytes": max((r["peak_memory_bytes"] for r in rows), default=None),
            } for row, rows in zip(stage_rows(plan), map(self._rows_like, range(len(plan.stages))), strict=True)],
            "versions": {"blpipe": blpipe.__version__, "torch": torch.__version__, "numpy": np.__version__,
                         "python": platform.python_version()},
        }
        try:
            self._write_all()
            write_text(self._result_path, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self._result_path}: {error.strerror}; go on with "
                                  f"`train --resume {self._result_path.parent}`") from error
        if self._board is not None:
            self._board.close()
        return result

    def _rows_like(self, index: int) -> list[dict[str, Any]]:
        """Those of this stage of these blocks; a run that went on may have had others. Old rows name none."""
        blocks = blocks_text(self._plan.block_names(index))
        return [row for row in self._rows if row["stage"] == index + 1 and row.get("blocks", blocks) == blocks]


def _total(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows]
    return None if None in values or not values else sum(values)


def _line(row: dict[str, Any]) -> str:
    """A row as a line of JSON, which knows no NaN."""
    return json.dumps({key: None if isinstance(value, float) and not isfinite(value) else value
                       for key, value in row.items()}) + "\n"


def stage_rows(plan: Plan) -> list[dict[str, Any]]:
    """The blocks and the number of parameters (heads not counted) of every stage."""
    return [{"blocks": plan.block_names(k), "params": sum(p.numel() for p in stage.parameters())}
            for k, stage in enumerate(plan.stages)]


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a last line that an interruption cut short is left out.

    Raises:
        UserError: it holds something else.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        if not all("epoch" in row for row in rows):
            raise ValueError("a row without an epoch")
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {one_line(error)}; restore it, or train anew with --overwrite") from error
    return rows


def read_result(run: Path) -> dict[str, Any] | None:
    """What `result.json` holds; None where there is none, as the run is not finished. Raises UserError."""
    path = run / "result.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {one_line(error)}; restore it, or delete it") from error


def notes_on_rows(run: Path, epochs_done: int) -> list[str]:
    """What a user may want to know of the rows of the first so many epochs. Raises UserError, as `read_rows` does."""
    missing = sorted(set(range(1, epochs_done + 1)) - {row["epoch"] for row in read_rows(run)})
    if not missing:
        return []
    more = f" and {len(missing) - 1} more" if missing[1:] else ""
    return [f"{run / 'metrics.jsonl'}: holds no rows of epoch {missing[0]}{more}, which the checkpoint has behind it; "
            "the run goes on without them"]


def run_line(plan: Plan, device: torch.device, engine: str) -> str:
    """What is about to be trained, on one line."""
    config, data = plan.config, plan.data
    parameters = [*plan.model.parameters()]
    count, frozen = (sum(p.numel() for p in chosen) for chosen in
                     (parameters, [p for p in parameters if not p.requires_grad]))
    replicas = f", {config.train.replicas} replicas" if config.train.replicas > 1 else ""
    values = prod(data.target_shape)
    targets = f"{data.classes} classes" if data.labelled else f"{values} value{'s' * (values > 1)} a target"
    where = f"one process on {device}" if engine == "local" else f"{config.processes} processes on {device.type}"
    return (f"{config.method.name} in {stages_text(len(plan.stages))}{replicas}, {where}: "
            f"{count:,} parameters{f', {frozen:,} of them frozen' if frozen else ''}; {data.train_samples:,} training "
            f"and {data.test_samples:,} {config.data.evaluated} samples of {list(data.shape)}, {targets}; "
            f"{len(plan.step_sizes)} steps an epoch")


def epoch_line(epoch: Epoch, plan: Plan) -> str:
    """One epoch on one line."""
    assert epoch.reports is not None
    config, last = plan.config, epoch.reports[-1]
    tested = f"accuracy by stage {' '.join(percent(report.val_accuracy) for report in epoch.reports)}"
    if last.val_accuracy is None and last.val_loss is not None:  # of values
        tested = f"loss by stage {' '.join(_loss(report.val_loss) for report in epoch.reports)}"
    return (f"epoch {epoch.index + 1}/{config.train.epochs}  train loss {_loss(last.train_loss)}  "
            f"{config.data.evaluated} {tested}  {plan.samples_per_epoch / last.train_seconds:,.0f} samples/s")


def _loss(value: float | None) -> str:
    """A dash where there is none, as where every step was skipped."""
    return "–" if value is None else f"{value:.4f}"


def evaluation_table(stages: list[dict[str, Any]]) -> str:
    """A table with a row a stage: the loss and the accuracy of its head."""
    rows = [("stage", "blocks", "parameters", "loss", "accuracy")]
    for number, stage in enumerate(stages, start=1):
        rows.append((str(number), blocks_text(stage["blocks"]), f"{stage['params']:,}", _loss(stage["loss"]),
                     percent(stage["accuracy"])))
    return table(rows, left=[1])


def stage_table(result: dict[str, Any]) -> str:
    """A table with a row a stage, from a result; of values, with losses in place of accuracies."""
    valued = result["val_accuracy"] is None and result["val_loss"] is not None
    tested = [*map(_loss, result["stage_val_loss"])] if valued else [*map(percent, result["stage_val_accuracy"])]
    rows = [("stage", "blocks", "parameters", "loss" if valued else "accuracy", "busy", "waiting")]
    for number, (stage, found) in enumerate(zip(result["stages"], tested, strict=True), start=1):
        busy, wait = stage.get("busy_seconds"), stage.get("wait_seconds")
        total = None if busy is None or wait is None else busy + wait
        rows.append((str(number), blocks_text(stage["blocks"]), f"{stage['params']:,}", found,
                     percent(busy / total if total else None), percent(wait / total if total else None)))
    return table(rows, left=[1])
