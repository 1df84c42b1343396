"""The tables, and whether the goals are reached."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks import markdown
from benchmarks.memory.cases import CHECKPOINTED, GOAL, Size
from blpipe.text import human_bytes

Row = dict[str, Any]

DASH = "–"
TITLES = {
    "local": "One process, all stages in it (local engine)",
    "pipeline": "A process for each stage, whole batches: the largest stage",
    "microbatches": "A process for each stage, each batch in K microbatches: the largest stage"}
_CHECKPOINTED = [case.name for case in CHECKPOINTED]


def as_markdown(rows: Sequence[Row], size: Size) -> str:
    """The tables of every network, batch, precision and layout that has rows, at those K of `size` that have any."""
    kinds = {tuple(row[name] for name in size.key()): None for row in rows}
    sizes = [replace(size, **dict(zip(size.key(), kind, strict=True))) for kind in kinds]
    return "\n".join(_tables([row for row in rows if each.has(row)], each) for each in sizes) \
        or "Nothing was measured yet.\n"


def _tables(rows: Sequence[Row], size: Size) -> str:
    """Of one size; a part of which no row was measured has none."""
    layout = ", channels last" if size.channels_last else ""
    parts = [f"# ResNet-{size.depth}, batch {size.batch}, {size.precision}{layout}",
             "In brackets: against bp in one process."]
    for part, title in TITLES.items():
        found = [row for row in rows if row["part"] == part]
        if found:
            parts.append(f"## {title}\n\n{_memory_table(found, bp_bytes(rows), size)}")
    timed = [row for row in rows if row["part"] == "time"]
    if timed:
        parts.append(f"## Time of a step in one process\n\n{_time_table(timed, rows)}")
    parts.append("## Goals\n\n" + "\n".join(f"- {line}" for line in [*_stage_goal(rows, size), *_local_goal(rows)]))
    parts.append("\n".join(f"- {line}" for line in _notes(rows)))
    return "\n\n".join(parts) + "\n"


def bp_bytes(rows: Iterable[Row]) -> int | None:
    """Of bp in one process; None where it was not measured."""
    return next((row["peak_bytes"] for row in rows if row["part"] == "local" and row["method"] == "bp"), None)


def _memory_table(rows: Sequence[Row], bp: int | None, size: Size) -> str:
    found = {(row["cut"], row["method"], row["stages"]): row for row in rows}
    counts = [count for count in size.stages if any(row["stages"] == count for row in rows)] or size.stages
    table = [["method", "cut", *(f"K = {count}" for count in counts)]]
    for cut, method in sorted({(row["cut"], row["method"]) for row in rows}, key=_place):
        cells = [_cell(found.get((cut, method, count)) or found.get((cut, method, 1)), bp) for count in counts]
        table.append([method, cut if _is_cut(method) or rows[0]["part"] != "local" else DASH, *cells])
    return markdown.table(table, texts=2)


def _place(cut_and_method: tuple[str, str]) -> tuple[Any, ...]:
    """Even cuts first, then the others; bp, greedy, BackLink."""
    cut, method = cut_and_method
    return ["even", "least", "limit"].index(cut), not method.startswith("bp"), method != "greedy", method


def _is_cut(method: str) -> bool:
    return not method.startswith("bp")


def _cell(row: Row | None, bp: int | None) -> str:
    if row is None or row["peak_bytes"] is None:
        return DASH if row is None else "impossible"
    slower = f"; slowest stage × {row['slowest']:.2f}" if row.get("slowest", 1.0) != 1.0 else ""
    against = f" ({_less(row['peak_bytes'], bp)}{slower})" if bp and row["peak_bytes"] != bp else ""
    return human_bytes(row["peak_bytes"]) + against


def _less(one: float, other: float) -> str:
    return f"{100 * (one / other - 1):+.0f} %".replace("-", "−")


def _time_table(timed: Sequence[Row], rows: Sequence[Row]) -> str:
    table = [["method", "K", "cut", "s a step", "× bp", "of rounds", "peak memory at the full batch"]]
    for row in timed:
        ratios, peak = row["ratios"], _local(rows, row)
        table.append([row["method"], str(row["stages"]) if _is_cut(row["method"]) else DASH,
                      row["cut"] if _is_cut(row["method"]) else DASH, f"{median(row['seconds']):.3g}",
                      f"{median(ratios):.2f}", f"{min(ratios):.2f} … {max(ratios):.2f}",
                      DASH if peak is None else human_bytes(peak)])
    first = timed[0]
    threads = f", {first['threads']} CPU thread{'s' * (first['threads'] > 1)}" if first["threads"] else ""
    return (f"{markdown.table(table)}\n\nBatch {first['timed_batch']}{threads}; medians of {len(first['seconds'])} "
            "rounds in which all took turns.")


def _local(rows: Iterable[Row], like: Row) -> int | None:
    """The memory in one process of what was timed."""
    return next((row["peak_bytes"] for row in rows if row["part"] == "local"
                 and all(row[key] == like[key] for key in ("method", "stages", "cut"))), None)


def _stage_goal(rows: Sequence[Row], size: Size) -> list[str]:
    """For each way of running a pipeline, BackLink's leanest stage, and that of its default link."""
    bp, lines = bp_bytes(rows), []
    for part in ("pipeline", "microbatches"):
        for cut in ("even", "least", "limit"):
            ours = [row for row in rows if (row["part"], row["cut"], row["stages"]) == (part, cut, size.stages[-1])
                    and row["method"].startswith("BackLink") and row["peak_bytes"]]
            if not ours or not bp:
                continue
            where = f"{'K microbatches' if part == 'microbatches' else 'whole batches'}, {cut} cut"
            told = [f"{row['method']}: {_less(row['peak_bytes'], bp)}, {_reached(row['peak_bytes'] <= (1 - GOAL) * bp)}"
                    for row in sorted(ours, key=lambda row: float(row["peak_bytes"]))]
            lines.append(f"−{100 * GOAL:.0f} % a stage at K = {size.stages[-1]}, {where}: {'; '.join(told)}")
    return lines


def _local_goal(rows: Sequence[Row]) -> list[str]:
    """Less memory than the leanest checkpointing, in less time than the quickest."""
    checkpointed = [row for row in rows if row["part"] == "local" and row["method"] in _CHECKPOINTED]
    timed = [row for row in rows if row["part"] == "time"]
    quickest = min((median(row["ratios"]) for row in timed if row["method"] in _CHECKPOINTED), default=None)
    if not checkpointed:
        return []
    leanest = min(checkpointed, key=lambda row: int(row["peak_bytes"]))
    lines = [f"in one process, the leanest checkpointing is {leanest['method'].removeprefix('bp, ')}, "
             f"{human_bytes(leanest['peak_bytes'])}"
             + ("" if quickest is None else f"; the quickest takes {quickest - 1:+.0%} of bp's time")]
    for row in timed:
        peak = _local(rows, row)
        if _is_cut(row["method"]) and peak is not None and quickest is not None:
            less, sooner = peak < leanest["peak_bytes"], median(row["ratios"]) < quickest
            lines.append(f"{row['method']}, K = {row['stages']}, {row['cut']} cut: {human_bytes(peak)} "
                         f"({'less' if less else 'not less'}), {median(row['ratios']) - 1:+.0%} time "
                         f"({'less' if sooner else 'not less'}): {_reached(less and sooner)}")
    return lines


def _reached(yes: bool) -> str:
    return "reached" if yes else "not reached"


def _notes(rows: Sequence[Row]) -> list[str]:
    def distinct(text: str) -> str:
        return "; ".join(dict.fromkeys(text.format(**row) for row in rows))
    return [f"devices: {distinct('{device}, {cores} cores')}",
            f"versions: {distinct('torch {torch}, Python {python}')}",
            f"commits: {distinct('{commit}')}"]
