"""The simulation: known schedules take the time that their papers state, and links and buffers count."""

import json
from itertools import product

import pytest

from blpipe.forecast.baselines import SCHEDULES, Backward
from blpipe.forecast.simulate import Connection, simulate
from blpipe.program import Kind, Role, train_program
from blpipe.steps import Step
from blpipe.trace import write_trace

FREE = Connection(latency=0.0, bandwidth=float("inf"))
UNIT = {Kind.FORWARD: 1.0, Backward.FULL: 2.0, Backward.INPUT: 1.0, Backward.WEIGHT: 1.0, Kind.LOCAL_BACKWARD: 2.0,
        Kind.LINK_BACKWARD: 1.0}


def schedule(name, stages, microbatches, seconds=UNIT, steps=1, connection=FREE, size=0):
    sizes = [size] * (stages - 1)
    return simulate([SCHEDULES[name](k, stages, steps, microbatches) for k in range(stages)], [seconds] * stages,
                    sizes, sizes, connection)


def backlink(stages, steps, delay, microbatches=1, seconds=UNIT, connection=FREE, size=0):
    plan = [Step(i, (1,) * microbatches) for i in range(steps)]
    last = stages - 1
    programs = [train_program(plan, Role(k < last, (1,) * (k > 0), (1,) * (k < last)), delay) for k in range(stages)]
    each = seconds if isinstance(seconds, list) else [seconds] * stages
    sizes = [size] * (stages - 1)
    return simulate(programs, each, sizes, sizes, connection)


def end(timeline):
    return max(span.end for span in timeline.spans)


@pytest.mark.parametrize(("stages", "microbatches"), [*product((2, 3, 4, 8), (8, 16)), (4, 4), (1, 3)])
def test_a_step_of_each_schedule_takes_what_its_paper_says(stages, microbatches):
    assert end(schedule("GPipe", stages, microbatches)) == 3 * (microbatches + stages - 1)
    assert end(schedule("1F1B", stages, microbatches)) == 3 * (microbatches + stages - 1)
    # ZB-H1's bubble: (stages − 1)(forward + input backward − weight backward).
    assert end(schedule("zero-bubble", stages, microbatches)) == 3 * microbatches + stages - 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_microbatch_goes_forward_and_back_once_a_step_in_every_stage(name):
    for stages, microbatches in product((1, 2, 5), (1, 3, 7)):
        done = schedule(name, stages, microbatches, steps=2).spans
        kinds = [Kind.FORWARD, *([Backward.INPUT, Backward.WEIGHT] if name == "zero-bubble" else [Backward.FULL])]
        expected = [(k, kind, step, m) for k in range(stages) for kind in kinds for step in range(2)
                    for m in range(microbatches)]
        assert sorted((s.stage, kinds.index(s.op.kind), s.op.step, s.op.microbatch) for s in done) == \
            sorted((k, kinds.index(kind), step, m) for k, kind, step, m in expected)


def test_1f1b_keeps_no_more_microbatches_in_flight_than_stages_are_left():
    for stage in range(4):
        flying = peak = 0
        for op in SCHEDULES["1F1B"](stage, 4, 1, 16):
            flying += (op.kind is Kind.FORWARD) - (op.kind is Backward.FULL)
            peak = max(peak, flying)
        assert peak == 4 - stage


def test_with_a_delay_no_stage_waits_once_the_pipeline_has_filled():
    timeline = backlink(stages=6, steps=12, delay=1)
    assert timeline.seconds_per_step() == 4.0
    assert backlink(stages=6, steps=12, delay=0).seconds_per_step() > 4.0


def test_the_slowest_stage_sets_the_pace_wherever_it_is():
    slow = {kind: 3 * seconds for kind, seconds in UNIT.items()}
    for place in range(4):
        seconds = [slow if k == place else UNIT for k in range(4)]
        own = 9 if place == 3 else 12  # no link arrives in the last stage
        assert backlink(4, steps=16, delay=1, seconds=seconds).seconds_per_step() == own


def test_a_slow_link_holds_the_pipeline_up():
    connection = Connection(latency=0.5, bandwidth=10.0)
    assert backlink(3, steps=12, delay=1, connection=connection, size=10).seconds_per_step() == 4.0
    # A round trip of 7.5 s each way with 5 s of computing; with d = 1 two batches share it.
    assert backlink(2, steps=12, delay=1, connection=connection, size=70).seconds_per_step() == pytest.approx(20 / 2)
    assert backlink(2, steps=24, delay=4, connection=connection, size=70).seconds_per_step() == pytest.approx(7.0)
    assert end(schedule("GPipe", 2, 1, connection=connection, size=10)) == 6 + 2 * 1.5


def test_no_stage_is_busier_than_all_of_the_time():
    """The last stage is a little faster than the others, which get ahead in the first steps, without late links."""
    faster = {kind: 0.97 * seconds for kind, seconds in UNIT.items()} | {Kind.LOCAL_BACKWARD: 2.9}
    timeline = backlink(3, steps=8, delay=1, seconds=[UNIT, UNIT, faster])
    assert timeline.seconds_per_step() == pytest.approx(4.0)


def test_what_a_message_costs_the_host_is_not_computing():
    connection = Connection(0.0, float("inf"), host_seconds=0.25)
    # The middle stage takes and gives an activation and an error in every step.
    assert backlink(3, steps=12, delay=1, connection=connection).seconds_per_step() == 5.0


def test_a_stage_never_runs_far_ahead_of_a_slower_one():
    slow = {kind: 10 * seconds for kind, seconds in UNIT.items()}
    timeline = backlink(2, steps=10, delay=1, seconds=[UNIT, slow])
    first, last = timeline.step_ends
    # Two messages sent, two receives posted: stage 1 is at most that many batches ahead.
    assert first[6] > last[1]


def test_the_trace_has_a_row_a_stage_and_an_event_a_span(tmp_path):
    timeline = backlink(3, steps=2, delay=1)
    write_trace(tmp_path / "trace.json", timeline.spans, ["a", "b", "c"])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["stage 1: a", "stage 2: b", "stage 3: c"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(timeline.spans)
    assert min(e["ts"] for e in spans) == 0.0
    link = next(e for e in spans if e["name"] == "link backward")
    assert link["dur"] == 1e6
    assert link["args"] == {"step": 0, "microbatch": 0}
