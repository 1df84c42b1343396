"""What several runs came to, side by side, and the keys in which they differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blpipe.errors import UserError, printable
from blpipe.metrics import read_result, read_rows
from blpipe.resume import config_of_run
from blpipe.text import human_bytes, human_seconds, percent, table

_EACH_ITS_OWN = ("name", "runtime.runs")


@dataclass(frozen=True)
class RunFigures:
    """What one run has come to, by its `metrics.jsonl`; None where no epoch is done, or evaluated.

    val_loss, val_accuracy: of the model, when it was last evaluated; the latter 0…1, and None for values.
    samples_per_second, train_seconds: of all epochs done, without evaluations.
    peak_memory_bytes: of the process that needed most, in the last epoch.
    ended_by: what ended it; None where it is not finished, or was by an earlier version of blpipe.
    """

    run: str
    epochs_done: int
    epochs: int
    val_loss: float | None
    val_accuracy: float | None
    samples_per_second: float | None
    train_seconds: float | None
    peak_memory_bytes: int | None
    ended_by: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Of several runs: their figures, and the value that each has of every key in which they differ."""

    runs: list[RunFigures]
    differences: dict[str, list[Any]]

    def as_json(self) -> dict[str, Any]:
        """A dictionary that `json` can write."""
        return asdict(self)

    def as_text(self) -> str:
        """Two tables: a row a run, and a row a key."""
        header = ("run", "epochs", "loss", "accuracy", "samples/s", "× first", "training", "memory")
        rows = [header, *(_row(run, self.runs[0]) for run in self.runs)]
        keys = [[key, *(printable(str(value), 40) for value in values)] for key, values in self.differences.items()]
        if not keys:
            return table(rows, left=[0])
        keys = [["differs", *(run.run for run in self.runs)], *keys]
        return f"{table(rows, left=[0])}\n\n{table(keys, left=range(len(keys[0])))}"


def compare(runs: Sequence[Path]) -> Comparison:
    """Look at these run folders, or where none is given at all in `runs/`. Raises UserError where there is none."""
    folders = list(runs) or sorted(path.parent for path in Path("runs").glob("*/config.yaml"))
    if not folders:
        raise UserError("RUN: which runs? there are none in runs/; give their folders")
    trees = [dict(_flat(config_of_run(folder).model_dump())) for folder in folders]
    return Comparison([_figures(*pair) for pair in zip(folders, trees, strict=True)], _differences(trees))


def _figures(run: Path, keys: Mapping[str, Any]) -> RunFigures:
    rows = read_rows(run)
    first = [row for row in rows if row["stage"] == 1]
    seconds = sum(row["train_seconds"] for row in first) or None
    samples = sum(row["samples_per_second"] * row["train_seconds"] for row in first)
    of_model = {row["epoch"]: row for row in rows}  # the last row of an epoch is the last stage's
    evaluated = [row for row in of_model.values() if row["val_loss"] is not None]
    loss, accuracy = (evaluated[-1][key] if evaluated else None for key in ("val_loss", "val_accuracy"))
    done = max(of_model, default=0)
    return RunFigures(str(run), done, keys["train.epochs"], loss, accuracy,
                      samples / seconds if seconds else None, seconds,
                      max((row["peak_memory_bytes"] for row in rows if row["epoch"] == done), default=None),
                      (read_result(run) or {}).get("ended_by"))


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield path + name, value


def _differences(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    values = {key: [tree.get(key) for tree in trees] for tree in trees for key in tree if key not in _EACH_ITS_OWN}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def _row(run: RunFigures, first: RunFigures) -> tuple[str, ...]:
    speed, memory, seconds = run.samples_per_second, run.peak_memory_bytes, run.train_seconds
    ratio = f"{speed / first.samples_per_second:.2f}" if speed and first.samples_per_second else "–"
    early = " ended" if run.ended_by is not None and run.epochs_done < run.epochs else ""
    return (run.run, f"{run.epochs_done}/{run.epochs}{early}", "–" if run.val_loss is None else f"{run.val_loss:.4f}",
            percent(run.val_accuracy), f"{speed:,.0f}" if speed else "–", ratio,
            human_seconds(seconds) if seconds else "–", human_bytes(memory) if memory is not None else "–")
