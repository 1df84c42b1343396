"""Stages that stop together, wherever each of them is."""

import threading

import pytest
import torch.distributed as dist

from blpipe.transport import horizon
from blpipe.transport.horizon import Horizon
from blpipe.transport.world import Meeting


class Clock:
    """Seconds that pass when a step is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """In place of the machine's."""
    found = Clock()
    monkeypatch.setattr(horizon, "perf_counter", found)
    return found


def horizons(ranks, wanted, start=0, ahead=3):
    """One for each rank; `wanted` holds those that want to stop."""
    store = dist.HashStore()
    return [Horizon(start, lambda rank=rank: rank in wanted, Meeting(store, rank, ranks), ahead)
            for rank in range(ranks)]


def test_alone_a_stop_is_before_the_next_step_that_no_stage_has_begun():
    wanted = set()
    here = Horizon(5, lambda: bool(wanted))
    assert here.covers(5)
    assert here.covers(6)
    wanted.add(0)
    assert here.covers(6)
    assert not here.covers(7)
    assert not here.covers(8)


@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("lag", [0, 2])
def test_all_end_before_the_same_step_whoever_wants_to_stop(who, lag, clock):
    """Later stages are some steps behind, and ask some steps ahead of where they are."""
    wanted, ahead = set(), 3
    stages = horizons(3, wanted, ahead=ahead)
    ends = {}
    for step in range(200):
        clock.now += 0.1
        if step == 50:
            wanted.add(who)
        for rank, stage in enumerate(stages):
            at = step - rank * lag
            for asked in (at, at + ahead * (rank > 0)):
                if asked >= 0 and not stage.covers(asked):
                    ends.setdefault(rank, asked)
    firsts = [next(step for step in range(1000) if not stage.covers(step)) for stage in stages]
    assert len(set(firsts)) == 1
    assert 50 < firsts[0] < 50 + 2 * (10 + ahead) + 3 * lag  # two seconds' steps or so


def test_a_promise_is_of_a_second_however_often_it_is_asked_for(clock):
    wanted = set()
    first, = horizons(1, wanted, ahead=2)
    for step in range(100):
        clock.now += 0.5
        for asked in (step, step + 1, step + 2):  # as receives are posted ahead
            assert first.covers(asked)
    wanted.add(0)
    assert not first.covers(99 + 2 + 2 + 4)


def test_a_stage_waits_for_a_promise_that_has_not_been_made():
    first, second = horizons(2, set(), ahead=0)
    heard = []
    thread = threading.Thread(target=lambda: heard.append(second.covers(0)))
    thread.start()
    thread.join(0.1)
    assert heard == []
    assert first.covers(0)
    thread.join(10)
    assert heard == [True]
