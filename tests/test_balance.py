"""The best partition is the best: against brute force over all partitions."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blpipe.balance import best_starts, cheapest_within, fewest_stages, least_maximum


@st.composite
def tables(draw, most_blocks=7):
    """A cost for every run of blocks, some of them not allowed, and any order among them."""
    blocks = draw(st.integers(1, most_blocks))
    cost = np.full((blocks + 1, blocks + 1), np.inf)
    for i, j in combinations(range(blocks + 1), 2):
        cost[i, j] = draw(st.one_of(st.integers(1, 20), st.just(np.inf)))
    return cost


def partitions(blocks, stages):
    return [[0, *cuts] for cuts in combinations(range(1, blocks), stages - 1)]


def values(cost, starts, speeds):
    return [cost[i, j] / speed for (i, j), speed in zip(pairwise([*starts, len(cost) - 1]), speeds, strict=True)]


@settings(deadline=None)
@given(tables(), st.data())
def test_the_slowest_stage_is_as_fast_as_in_the_best_of_all_partitions(cost, data):
    blocks = len(cost) - 1
    stages = data.draw(st.integers(1, blocks))
    speeds = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=stages, max_size=stages))
    every = partitions(blocks, stages)
    least = min(max(values(cost, starts, speeds)) for starts in every)
    found = best_starts(cost, speeds)
    assert least_maximum(cost, speeds) == least
    if np.isinf(least):
        assert found is None
        return
    assert found in every
    assert max(values(cost, found, speeds)) == least
    # Among those, the other stages are as even as can be.
    squares = [sum(np.square(values(cost, starts, speeds))) for starts in every
               if max(values(cost, starts, speeds)) == least]
    assert sum(np.square(values(cost, found, speeds))) == pytest.approx(min(squares))


@settings(deadline=None)
@given(tables(), tables(), st.integers(1, 20), st.data())
def test_a_memory_limit_is_kept_by_exact_values_and_the_fastest_such_partition_found(cost, memory, limit, data):
    size = min(len(cost), len(memory))
    cost, memory = cost[:size, :size], memory[:size, :size]
    stages = data.draw(st.integers(1, size - 1))
    estimates = np.where(np.isinf(memory), memory, np.floor(memory * data.draw(st.floats(0.5, 1.0))))
    fitting = [starts for starts in partitions(size - 1, stages)
               if max(values(memory, starts, [1.0] * stages)) <= limit]
    least = min((max(values(cost, starts, [1.0] * stages)) for starts in fitting), default=np.inf)
    found = cheapest_within(cost, estimates, lambda i, j: memory[i, j], limit, [1.0] * stages)
    if np.isinf(least):
        assert found is None
    else:
        assert found in fitting
        assert max(values(cost, found, [1.0] * stages)) == least


@settings(deadline=None)
@given(tables(), st.integers(1, 20))
def test_the_fewest_stages_that_keep_a_limit(memory, limit):
    blocks = len(memory) - 1
    counts = [stages for stages in range(1, blocks + 1) for starts in partitions(blocks, stages)
              if max(values(memory, starts, [1.0] * stages)) <= limit]
    assert fewest_stages(memory <= limit) == min(counts, default=None)


def test_more_stages_than_blocks_are_no_partition():
    cost = np.ones((4, 4))
    assert np.isinf(least_maximum(cost, [1.0] * 4))
    assert best_starts(cost, [1.0] * 4) is None


def test_a_thousand_stages():
    ends = np.cumsum([0, *np.random.default_rng(0).random(1200)])
    cost = np.where(np.tri(1201, k=0, dtype=bool), np.inf, ends[None, :] - ends[:, None])
    assert len(best_starts(cost, [1.0] * 1024)) == 1024
