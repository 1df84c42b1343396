"""The plots: accuracy against K, against the delay, and against cost. One panel where rows cannot share one."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.accuracy.report import DASH, Line, context_keys, method_of, setting, varied
from benchmarks.accuracy.sweep import short

_COLOURS = ["#4c78a8", "#f2a33c", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#bab0ac"]
_MARKERS = "osD^vP*X<>"
_DASHES = ["-", "--", "-.", ":"]
_DELAY = "method.link.delay"
_COLUMNS = 3  # panels side by side
_BASELINES = {"bp": ("#333333", "--"), "greedy": ("#888888", ":")}

Panels = dict[str, list[Line]]  # by title
Style = dict[str, Any]  # what matplotlib calls the properties of a line


def draw(lines: Sequence[Line], out: Path) -> list[str]:
    """Draw what there are data for into `out`; returns what was drawn, and what not."""
    done = [line for line in lines if line.rows]
    plots: list[tuple[str, Callable[[Sequence[Line], Sequence[Line]], Any], str]] = [
        ("accuracy_by_k.png", _by_stages, "no row has finished at two values of K"),
        ("accuracy_by_delay.png", _by_delay, "no row has finished at two delays"),
        ("accuracy_by_cost.png", _by_cost, "no row has finished beside the reference of its cost")]
    said = []
    for name, plot, missing in plots:
        try:
            figure = plot(done, lines)
        except ImportError:
            return ["no plots: they need matplotlib; run `pip install matplotlib`"]
        if figure is not None:
            figure.savefig(out / name, dpi=130)
        else:
            (out / name).unlink(missing_ok=True)  # of other rows
        said.append(f"{name}: {'drawn' if figure is not None else f'not drawn, {missing}'}")
    return said


def _by_stages(done: Sequence[Line], every: Sequence[Line]) -> Any:
    """A line for each group and setting, over K."""
    def long(here: Sequence[Line]) -> dict[str, list[Line]]:
        return {label: same for label, same in _series(here, every).items() if len({line.stages for line in same}) > 1}

    panels = {title: here for title, here in _panels(done, every, lambda line: "").items() if long(here)}
    figure, axes = _figure(panels, "K, number of stages")
    styles = _styles(long(done))
    for title, axis in axes.items():
        for label, same in long(panels[title]).items():
            _curve(axis, label, [line.stages for line in same], same, styles[label])
        axis.set_xscale("log", base=2)
        _ticks(axis, {line.stages for line in panels[title]})
    return _with_legend(figure, axes)


def _by_delay(done: Sequence[Line], every: Sequence[Line]) -> Any:
    """A line for each BackLink group and setting, over the delay; greedy and bp across."""
    def linked(here: Sequence[Line]) -> dict[str, list[Line]]:
        found = _series([line for line in here if method_of(line.combination) == "backlink"], every, _DELAY)
        return {label: same for label, same in found.items() if len({_delay(line) for line in same}) > 1}

    panels = {title: here for title, here in _panels(done, every, lambda line: f"K = {line.stages}").items()
              if linked(here)}
    figure, axes = _figure(panels, "d, delay of the link in steps")
    styles = _styles(linked(done))
    for title, axis in axes.items():
        for label, same in linked(panels[title]).items():
            _curve(axis, label, [_delay(line) for line in same], same, styles[label])
        _baselines(axis, panels[title])
        _ticks(axis, {_delay(line) for same in linked(panels[title]).values() for line in same})
    return _with_legend(figure, axes)


def _by_cost(done: Sequence[Line], every: Sequence[Line]) -> Any:
    """A point for each row, over its seconds per epoch relative to the reference's."""
    done = [line for line in done if line.cost is not None]
    panels = {title: here for title, here in _panels(done, every, lambda line: f"K = {line.stages}").items()
              if len(here) > 1}
    figure, axes = _figure(panels, "cost: seconds per epoch, relative")
    styles = _styles(_series(done, every))
    for title, axis in axes.items():
        for label, same in _series(panels[title], every).items():
            _curve(axis, label, [line.cost for line in same], same, styles[label] | {"linestyle": "none"})
    return _with_legend(figure, axes)


def _panels(done: Sequence[Line], every: Sequence[Line], more: Callable[[Line], str]) -> Panels:
    """Lines by the title of their panel: of one model, data and training, and as `more` says."""
    found: Panels = {}
    keys = context_keys([line.combination for line in every])
    for line in done:
        config = line.combination.config
        title = [f"{short(key)} {setting(config, key)}" for key in keys] + [more(line)]
        found.setdefault(", ".join(filter(None, title)), []).append(line)
    return found


def _series(done: Iterable[Line], every: Sequence[Line], without: str = "") -> dict[str, list[Line]]:
    """Lines by their label: the group, and the settings in which its rows differ, but K and `without`."""
    left_out = {*context_keys([line.combination for line in every]), "partition.cuts", without}
    found: dict[str, list[Line]] = {}
    for line in done:
        group = [other.combination for other in every if other.combination.group == line.combination.group]
        keys = [key for key in varied(group) if key not in left_out]
        config = line.combination.config
        label = [line.combination.group, *(f"{short(key)} {setting(config, key)}" for key in keys
                                           if setting(config, key) != DASH)]
        found.setdefault(", ".join(label), []).append(line)
    return found


def _delay(line: Line) -> int:
    return line.combination.config.method.link.delay


def _styles(series: Mapping[str, list[Line]]) -> dict[str, Style]:
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


def _curve(axis: Any, label: str, places: Sequence[Any], lines: Sequence[Line], style: Style) -> None:
    points = sorted((place, 100 * (line.accuracy or 0.0), 100 * (line.deviation or 0.0))
                    for place, line in zip(places, lines, strict=True))
    axis.errorbar(*zip(*points, strict=True), **{"label": label, "markersize": 5, "linewidth": 1.2, "elinewidth": 0.8,
                                                 "capsize": 2} | style)


def _baselines(axis: Any, lines: Sequence[Line]) -> None:
    """The first greedy and bp rows as lines across the panel."""
    for method, (colour, dashes) in _BASELINES.items():
        for line in [line for line in lines if method_of(line.combination) == method][:1]:
            axis.axhline(100 * (line.accuracy or 0.0), color=colour, linestyle=dashes, linewidth=1.1, label=method)


def _ticks(axis: Any, places: set[int]) -> None:
    axis.set_xticks(sorted(places), [str(place) for place in sorted(places)])
    axis.minorticks_off()


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
