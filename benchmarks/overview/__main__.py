"""The picture at the top of the README, from the results that the other benchmarks have committed."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.accuracy.execute import read_results
from benchmarks.accuracy.sweep import Combination, load_sweep
from benchmarks.command import guarded
from benchmarks.memory.results import Results
from benchmarks.throughput.report import ratio
from blpipe.errors import UserError

BENCHMARKS = Path(__file__).parent.parent
COLOURS = {"greedy": "#59a14f", "BackLink": "#4c78a8", "BackLink, larger heads": "#9ecae9",
           "the last loss, late": "#e15759", "backpropagation": "#222222", "1F1B": "#222222"}

Settings = dict[str, Any]

LATE, LARGE = {"method.link.delay": 1}, {"method.head": "blocks"}
WHOLE = {"method.link.length": "all"}
LAST = {"train.microbatches": 4, "method.local_weight": 0.0, "method.link.take": "farthest",
        "method.link.reach": "all", "method.link.delay_unit": "microbatch"}
GREEDY, BP = {"method.name": "greedy"}, {"method.name": "bp"}
ACCURACY: dict[str, tuple[str, int, Sequence[Settings]]] = {
    "ResNet-14\n7 stages": ("cpu", 7, (GREEDY, LATE, LATE | LARGE, LAST, BP)),
    "ResNet-14\n4 stages": ("cpu", 4, (GREEDY, LATE | WHOLE, LATE | LARGE | WHOLE, LAST | WHOLE, BP)),
    "ResNet-32\n16 stages": ("gpu_short", 16, (GREEDY, LATE, LATE | LARGE, LAST | WHOLE, BP)),
}
"""By what is trained: the sweep, K, and the settings of a row for each of the first five of `COLOURS`."""

NETWORKS = {"ViT, 12 layers": "ViT", "ViT, 12 layers in halves": "ViT,\nhalf-layers", "ResNet-20, width 2": "ResNet-20",
            "ResNet-110": "ResNet-110", "VGG-11, 4096 hidden": "VGG-11"}
SPEED = {"BackLink, a batch late": ("BackLink d=1", COLOURS["BackLink"]),
         "the last loss, a microbatch late": ("last loss d=1/M", COLOURS["the last loss, late"]),
         "DDP": ("DDP", "#bab0ac")}
MEMORY = {"1F1B": ("bp", COLOURS["1F1B"]),
          "the last loss, a microbatch late": ("last loss, d = 1/M", COLOURS["the last loss, late"]),
          "BackLink, a microbatch late": ("BackLink, length 1, d = 1/M", COLOURS["BackLink"])}


def main() -> int:
    """Draw the picture."""
    return guarded("overview", _main, "nothing is written")


def _main() -> int:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("it needs matplotlib; run `pip install matplotlib`") from error
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    accuracy, speed, memory = figure.subplots(1, 3)
    _draw_accuracy(accuracy)
    _draw_speed(speed)
    _draw_memory(memory)
    for axis in (accuracy, speed, memory):
        axis.spines[["top", "right"]].set_visible(False)
    path = BENCHMARKS / "overview" / "overview.png"
    figure.savefig(path, dpi=110)
    print(f"{path.name}: drawn")
    return 0


def _draw_accuracy(axis: Any) -> None:
    found = {name: accuracies(*rows) for name, rows in ACCURACY.items()}
    for number, (name, colour) in enumerate(list(COLOURS.items())[:5]):
        places = [place + 0.15 * (number - 2) for place in range(len(found))]
        values = [100 * each[number] for each in found.values()]
        axis.plot(places, values, "o", color=colour, label=name)
        for place, value in zip(places, values, strict=True):
            axis.annotate(f"{value:.0f}", (place, value), (0, 5), textcoords="offset points", ha="center", fontsize=8)
    axis.set_xticks(range(len(found)), found)
    axis.set(title="accuracy on CIFAR-10, %", xlim=(-0.5, 2.5), ylim=(55, 95))
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_speed(axis: Any) -> None:
    for number, (label, (method, colour)) in enumerate(SPEED.items()):
        places = [place + 0.28 * (number - 1) for place in range(len(NETWORKS))]
        values = speeds(method)
        axis.bar(places, values, 0.26, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            axis.annotate(f"{value:.2f}", (place, value), (0, 2), textcoords="offset points", ha="center", fontsize=6.5)
    axis.axhline(1.0, color=COLOURS["1F1B"], linestyle="--", label="1F1B, over its own best cuts")
    axis.set_xticks(range(len(NETWORKS)), NETWORKS.values(), fontsize=8)
    axis.set(title="speed over 1F1B's, two processes on a CPU", ylim=(0, 2))
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_memory(axis: Any) -> None:
    for label, (method, colour) in MEMORY.items():
        for again, style in ((False, "-"), (True, "--")):
            peaks = peaks_by_k("microbatches", method, again)
            axis.plot(peaks.keys(), [peak / 2**30 for peak in peaks.values()], style, color=colour, marker="o",
                      markersize=4, label=f"{label}, recomputed" if again else label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(list(peaks), map(str, peaks))
    ticks = [2.0**power for power in range(-5, 4)]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set(title="memory of the largest stage, GiB", xlabel="stages of ResNet-110, and microbatches a batch",
             ylim=(0.02, 8.5))
    axis.legend(frameon=False, fontsize=8, loc="lower left")


def accuracies(sweep: str, stages: int, rows: Sequence[Settings]) -> list[float]:
    """Means over seeds, for each of these settings at so many stages; `bp` does not depend on them."""
    _, combinations = load_sweep(BENCHMARKS / f"accuracy/{sweep}.yaml")
    results = read_results(BENCHMARKS / f"accuracy/results/{sweep}/results.jsonl")
    found = []
    for settings in rows:
        runs = next(row.runs for row in combinations if _is(row, settings, stages))
        found.append(mean(results["local", run.id]["val_accuracy"] for run in runs))
    return found


def _is(row: Combination, settings: Settings, stages: int) -> bool:
    at = row.settings["partition.stages"]
    return row.settings == settings | {"partition.stages": at} and (at == stages or settings == BP)


def speeds(method: str) -> list[float | None]:
    """Over 1F1B's with its own cuts, on each of the networks."""
    cases = json.loads((BENCHMARKS / "throughput/results/amd-epyc-2-cores/k2.json").read_text())
    return [ratio(cases[name], method, "1F1B, own cuts") for name in NETWORKS]


def peaks_by_k(part: str, method: str, again: bool) -> dict[int, int]:
    """Peak bytes of the largest stage by K: with nothing recomputed, or of the leanest way to.

    Args:
        part: "microbatches", of which a batch has K, or "pipeline", with whole batches.
    """
    peaks: dict[int, int] = {}
    for row in Results(BENCHMARKS / "memory/results/cpu/results.jsonl", {}).rows:
        if (row["part"], row["cut"]) == (part, "even") and row["method"].startswith(method):
            rest = row["method"].removeprefix(method)
            if rest.startswith(", ") if again else not rest:
                peaks[row["stages"]] = min(peaks.get(row["stages"], row["peak_bytes"]), row["peak_bytes"])
    return dict(sorted(peaks.items()))


if __name__ == "__main__":
    sys.exit(main())
