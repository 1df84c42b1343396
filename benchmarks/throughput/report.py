"""The tables, from what the processes measured: medians over rounds, of ratios formed within a round."""

from statistics import median
from typing import Any

from benchmarks.markdown import table
from benchmarks.throughput.rows import METHODS
from benchmarks.throughput.settings import OWN_SPEED
from blpipe.text import human_bytes

Case = dict[str, Any]  # of results.json: settings, environment, aims and rounds
DASH = "–"
_CUTS = {"stages": "stages", "larger_heads": "with larger heads", "joint_tail": "of joint tails",
         "joint": "of joint backwards", "no_heads": "without heads", "backprop": "1F1B's own",
         "virtual": "two stages a process", "replicas": "of a replica"}
_HEAD = ["", "samples/s", "× 1F1B", "× DDP", "of own speed", "side by side", "busy, %", "waiting, %", "sent a step"]


def seconds(case: Case, method: str) -> list[float]:
    """Seconds of a step, by round: of the slowest process."""
    return [max(window["seconds"] for window in found[method]["windows"]) for found in case["rounds"]]


def samples_per_second(case: Case, method: str) -> float:
    """The median over rounds."""
    return median(case["batch"] / value for value in seconds(case, method))


def ratio(case: Case, method: str, over: str) -> float | None:
    """The median over rounds of the speed of `method` over that of another method, or over its `OWN_SPEED`."""
    if over == OWN_SPEED:
        return efficiency(case, method, "own_seconds")
    return median(other / own for own, other in zip(seconds(case, method), seconds(case, over), strict=True))


def efficiency(case: Case, method: str, alone: str) -> float | None:
    """Throughput times the slowest stage's own step time; None where that was not measured.

    Args:
        alone: "own_seconds", one process after the other, or "side_by_side_seconds", all at once.
    """
    like = case["like"].get(method, method)
    own = [found[like][alone] for found in case["rounds"]]
    if None in own:
        return None
    return median(max(values) / whole for values, whole in zip(own, seconds(case, method), strict=True))


def shares(case: Case, method: str, key: str) -> list[float] | None:
    """The median over rounds of a share, "busy" or "waiting", by process; None where it was not measured."""
    rounds = [[window[key] for window in found[method]["windows"]] for found in case["rounds"]]
    return None if None in rounds[0] else [median(values) for values in zip(*rounds, strict=True)]


def sent_bytes(case: Case, method: str) -> float:
    """What all processes send in a step."""
    return sum(window["sent_bytes"] for window in case["rounds"][0][method]["windows"])


def summary(case: Case) -> dict[str, dict[str, Any]]:
    """The figures of the table, by method."""
    return {method: {
        "samples_per_second": samples_per_second(case, method),
        "over_1f1b": ratio(case, method, "1F1B"),
        "over_ddp": ratio(case, method, "DDP"),
        "efficiency": efficiency(case, method, "own_seconds"),
        "efficiency_side_by_side": efficiency(case, method, "side_by_side_seconds"),
        "busy": shares(case, method, "busy"),
        "waiting": shares(case, method, "waiting"),
        "sent_bytes": sent_bytes(case, method),
    } for method in METHODS if method in case["rounds"][0]}


def as_markdown(cases: dict[str, Case]) -> str:
    """A table for each case, then the aims."""
    parts = [_case_part(name, case) for name, case in cases.items()]
    rows = [_aim_cells(name, case, aim) for name, case in cases.items() for aim in case["aims"]]
    if rows:
        parts.append("## Aims\n\n" + table([["case", "ratio", "aim", "measured", "reached"], *rows]))
    return "\n\n".join(parts) + "\n"


def _case_part(name: str, case: Case) -> str:
    rows = [[method, f"{row['samples_per_second']:,.1f}", _number(row["over_1f1b"]), _number(row["over_ddp"]),
             _number(row["efficiency"]), _number(row["efficiency_side_by_side"]), _percents(row["busy"]),
             _percents(row["waiting"]), human_bytes(row["sent_bytes"])] for method, row in summary(case).items()]
    where = case["environment"]
    notes = [f"{case['stages']} processes, batch {case['batch']}, M = {case['microbatches']}; {len(case['rounds'])} "
             f"rounds of {case['steps']} steps after {case['warmup']}",
             *(f"{_CUTS[kind]}: {'; '.join(blocks)}" for kind, blocks in case["blocks"].items()),
             f"{where['device']}, {where['cores']} cores, load {where['load']:.1f} before; Python {where['python']}, "
             f"torch {where['torch']}, blpipe {where['blpipe']}, commit {where['commit']}"]
    return "\n".join([f"## {name}", "", table([_HEAD, *rows]), "", *(f"- {note}" for note in notes)])


def _aim_cells(name: str, case: Case, aim: dict[str, Any]) -> list[str]:
    found = ratio(case, aim["method"], aim["over"])
    assert found is not None
    return [name, f"{aim['method']} / {aim['over']}", f"≥ {aim['at_least']:.2f}", f"{found:.3f}",
            "yes" if found >= aim["at_least"] else "no"]


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _percents(values: list[float] | None) -> str:
    return DASH if values is None else " / ".join(f"{100 * value:.0f}" for value in values)
