"""The plot: peak memory against K, in one process and in the largest stage."""

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.memory.cases import Size
from benchmarks.memory.report import TITLES

NAME = "memory_by_k.png"
_COLOURS = {"bp": "#222222", "greedy": "#59a14f", "BackLink, length 1, d = 0": "#4c78a8",
            "BackLink, length 1, d = 1": "#76b7b2", "joint, d = 0": "#f2a33c", "joint, d = 1/M": "#f2a33c",
            "last loss, d = 1": "#e15759", "last loss, d = 1/M": "#e15759"}
"""Of the methods that are drawn."""
_GIB = [2.0**power for power in range(-4, 6)]

Points = dict[int, int]


def draw(rows: Sequence[dict[str, Any]], size: Size, folder: Path) -> str:
    """Draw the even cut of all parts into `folder`; returns what was done."""
    panels = {title: _curves(rows, part, size) for part, title in TITLES.items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return f"{NAME}: not drawn, nothing was measured"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: it needs matplotlib; run `pip install matplotlib`"
    figure = Figure(figsize=(4.5 * len(panels), 5.5), layout="constrained")
    lines: dict[str, Any] = {}
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items(),
                                     strict=True):
        for (method, leanest), points in curves.items():
            label = f"{method}, the leanest recomputing" if leanest else method
            lines[label], = axis.plot(points.keys(), [peak / 2**30 for peak in points.values()], marker="o",
                                      markersize=4, color=_COLOURS[method], linestyle="--" if leanest else "-")
        axis.set(title=fill(title, 40), xlabel="K, number of stages", xscale="log", yscale="log")
        axis.set_xticks(size.stages, map(str, size.stages))
        axis.minorticks_off()
        axis.set_yticks(_GIB, [f"{gib:g}" for gib in _GIB])
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("peak memory, GiB")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / NAME, dpi=110)
    return f"{NAME}: drawn"


def _curves(rows: Sequence[dict[str, Any]], part: str, size: Size) -> dict[tuple[str, bool], Points]:
    """Peaks by K, of each method as it is, and of the leanest of those that run something again."""
    curves: dict[tuple[str, bool], Points] = {(method, again): {} for method in _COLOURS for again in (False, True)}
    for row in rows:
        method = re.sub(", (checkpoint|recompute|blocks recomputed).*", "", row["method"])
        if (row["part"], row["cut"]) != (part, "even") or not size.has(row) or method not in _COLOURS:
            continue
        points = curves[method, method != row["method"]]
        everywhere = row["stages"] == 1 and part == "local"  # it does not depend on K
        for count in size.stages if everywhere else [row["stages"]]:
            points[count] = min(points.get(count, row["peak_bytes"]), row["peak_bytes"])
    return {key: dict(sorted(points.items())) for key, points in curves.items() if points}
