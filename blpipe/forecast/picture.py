"""The picture of a plan: its simulated timeline, and its scaling curve."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blpipe.errors import UserError
from blpipe.forecast.baselines import Backward
from blpipe.forecast.forecast import MethodForecast
from blpipe.forecast.report import Report
from blpipe.program import Kind
from blpipe.trace import Span

_COLOURS = {Kind.FORWARD: "#4c78a8", Kind.LOCAL_BACKWARD: "#f2a33c", Kind.LINK_BACKWARD: "#59a14f",
            Backward.FULL: "#f2a33c", Kind.ALL_REDUCE: "#b07aa1", Kind.STEP: "#555555"}  # of the config's method
_MOST_ROWS = 64  # stages drawn; more would not be told apart


def draw(report: Report, out: Path) -> None:
    """Write the picture to `out`, in the format that its ending names.

    Raises:
        UserError: matplotlib is missing, or `out` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--out: a picture needs matplotlib; run `pip install matplotlib`") from None
    stages = min(len(report.stages), _MOST_ROWS)
    rows = 2 if report.sweep else 1
    figure = Figure(figsize=(10, max(2.4, 0.8 + 0.32 * stages) + 4 * (rows - 1)), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, height_ratios=[max(2.4, 0.8 + 0.32 * stages), 4][:rows])[:, 0]
    _timeline(axes[0], report, stages)
    if report.sweep:
        _scaling(axes[1], report.sweep, report.plan.config.train.replicas)
    try:
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"--out: cannot write {out}: {error}") from error


def _timeline(axes: Any, report: Report, stages: int) -> None:
    config = report.plan.config
    colours = {kind: colour for kind, colour in _COLOURS.items()
               if any(span.op.kind is kind for span in report.timeline.spans)}
    for kind, colour in colours.items():
        for k in range(stages):
            spans = [span for span in report.timeline.spans if span.stage == k and span.op.kind is kind]
            axes.broken_barh([_bar(span) for span in spans], (k - 0.4, 0.8), color=colour, edgecolor="white",
                             linewidth=0.4, label=kind.value if k == 0 and spans else None)
    axes.set_yticks(range(stages), [str(k + 1) for k in range(stages)])
    axes.invert_yaxis()
    axes.set(title=f"{config.name}: the first steps, simulated", xlabel="milliseconds", ylabel="stage")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=len(colours), frameon=False)


def _bar(span: Span) -> tuple[float, float]:
    return 1000 * span.start, 1000 * (span.end - span.start)


def _scaling(axes: Any, sweep: Sequence[MethodForecast], replicas: int) -> None:
    one = [row for row in sweep if row.method == "one device"][:1]
    for name in dict.fromkeys(row.method for row in sweep if row.stages > 1):
        rows = [*one, *(row for row in sweep if row.method == name)]
        axes.plot([row.stages for row in rows], [row.speedup for row in rows], marker="o", markersize=3, label=name)
    counts = sorted({row.stages for row in sweep})
    axes.plot(counts, [replicas * count for count in counts], color="grey", linestyle=":", label="one for each device")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(title="predicted throughput", xlabel="stages", ylabel="times one device")
    axes.legend(frameon=False)
