"""The curves of a scaling: lines predicted, marks measured."""

from pathlib import Path
from typing import Any

from benchmarks.scaling.report import PREDICTED

_COLOURS = ("#59a14f", "#9c755f", "#76b7b2", "#1b7837", "#8cd17d", "#4c78a8", "#b07aa1", "#d37295", "#79706e",
            "#bab0ac", "#f2a33c", "#e15759")


def draw(found: dict[str, Any], path: Path) -> str:
    """Draw it, and say so, or why not."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: it needs matplotlib; run `pip install matplotlib`"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    counts = sorted(map(int, found["predicted"]))
    for method, colour in zip(PREDICTED, _COLOURS, strict=True):
        lines = {kind: _line(found[kind], method) for kind in ("predicted", "measured")}
        if lines["predicted"][0]:
            axes.plot(*lines["predicted"], color=colour, label=method)
        axes.plot(*lines["measured"], color=colour, marker="o", linestyle="none")
    axes.plot(counts, counts, color="grey", linestyle=":", label="one for each device")
    axes.plot([], [], color="black", marker="o", linestyle="none", label="measured")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(title=f"{found['case']}, batches of {found['batch']}, M = {found['microbatches']}",
             xlabel="K, stages and devices", ylabel="times one device")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return f"{path.name}: drawn"


def _line(rows: dict[str, dict[str, float]], method: str) -> tuple[list[int], list[float]]:
    """The numbers of stages, and the speed over one device's."""
    one = rows["1"]["one device"]
    counts = [count for count in sorted(map(int, rows)) if method in rows[str(count)]]
    return counts, [rows[str(count)][method] / one for count in counts]
