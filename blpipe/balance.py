"""The contiguous partition whose slowest stage is fastest, exactly, under a memory limit where there is one.

Pure arithmetic on a table of stage costs: `cost[i, j]` is what a stage of the blocks i … j−1 would take, for
0 ≤ i < j ≤ N; infinity where such a stage is not allowed.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]  # [N + 1, N + 1]


def best_starts(cost: Table, speeds: Sequence[float]) -> list[int] | None:
    """The first block of each of `len(speeds)` stages, so that max over k of cost_k / speeds[k] is least.

    Among the partitions that reach this least maximum, the one with the least sum of squares: the other
    stages are even too. Dynamic programming over (stages, blocks).

    Returns:
        None if every partition holds a stage that is not allowed.
    """
    slowest = least_maximum(cost, speeds)
    if np.isinf(slowest):
        return None

    def squared(window: Table, speed: float) -> Table:
        return np.where(window / speed <= slowest, (window / speed) ** 2, np.inf)

    rows = _rows(cost, speeds, np.add, squared)
    starts, end = [], len(cost) - 1
    for row, speed in zip(reversed(rows[:-1]), reversed(speeds), strict=True):
        end = int((row + squared(cost[:, end], speed)).argmin())
        starts.append(end)
    return starts[::-1]


def least_maximum(cost: Table, speeds: Sequence[float]) -> float:
    """The least max over k of cost_k / speeds[k] over all partitions; infinity where there is none."""
    if len(speeds) >= len(cost):
        return np.inf
    return float(_rows(cost, speeds, np.maximum, np.divide)[-1][-1])


def fewest_stages(allowed: NDArray[np.bool_]) -> int | None:
    """The least number of stages with which every stage is allowed; None where no number does.

    Args:
        allowed: [N + 1, N + 1], whether the blocks i … j−1 may be one stage.
    """
    blocks = len(allowed) - 1
    needed = [0.0] + [np.inf] * blocks
    for end in range(1, blocks + 1):
        needed[end] = 1 + min((needed[start] for start in range(end) if allowed[start, end]), default=np.inf)
    return None if np.isinf(needed[blocks]) else int(needed[blocks])


def cheapest_within(cost: Table, memory: Table, exact_memory: Callable[[int, int], float], limit: float,
                    speeds: Sequence[float]) -> list[int] | None:
    """`best_starts` among the partitions in which no stage needs more memory than `limit`.

    Args:
        memory: estimates, [N + 1, N + 1]. Every stage of the result was checked by `exact_memory(i, j)`,
            whose values replace the estimates.

    Returns:
        None if no partition keeps the limit.
    """
    known: set[tuple[int, int]] = set()
    while True:
        starts = best_starts(np.where(memory <= limit, cost, np.inf), speeds)
        if starts is None:
            return None
        if not refine(memory, exact_memory, starts, known):
            return starts


def refine(memory: Table, exact_memory: Callable[[int, int], float], starts: list[int],
           known: set[tuple[int, int]]) -> bool:
    """Replace the estimates for the stages of this partition by exact values; whether there was any left."""
    stages = {*zip(starts, [*starts[1:], len(memory) - 1], strict=True)}
    for start, end in stages - known:
        memory[start, end] = exact_memory(start, end)
    new = not stages <= known
    known |= stages
    return new


def _rows(cost: Table, speeds: Sequence[float], combine: np.ufunc,
          value: Callable[[Table, float], Table]) -> list[NDArray[np.float64]]:
    """For k = 0 … K stages, the best combined value over the first j blocks, j = 0 … N.

    Stage k cannot begin before block k or leave fewer blocks than stages behind it: the windows are small.
    """
    size, width = len(cost), len(cost) - len(speeds)
    rows = [np.full(size, np.inf)]
    rows[0][0] = 0.0
    for k, speed in enumerate(speeds):
        row = np.full(size, np.inf)
        window = value(cost[k:k + width, k + 1:k + 1 + width], speed)
        row[k + 1:k + 1 + width] = combine(rows[-1][k:k + width, None], window).min(axis=0)
        rows.append(row)
    return rows
