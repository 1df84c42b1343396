"""The plot: peak memory against K, in one process and in the largest stage."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.memory.cases import Size
from benchmarks.memory.report import TITLES

NAME = "memory_by_k.png"
_COLOURS = ["#4c78a8", "#f2a33c", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#bab0ac"]
_MARKERS = "osD^vP*X<>"
_GIB = [0.125, 0.25, 0.5, 1, 2, 4, 8]


def draw(rows: Sequence[dict[str, Any]], size: Size, folder: Path) -> str:
    """Draw the even cut of all parts into `folder`; returns what was done."""
    panels = {title: _series(rows, part, size) for part, title in TITLES.items()}
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        return f"{NAME}: not drawn, nothing was measured"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: it needs matplotlib; run `pip install matplotlib`"
    figure = Figure(figsize=(6 * len(panels), 6), layout="constrained")
    styles: dict[str, dict[str, Any]] = {}
    for axis, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for method, points in series.items():
            number = len(styles)
            style = styles.setdefault(method, {"color": _COLOURS[number % len(_COLOURS)],
                                               "marker": _MARKERS[number % len(_MARKERS)],
                                               "linestyle": "--" if method.startswith("bp") else "-"})
            axis.plot(points.keys(), [peak / 2**30 for peak in points.values()], label=method, **style)
        axis.set(title=fill(title, 45), xlabel="K, number of stages", ylabel="peak memory, GiB", xscale="log",
                 yscale="log")
        axis.set_xticks(size.stages, map(str, size.stages))
        axis.minorticks_off()
        axis.set_yticks(_GIB, map(str, _GIB))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / NAME, dpi=110)
    return f"{NAME}: drawn"


def _series(rows: Sequence[dict[str, Any]], part: str, size: Size) -> dict[str, dict[int, int]]:
    """Peaks by method and K; links longer than 1, which the largest K alone has, are left out."""
    found: dict[str, dict[int, int]] = {}
    for row in rows:
        if (row["part"], row["cut"]) == (part, "even") and size.has(row):
            everywhere = row["stages"] == 1 and part == "local"  # it does not depend on K
            for count in size.stages if everywhere else [row["stages"]]:
                found.setdefault(row["method"], {})[count] = row["peak_bytes"]
    kept = {method: points for method, points in found.items() if len(points) > 1 or len(size.stages) == 1}
    return {method: dict(sorted(points.items())) for method, points in kept.items()}
