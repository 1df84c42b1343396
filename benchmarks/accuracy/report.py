"""The table: a line for each combination, with what it is compared with."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from benchmarks.accuracy.sweep import Combination, SweepConfig, plain, short
from benchmarks.markdown import table
from blpipe.config import Config
from blpipe.text import human_bytes

Row = dict[str, Any]  # of results.jsonl
Results = dict[tuple[str, str], Row]  # by engine and id

DASH = "–"


@dataclass(frozen=True)
class Line:
    """A line of the table: the finished rows of a combination by seed, and those of what it is compared with.

    Differences are taken over the seeds that both sides have finished.
    """

    combination: Combination
    stages: int
    rows: dict[int, Row]
    greedy: dict[int, Row]
    bp: dict[int, Row]
    reference: dict[int, Row]

    @property
    def accuracies(self) -> list[float]:
        """Of the finished seeds."""
        return [row["val_accuracy"] for row in self.rows.values()]

    @property
    def accuracy(self) -> float | None:
        """Their mean."""
        return mean(self.accuracies) if self.rows else None

    @property
    def deviation(self) -> float | None:
        """Their sample standard deviation."""
        return stdev(self.accuracies) if len(self.rows) > 1 else None

    @property
    def over_greedy(self) -> float | None:
        """Mean accuracy less that of greedy at the same K."""
        return _mean_difference(self.rows, self.greedy, self.rows.keys() & self.greedy.keys())

    @property
    def closed(self) -> float | None:
        """The share of the distance from greedy to bp that the combination has closed; None where bp is no better."""
        seeds = self.rows.keys() & self.greedy.keys() & self.bp.keys()
        gained = _mean_difference(self.rows, self.greedy, seeds)
        distance = _mean_difference(self.bp, self.greedy, seeds)
        return gained / distance if gained is not None and distance is not None and distance > 0 else None

    @property
    def seconds(self) -> float | None:
        """Median seconds of training per epoch."""
        return median(row["seconds_per_epoch"] for row in self.rows.values()) if self.rows else None

    @property
    def cost(self) -> float | None:
        """Median seconds per epoch over those of the reference, measured on the same device in the same way."""
        mine, other = _seconds_by_device(self.rows), _seconds_by_device(self.reference)
        return next((median(mine[key]) / median(other[key]) for key in mine if key in other), None)

    @property
    def memory(self) -> float | None:
        """Median peak memory, in bytes."""
        return median(row["peak_memory_bytes"] for row in self.rows.values()) if self.rows else None


def _mean_difference(one: dict[int, Row], other: dict[int, Row], seeds: Iterable[int]) -> float | None:
    found = [one[seed]["val_accuracy"] - other[seed]["val_accuracy"] for seed in seeds]
    return mean(found) if found else None


def _seconds_by_device(rows: dict[int, Row]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows.values():
        found.setdefault(json.dumps(row["device"], sort_keys=True), []).append(row["seconds_per_epoch"])
    return found


def make_lines(sweep: SweepConfig, combinations: Sequence[Combination], results: Results) -> list[Line]:
    """The lines of the table: by model, data and training in the order of the file, by K, by the order of the file.

    `bp` does not depend on K: it has a line at each.
    """
    lines = []
    for context in dict.fromkeys(map(context_of, combinations)):
        rows = [row for row in combinations if context_of(row) == context]
        for stages in sorted({stages_of(row) for row in rows}):
            lines += _lines_at(stages, sweep, rows, results)
    return lines


def _lines_at(stages: int, sweep: SweepConfig, rows: list[Combination], results: Results) -> list[Line]:
    here = [row for row in rows if stages_of(row) == stages]
    own_bp = any(method_of(row) == "bp" for row in here)
    any_bp = sorted((row for row in rows if method_of(row) == "bp"),
                    key=lambda row: (not _finished(row, results), stages_of(row) != stages))
    greedy = [row for row in here if method_of(row) == "greedy"]
    reference = [row for row in here if row.group == sweep.cost_reference
                 or (sweep.cost_reference is None and method_of(row) == "backlink")]
    shown = [row for row in rows if row in here or (not own_bp and row in any_bp[:1])]
    others = [_finished(found[0], results) if found else {} for found in (greedy, any_bp, reference)]
    return [Line(row, stages, _finished(row, results), *others) for row in shown]


def _finished(row: Combination, results: Results) -> dict[int, Row]:
    return {run.seed: results["local", run.id] for run in row.runs if ("local", run.id) in results}


def context_of(row: Combination) -> str:
    """Stands for all that rows which are compared have in common: model, data and training."""
    return json.dumps(row.config.model_dump(exclude={"name", "seed", "method", "partition", "runtime", "checkpoint"}),
                      sort_keys=True)


def stages_of(row: Combination) -> int:
    """K."""
    return row.config.partition.stage_count


def method_of(row: Combination) -> str:
    """bp, greedy or backlink."""
    return row.config.method.name


def varied(combinations: Sequence[Combination]) -> list[str]:
    """The keys, but K and the method's name, in which rows differ that heed them."""
    keys = dict.fromkeys(key for row in combinations for key in row.settings)
    return [key for key in keys if key not in ("partition.stages", "method.name")
            and len({setting(row.config, key) for row in combinations} - {DASH}) > 1]


def setting(config: Config, key: str) -> str:
    """The value of a config's key, as tables show it; a dash where the method does not heed it."""
    method = config.method.name
    ignored = {"bp": ("method.link", "method.head", "method.local_weight"), "greedy": ("method.link",)}
    if key.startswith(ignored.get(method, ())):
        return DASH
    value = _at(config.model_dump(exclude_defaults=True), key)
    value = _at(config.model_dump(), key) if value is None else value
    return DASH if value is None else plain(value)


def _at(tree: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def context_keys(combinations: Sequence[Combination]) -> list[str]:
    """The varied keys of model, data and training, by which rows part that are not compared."""
    return [key for key in varied(combinations) if not key.startswith(("method.", "partition."))]


def as_markdown(sweep: SweepConfig, combinations: Sequence[Combination], results: Results) -> str:
    """The table, and what its figures come from."""
    context = context_keys(combinations)
    keys = [*context, "partition.stages", *(key for key in varied(combinations) if key not in context)]
    head = ["", *map(short, keys), "accuracy, %", "seeds", "over greedy", "closed", "s/epoch", "cost", "peak memory"]
    rows = [head, *(_cells(line, keys) for line in make_lines(sweep, combinations, results))]
    notes = [*_notes(combinations, results),
             f"cost 1 is the first {sweep.cost_reference or 'BackLink'} row at the same K"]
    return "\n".join([table(rows), "", *(f"- {note}" for note in notes)]) + "\n"


def _cells(line: Line, keys: Sequence[str]) -> list[str]:
    config, wanted = line.combination.config, len(line.combination.runs)
    settings = [str(line.stages) if key == "partition.stages" else setting(config, key) for key in keys]
    spread = "" if line.deviation is None else f" ± {100 * line.deviation:.2f}"
    return [line.combination.group, *settings,
            "pending" if line.accuracy is None else f"{100 * line.accuracy:.2f}{spread}",
            str(wanted) if len(line.rows) == wanted else f"{len(line.rows)} of {wanted}",
            _cell(line.over_greedy, lambda share: f"{100 * share:+.2f}"),
            _cell(line.closed, lambda share: f"{100 * share:.0f} %"),
            _cell(line.seconds, lambda seconds: f"{seconds:.3g}"),
            _cell(line.cost, lambda ratio: f"{ratio:.2f}"),
            _cell(line.memory, human_bytes)]


def _cell(value: float | None, text: Any) -> str:
    return DASH if value is None else text(value)


def _notes(combinations: Sequence[Combination], results: Results) -> list[str]:
    ids = list(dict.fromkeys(run.id for row in combinations for run in row.runs))
    rows = [results["local", name] for name in ids if ("local", name) in results]
    notes = [f"{len(rows)} of {len(ids)} runs done" + (f", {len(ids) - len(rows)} pending" if len(ids) > len(rows)
                                                       else "")]
    for title, values in (("devices", [_device(row) for row in rows]), ("versions", [_versions(row) for row in rows]),
                          ("commits", [row["commit"] for row in rows])):
        if values:
            notes.append(f"{title}: {'; '.join(dict.fromkeys(values))}")
    return notes + _engines(ids, results)


def _device(row: Row) -> str:
    device = row["device"]
    more = [f"{key} {device[key]}" for key in ("threads", "jobs") if device.get(key)]
    return ", ".join([device["name"], f"{device['cores']} cores", *more])


def _versions(row: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in row["versions"].items())


def _engines(ids: Sequence[str], results: Results) -> list[str]:
    """Which runs were done in the pipeline engine too, and whether the accuracies of all stages are the same."""
    both = [name for name in ids if ("pipeline", name) in results and ("local", name) in results]
    alike = {name: results["pipeline", name]["stage_val_accuracy"] == results["local", name]["stage_val_accuracy"]
             for name in both}
    return [f"in the pipeline engine too, {what}: {'; '.join(results['local', name]['name'] for name in names)}"
            for what, names in (("with the same accuracy at every stage", [name for name in both if alike[name]]),
                                ("with other accuracies", [name for name in both if not alike[name]])) if names]
