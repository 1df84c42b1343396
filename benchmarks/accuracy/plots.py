"""The plots: accuracy against K, against the delay, and against cost. One panel where rows cannot share one."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from math import nan
from pathlib import Path
from typing import Any

from benchmarks.accuracy.report import DASH, Line, context_keys, method_of, setting, varied
from benchmarks.accuracy.sweep import short

_COLOURS = ["#4c78a8", "#f2a33c", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#bab0ac"]
_MARKERS = "osD^vP*X<>"
_DASHES = ["-", "--", "-.", ":"]
_COLUMNS = 3  # panels side by side
_BASELINES = {"bp": ("#333333", "--"), "greedy": ("#888888", ":")}

Panels = dict[str, list[Line]]  # by title
Series = dict[str, list[Line]]  # by label
Style = dict[str, Any]  # what matplotlib calls the properties of a line


def draw(lines: Sequence[Line], out: Path) -> list[str]:
    """Draw what there are data for into `out`; returns what was drawn, and what not."""
    plots: list[tuple[str, Callable[[Sequence[Line]], Any], str]] = [
        ("accuracy_by_k.png", _by_stages, "no row has finished at two values of K"),
        ("accuracy_by_delay.png", _by_delay, "no row has finished at two delays"),
        ("accuracy_by_cost.png", _by_cost, "no row has finished beside the reference of its cost")]
    said = []
    for name, plot, missing in plots:
        try:
            figure = plot(lines)
        except ImportError:
            return ["no plots: they need matplotlib; run `pip install matplotlib`"]
        if figure is not None:
            figure.savefig(out / name, dpi=130)
        else:
            (out / name).unlink(missing_ok=True)  # of other rows
        said.append(f"{name}: {'drawn' if figure is not None else f'not drawn, {missing}'}")
    return said


def _by_stages(lines: Sequence[Line]) -> Any:
    """A line for each group and setting, over K."""
    def series(here: Sequence[Line]) -> Series:
        found = _long(_series(here, lines), _stages)
        return found if any(method_of(line.combination) != "bp" for line, *_ in found.values()) else {}  # bp has no K

    panels = {title: here for title, here in _panels(lines, lines, lambda line: "").items() if series(here)}
    figure, axes = _figure(panels, "K, number of stages")
    styles = _styles(series(lines))
    for title, axis in axes.items():
        axis.set_xscale("log", base=2)
        _curves(axis, series(panels[title]), _stages, styles)
    return _with_legend(figure, axes)


def _by_delay(lines: Sequence[Line]) -> Any:
    """A line for each BackLink group and setting, over the delay; greedy and bp across."""
    def series(here: Sequence[Line]) -> Series:
        linked = [line for line in here if method_of(line.combination) == "backlink"]
        return _long(_series(linked, lines, "method.link.delay"), _delay)

    panels = {title: here for title, here in _panels(lines, lines, _stages_title).items() if series(here)}
    figure, axes = _figure(panels, "d, delay of the link in steps")
    styles = _styles(series(lines))
    for title, axis in axes.items():
        _curves(axis, series(panels[title]), _delay, styles)
        _baselines(axis, panels[title])
    return _with_legend(figure, axes)


def _by_cost(lines: Sequence[Line]) -> Any:
    """A point for each row, over its seconds per epoch relative to the reference's."""
    done = [line for line in lines if line.cost is not None]
    panels = {title: here for title, here in _panels(done, lines, _stages_title).items() if len(here) > 1}
    figure, axes = _figure(panels, "cost: seconds per epoch, relative")
    styles = _styles(_series(done, lines))
    for title, axis in axes.items():
        for label, same in _series(panels[title], lines).items():
            _curve(axis, label, [line.cost for line in same], same, styles[label] | {"linestyle": "none"})
    return _with_legend(figure, axes)


def _stages(line: Line) -> int:
    return line.stages


def _delay(line: Line) -> int:
    return line.combination.config.method.link.delay


def _stages_title(line: Line) -> str:
    return f"K = {line.stages}"


def _panels(here: Iterable[Line], every: Sequence[Line], more: Callable[[Line], str]) -> Panels:
    """Lines by the title of their panel: of one model, data and training, and as `more` says."""
    found: Panels = {}
    keys = context_keys([line.combination for line in every])
    for line in here:
        config = line.combination.config
        title = [f"{short(key)} {setting(config, key)}" for key in keys] + [more(line)]
        found.setdefault(", ".join(filter(None, title)), []).append(line)
    return found


def _series(here: Iterable[Line], every: Sequence[Line], without: str = "") -> Series:
    """Lines by their label: the group, and the settings in which its rows differ, but K and `without`."""
    left_out = {*context_keys([line.combination for line in every]), "partition.cuts", without}
    found: Series = {}
    for line in here:
        group = [other.combination for other in every if other.combination.group == line.combination.group]
        keys = [key for key in varied(group) if key not in left_out]
        config = line.combination.config
        label = [line.combination.group, *(f"{short(key)} {setting(config, key)}" for key in keys
                                           if setting(config, key) != DASH)]
        found.setdefault(", ".join(label), []).append(line)
    return found


def _long(series: Series, place: Callable[[Line], int]) -> Series:
    """Those that have finished rows at two places or more."""
    return {label: same for label, same in series.items() if len({place(line) for line in same if line.rows}) > 1}


def _styles(series: Series) -> dict[str, Style]:
    """How each label is drawn: a colour for each group, a marker and dashes for each of its settings."""
    groups = dict.fromkeys(line.combination.group for (line, *_) in series.values()
                           if method_of(line.combination) not in _BASELINES)
    colours = dict(zip(groups, cycle(_COLOURS), strict=False))
    seen: Counter[str] = Counter()
    styles = {}
    for label, (line, *_) in series.items():
        group, method = line.combination.group, method_of(line.combination)
        styles[label] = {"color": _BASELINES[method][0] if method in _BASELINES else colours[group],
                         "marker": _MARKERS[seen[group] % len(_MARKERS)],
                         "linestyle": _DASHES[seen[group] % len(_DASHES)]}
        seen[group] += 1
    return styles


def _figure(panels: Panels, xlabel: str) -> tuple[Any, dict[str, Any]]:
    from matplotlib.figure import Figure
    if not panels:
        return None, {}
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns + 2.6, 3.3 * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(panels):]:
        axis.remove()
    for title, axis in zip(panels, axes, strict=False):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel, fontsize=9)
        axis.set_ylabel("accuracy, %", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, dict(zip(panels, axes, strict=False))


def _curves(axis: Any, series: Series, place: Callable[[Line], int], styles: Mapping[str, Style]) -> None:
    for label, same in series.items():
        _curve(axis, label, [place(line) for line in same], same, styles[label])
    places = sorted({place(line) for same in series.values() for line in same if line.rows})
    axis.set_xticks(places, [str(number) for number in places])
    axis.minorticks_off()


def _curve(axis: Any, label: str, places: Sequence[Any], lines: Sequence[Line], style: Style) -> None:
    """Mean and deviation; a pending row leaves a gap."""
    points = sorted((place, 100 * (nan if line.accuracy is None else line.accuracy), 100 * (line.deviation or 0.0))
                    for place, line in zip(places, lines, strict=True))
    axis.errorbar(*zip(*points, strict=True), **{"label": label, "markersize": 5, "linewidth": 1.2, "elinewidth": 0.8,
                                                 "capsize": 2} | style)


def _baselines(axis: Any, lines: Sequence[Line]) -> None:
    """The first greedy and bp rows as lines across the panel."""
    for method, (colour, dashes) in _BASELINES.items():
        means = [line.accuracy for line in lines if method_of(line.combination) == method]
        for mean in filter(None, means[:1]):
            axis.axhline(100 * mean, color=colour, linestyle=dashes, linewidth=1.1, label=method)


def _with_legend(figure: Any, axes: dict[str, Any]) -> Any:
    """The figure with one legend for all panels, at their right."""
    if figure is None:
        return None
    handles: dict[str, Any] = {}
    for axis in axes.values():
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    height = max(figure.get_figheight(), 0.3 + 0.19 * len(handles))
    figure.set_figheight(height)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    return figure
