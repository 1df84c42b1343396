"""The soak's tables, and its criterion for memory."""

from statistics import median
from typing import Any

from benchmarks import markdown

LARGEST_GROWTH = 0.02  # of the resident size, after the rounds of the warm-up


def resident(rounds: list[list[int]]) -> tuple[float, float]:
    """A process's median resident size, in bytes, in the first round after the warm-up and in the last.

    The first quarter of the rounds, and the first round at least, is the warm-up.
    """
    sizes = [median(samples) for samples in rounds]
    return sizes[min(max(1, len(sizes) // 4), len(sizes) - 1)], sizes[-1]


def grown(found: dict[str, Any]) -> list[str]:
    """What is to be said of the processes that have grown by too much."""
    sizes = [resident(stage["resident_bytes"]) for stage in found["stages"]]
    return [f"stage {number}: its resident size grew from {_mebibytes(first)} to {_mebibytes(last)} MiB, "
            f"more than {LARGEST_GROWTH:.0%}".replace("%", " %")
            for number, (first, last) in enumerate(sizes, start=1) if last > (1 + LARGEST_GROWTH) * first]


def as_markdown(found: dict[str, Any]) -> str:
    """What was done, by case and by stage, and on what."""
    stages = found["stages"]
    rounds = len(stages[0]["resident_bytes"])
    runs = [["case", "runs", "steps"],
            *([case, str(rounds), f"{rounds * steps:,}"] for case, steps in found["steps"].items())]
    queues = [["stage", "queue", "messages", "stalls", "stalled, s", "longest, ms"]]
    memory = [["stage", "after warm-up, MiB", "at the end, MiB", "growth"]]
    for number, stage in enumerate(stages, start=1):
        for queue, count in sorted(stage["queues"].items()):
            queues.append([str(number), queue, f"{count['messages']:,}", f"{count['stalls']:,}",
                           f"{count['seconds']:.0f}", f"{1000 * count['longest']:.0f}"])
        first, last = resident(stage["resident_bytes"])
        memory.append([str(number), _mebibytes(first), _mebibytes(last), f"{100 * (last / first - 1):+.2f} %"])
    stalls = sum(count["stalls"] for stage in stages for count in stage["queues"].values())
    done = f"{rounds * sum(found['steps'].values()):,} steps in {stages[0]['seconds'] / 60:.1f} minutes, " \
        f"{stalls:,} stalls, {rounds} rounds." \
        + (f" Stalls {found['stalls']} times as often as usual." if found.get("stalls", 1) > 1 else "")
    measured_on = ", ".join(f"{key} {value}" for key, value in found["environment"].items()) + "."
    return "\n\n".join([done, markdown.table(runs), markdown.table(queues, texts=2), markdown.table(memory),
                        measured_on]) + "\n"


def _mebibytes(size: float) -> str:
    return f"{size / 2 ** 20:.1f}"
