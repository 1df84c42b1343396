"""The table of a scaling, and what follows from it."""

from typing import Any

from benchmarks.markdown import table

PREDICTED = ("BackLink d=1", "larger heads d=1", "joint tail d=1", "joint d=1", "BackLink d=1/M", "BackLink d=0",
             "last loss d=1/M", "no heads d=1/M", "greedy", "GPipe", "1F1B", "zero-bubble")
COLUMNS = (*PREDICTED, "interleaved 1F1B", "DDP")
PAPER = 0.48  # of the time of backpropagation: arXiv 2205.07141's −52 % for ResNet-110

Found = dict[str, Any]  # of the results file
Rows = dict[str, dict[str, float]]  # samples/s by number of stages and method


def as_markdown(found: Found) -> str:
    """Samples/s over those of one device, measured over measured and predicted over predicted."""
    columns = [method for method in COLUMNS if any(method in row for kind in ("measured", "predicted")
                                                   for row in found[kind].values())]
    rows = [["K", "", *columns]]
    for count in sorted(map(int, found["predicted"])):
        for kind in ("measured", "predicted"):
            here = found[kind].get(str(count), {})
            if count > 1 and here:
                rows.append([str(count), kind, *(_cell(found, kind, here, method) for method in columns)])
    one = {kind: found[kind]["1"]["one device"] for kind in ("measured", "predicted")}
    environment = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    lines = [f"{found['case']}, batches of {found['batch']}, M = {found['microbatches']}. Times one device, which "
             f"trains {one['measured']:,.1f} samples/s (predicted: {one['predicted']:,.1f}) by backpropagation:",
             "", table(rows, texts=2), "", *conclusions(found["predicted"]), "", f"{environment}."]
    return "\n".join(lines) + "\n"


def _cell(found: Found, kind: str, here: dict[str, float], method: str) -> str:
    return f"{here[method] / found[kind]['1']['one device']:.2f}" if method in here else "–"


def conclusions(predicted: Rows) -> list[str]:
    """From what K on BackLink d = 1 is faster, as predicted, than each other schedule, and than the paper's figure."""
    ours, one = "BackLink d=1", predicted["1"]["one device"]
    counts = [count for count in sorted(map(int, predicted)) if count > 1]
    lines: list[str] = []
    if ours not in predicted[str(counts[0])]:
        return lines
    for method in (method for method in ("GPipe", "1F1B", "zero-bubble") if method in predicted[str(counts[0])]):
        where = _from_where_on([count for count in counts
                            if predicted[str(count)][ours] > predicted[str(count)][method]], counts)
        lines.append(f"- predicted, {ours} is faster than {method} {where}")
    fast = [count for count in counts if one / predicted[str(count)][ours] <= PAPER]
    lines.append(f"- predicted, its step takes at most {PAPER:.0%} of one device's time {_from_where_on(fast, counts)}")
    return lines


def _from_where_on(holds: list[int], counts: list[int]) -> str:
    """From where on it holds for all that follow."""
    last_not = max((count for count in counts if count not in holds), default=0)
    after = [count for count in holds if count > last_not]
    return f"from K = {after[0]} on" if after else "at none of these K up to the last"
