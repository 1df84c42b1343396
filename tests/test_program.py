"""The order of a stage's ops, by itself and with its neighbours'."""

from collections import deque
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blpipe.config import LinkConfig, MethodConfig
from blpipe.links import hops
from blpipe.program import Kind, Op, Role, errors_ahead, evaluation_program, steps_ahead, train_program
from blpipe.steps import Step

LINKED = Role(sends=True, hops_out=(1,), hops_in=(1,))
PROPERTY = settings(deadline=None, max_examples=120)

some_hops = st.sets(st.integers(1, 3)).map(sorted).map(tuple)
roles = st.builds(Role, st.booleans(), some_hops, some_hops)
delays = st.integers(0, 9)
steps_of_any_size = st.builds(
    lambda first, counts: [Step(first + i, (2,) * count) for i, count in enumerate(counts)],
    st.integers(0, 5), st.lists(st.integers(1, 4), min_size=1, max_size=6))
batched_steps = st.builds(  # of one epoch: the last batch may be smaller
    lambda count, full, rest: [Step(i, (2,) * n) for i, n in enumerate([count] * full + [min(count, rest)])],
    st.integers(1, 4), st.integers(0, 5), st.integers(1, 4))


def program(steps, role, delay) -> list[Op]:
    return list(train_program(steps, role, delay))


def of_kind(ops, kind, hop=None) -> list[tuple[int, int]]:
    return [(op.step, op.microbatch) for op in ops if op.kind is kind and hop in (None, op.hop)]


def by_step(ops) -> list[list[Op]]:
    """Cut after each optimizer step."""
    parts: list[list[Op]] = [[]]
    for op in ops:
        parts[-1].append(op)
        if op.kind is Kind.STEP:
            parts.append([])
    assert parts.pop() == []
    return parts


def by_microbatch(ops) -> list[list[Op]]:
    """Cut before each forward."""
    parts: list[list[Op]] = []
    for op in ops:
        if op.kind is Kind.RECEIVE:
            parts.append([])
        parts[-1].append(op)
    return parts


# One stage.

@PROPERTY
@given(steps=steps_of_any_size, role=roles, delay=delays)
def test_every_microbatch_goes_once_through_every_op_of_its_role_in_order(steps, role, delay):
    ops = program(steps, role, delay)
    all_of_them = [(step.index, micro) for step in steps for micro in range(len(step.sizes))]
    for kind, happens in ((Kind.RECEIVE, True), (Kind.FORWARD, True), (Kind.LOCAL_BACKWARD, True),
                          (Kind.SEND, role.sends)):
        assert of_kind(ops, kind) == (all_of_them if happens else []), kind
    for hop in range(1, 5):
        comes = hop in role.hops_in
        goes = hop in role.hops_out and (hop == 1 or hop - 1 in role.hops_in)
        for kind, happens in ((Kind.RECEIVE_ERROR, comes), (Kind.LINK_BACKWARD, comes), (Kind.SEND_ERROR, goes)):
            assert of_kind(ops, kind, hop) == (all_of_them if happens else []), (kind, hop)
    assert of_kind(ops, Kind.EVALUATE) == []


@PROPERTY
@given(steps=steps_of_any_size, role=roles, delay=delays)
def test_each_step_ends_with_its_only_optimizer_step(steps, role, delay):
    ops = program(steps, role, delay)
    assert of_kind(ops, Kind.STEP) == [(step.index, -1) for step in steps]
    for step, part in zip(steps, by_step(ops), strict=True):
        assert {op.step for op in part if op.kind is Kind.FORWARD} == {step.index}


@PROPERTY
@given(steps=steps_of_any_size, role=roles, delay=delays)
def test_a_microbatch_is_received_run_sent_and_backpropagated_before_the_next_one(steps, role, delay):
    ops = program(steps, role, delay)
    forward = [op for op in ops if op.kind not in (Kind.RECEIVE_ERROR, Kind.LINK_BACKWARD, Kind.STEP) and op.hop < 2]
    order = [(Kind.RECEIVE, 0), (Kind.FORWARD, 0), *[(Kind.SEND, 0)] * role.sends, (Kind.LOCAL_BACKWARD, 0),
             *[(Kind.SEND_ERROR, 1)] * (1 in role.hops_out)]
    assert forward == [Op(kind, step.index, micro, hop) for step in steps for micro in range(len(step.sizes))
                       for kind, hop in order]


@PROPERTY
@given(steps=steps_of_any_size, role=roles, delay=delays)
def test_an_error_is_received_right_before_its_link_backward_and_passed_on_right_after(steps, role, delay):
    ops = program(steps, role, delay)
    for before, op in zip(ops, ops[1:], strict=False):
        assert (before.kind is Kind.RECEIVE_ERROR) == (op.kind is Kind.LINK_BACKWARD)
        if op.kind is Kind.LINK_BACKWARD:
            assert before[1:] == op[1:]
        if op.kind is Kind.SEND_ERROR and op.hop > 1:
            assert before == Op(Kind.LINK_BACKWARD, op.step, op.microbatch, op.hop - 1)


@PROPERTY
@given(steps=steps_of_any_size, role=roles, delay=delays)
def test_an_error_of_each_hop_goes_into_the_step_that_its_delay_names_or_into_the_flush(steps, role, delay):
    microbatches = [(step.index, micro) for step in steps for micro in range(len(step.sizes))]
    parts = by_step(program(steps, role, delay))
    for step, part in zip(steps, parts, strict=True):
        for hop in range(1, 4):
            for link in of_kind(part, Kind.LINK_BACKWARD, hop):
                due = microbatches.index(link) + hop * delay
                assert step.index == microbatches[min(due, len(microbatches) - 1)][0]


@PROPERTY
@given(steps=batched_steps, role=roles, delay=st.integers(1, 4))
def test_a_delay_in_batches_brings_each_link_so_many_steps_later(steps, role, delay):
    late = LinkConfig(delay=delay).delay_in_microbatches(len(steps[0].sizes))
    for step, part in zip(steps, by_step(program(steps, role, late)), strict=True):
        for hop in range(1, 4):
            for linked, _ in of_kind(part, Kind.LINK_BACKWARD, hop):
                assert step.index == min(linked + hop * delay, steps[-1].index)


@PROPERTY
@given(steps=steps_of_any_size, delay=delays)
def test_a_link_comes_after_its_own_local_backward(steps, delay):
    ops = program(steps, LINKED, delay)
    for step, micro in of_kind(ops, Kind.LINK_BACKWARD):
        assert ops.index(Op(Kind.LOCAL_BACKWARD, step, micro)) < ops.index(Op(Kind.LINK_BACKWARD, step, micro, 1))


@PROPERTY
@given(steps=steps_of_any_size)
def test_without_a_delay_the_next_local_backward_hides_the_wait(steps):
    ops = program(steps, LINKED, 0)
    for step in steps:
        for micro in range(len(step.sizes) - 1):
            link = ops.index(Op(Kind.RECEIVE_ERROR, step.index, micro, 1))
            assert ops.index(Op(Kind.LOCAL_BACKWARD, step.index, micro + 1)) < link
            if micro + 2 < len(step.sizes):
                assert link < ops.index(Op(Kind.RECEIVE, step.index, micro + 2))


@PROPERTY
@given(count=st.integers(1, 4), delay=st.integers(1, 3), epochs=st.integers(1, 6))
def test_with_a_delay_every_link_has_its_own_microbatch_of_a_later_step(count, delay, epochs):
    steps = [Step(i, (2,) * count) for i in range(epochs)]
    ops = program(steps, LINKED, delay * count)
    for step in steps[:-1]:
        for micro in range(count):
            if step.index >= delay:
                link = ops.index(Op(Kind.RECEIVE_ERROR, step.index - delay, micro, 1))
                assert link > ops.index(Op(Kind.SEND_ERROR, step.index, micro, 1))
                assert link < ops.index(Op(Kind.RECEIVE, step.index, micro + 1) if micro + 1 < count
                                        else Op(Kind.STEP, step.index))


# A program that is left between two steps, and gone on with.

def cut(steps, cuts) -> list[tuple[int, int]]:
    """The parts of these steps, from … to, that `cuts` (numbers of any size) make."""
    first, count = steps[0].index, len(steps)
    ends = sorted({first + each % (count + 1) for each in cuts} | {first, first + count})
    return list(zip(ends, ends[1:], strict=False))


def part(steps, role, delay, start, end) -> list[Op]:
    return list(train_program(steps, role, delay, start, lambda step: step < end))


@PROPERTY
@given(steps=steps_of_any_size, role=roles, delay=delays, cuts=st.lists(st.integers(0, 99), max_size=4))
def test_left_and_gone_on_with_it_computes_the_same_in_the_same_order(steps, role, delay, cuts):
    """What is held is added where the link would have been."""
    computed = {Kind.FORWARD, Kind.LOCAL_BACKWARD, Kind.LINK_BACKWARD, Kind.STEP}
    whole = [op for op in program(steps, role, delay) if op.kind in computed]
    ops = [op for start, end in cut(steps, cuts) for op in part(steps, role, delay, start, end)]
    added = [op._replace(kind=Kind.LINK_BACKWARD) if op.kind is Kind.ADD_HELD else op for op in ops]
    assert [op for op in added if op.kind in computed] == whole
    held, taken = (sorted(op[1:] for op in ops if op.kind is kind) for kind in (Kind.HOLD_LINK, Kind.ADD_HELD))
    assert held == taken


@PROPERTY
@given(steps=steps_of_any_size, delay=delays, weights=st.lists(st.sampled_from([0.0, 1.0]), max_size=4),
       reach=st.sampled_from([1, 2, "all"]), cuts=st.lists(st.integers(0, 99), max_size=4))
def test_a_pipeline_is_drained_wherever_it_is_left(steps, delay, weights, reach, cuts):
    roles = roles_of_a_pipeline(weights, reach)
    for start, end in cut(steps, cuts):
        pipeline = Pipeline([part(steps, role, delay, start, end) for role in roles], roles, 1)
        pipeline.run()
        assert not any(pipeline.activations)
        assert not any(pipeline.errors)


def note_and_go_on(asked: list[int], step: int) -> bool:
    asked.append(step)
    return True


@PROPERTY
@given(steps=steps_of_any_size, delay=delays, weights=st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=4),
       reach=st.sampled_from([1, 2, "all"]), take=st.sampled_from(["every", "farthest"]), micro=st.integers(1, 4))
def test_no_stage_asks_further_ahead_of_the_first_than_is_promised(steps, delay, weights, reach, take, micro):
    """A stage posts receives for the errors to come, and may be as far as the first."""
    steps = [Step(step.index, (2,) * micro) for step in steps]
    roles = roles_of_a_pipeline(weights, reach, take)
    ahead = steps_ahead([role.hops_in for role in roles], delay, micro)
    for role in roles:
        asked: list[int] = []
        noting = partial(note_and_go_on, asked)
        layouts = (op for op in train_program(steps, role, delay, 0, noting) if op.kind is Kind.RECEIVE_ERROR)
        for _ in range(errors_ahead(delay, micro, len(role.hops_in))):
            next(layouts, None)
        for op in program(steps, role, delay):
            if op.kind is Kind.RECEIVE_ERROR:
                next(layouts, None)
            if op.kind is Kind.RECEIVE:
                assert max(asked, default=0) <= op.step + ahead


LETTERS = {Kind.FORWARD: "F", Kind.LOCAL_BACKWARD: "B", Kind.LINK_BACKWARD: "L", Kind.STEP: "S"}


def drawn(ops) -> str:
    return " ".join(f"{LETTERS[op.kind]}{op.step}{'abcd'[op.microbatch] if op.microbatch >= 0 else ''}"
                    f"{op.hop if op.hop > 1 else ''}" for op in ops if op.kind in LETTERS)


@pytest.mark.parametrize(("delay", "microbatches", "expected"), [
    (0, (1, 1), "F0a B0a L0a S0  F1a B1a L1a S1"),
    (0, (3,), "F0a B0a F0b B0b L0a F0c B0c L0b L0c S0"),
    (0, (2, 1), "F0a B0a F0b B0b L0a L0b S0  F1a B1a L1a S1"),
    (1, (1,), "F0a B0a L0a S0"),
    (1, (1, 1, 1), "F0a B0a S0  F1a B1a L0a S1  F2a B2a L1a L2a S2"),
    (1, (2, 2), "F0a B0a F0b B0b L0a S0  F1a B1a L0b F1b B1b L1a L1b S1"),
    (2, (2, 2), "F0a B0a F0b B0b S0  F1a B1a L0a F1b B1b L0b L1a L1b S1"),
    (2, (2, 2, 1), "F0a B0a F0b B0b S0  F1a B1a L0a F1b B1b L0b S1  F2a B2a L1a L1b L2a S2"),
    (3, (2, 2, 1), "F0a B0a F0b B0b S0  F1a B1a F1b B1b L0a S1  F2a B2a L0b L1a L1b L2a S2"),
    (2, (1, 1, 1, 1), "F0a B0a S0  F1a B1a S1  F2a B2a L0a S2  F3a B3a L1a L2a L3a S3"),
    (5, (1, 1), "F0a B0a S0  F1a B1a L0a L1a S1"),
])
def test_the_schedule_drawn(delay, microbatches, expected):
    steps = [Step(i, (4,) * count) for i, count in enumerate(microbatches)]
    assert drawn(program(steps, LINKED, delay)) == " ".join(expected.split())


@pytest.mark.parametrize(("delay", "microbatches", "expected"), [
    (0, (1,), "F0a B0a L0a L0a2 S0"),
    (0, (3,), "F0a B0a F0b B0b L0a F0c B0c L0b L0a2 L0c L0b2 L0c2 S0"),
    (1, (1, 1, 1, 1), "F0a B0a S0  F1a B1a L0a S1  F2a B2a L1a L0a2 S2  F3a B3a L2a L1a2 L3a L2a2 L3a2 S3"),
    (2, (1, 1, 1), "F0a B0a S0  F1a B1a S1  F2a B2a L0a L1a L2a L0a2 L1a2 L2a2 S2"),
])
def test_the_schedule_of_a_link_that_reaches_two_stages_drawn(delay, microbatches, expected):
    steps = [Step(i, (4,) * count) for i, count in enumerate(microbatches)]
    assert drawn(program(steps, Role(sends=True, hops_out=(1, 2), hops_in=(1, 2)), delay)) == " ".join(expected.split())


def test_a_whole_program_drawn():
    assert program([Step(7, (4,))], LINKED, 1) == [
        Op(Kind.RECEIVE, 7, 0), Op(Kind.FORWARD, 7, 0), Op(Kind.SEND, 7, 0), Op(Kind.LOCAL_BACKWARD, 7, 0),
        Op(Kind.SEND_ERROR, 7, 0, 1), Op(Kind.RECEIVE_ERROR, 7, 0, 1), Op(Kind.LINK_BACKWARD, 7, 0, 1),
        Op(Kind.STEP, 7)]


def test_the_errors_are_sent_before_any_is_waited_for():
    """Else each stage would wait for the one after it: a chain."""
    ops = program([Step(0, (4,))], LINKED, 0)
    assert ops.index(Op(Kind.SEND_ERROR, 0, 0, 1)) < ops.index(Op(Kind.RECEIVE_ERROR, 0, 0, 1))


# A whole pipeline.

class Pipeline:
    """Stages in turn, each run until it needs a message or room; messages are (step, microbatch, hop)."""

    def __init__(self, programs, roles, capacity):
        self.programs = [iter(ops) for ops in programs]
        self.roles, self.capacity = roles, capacity
        self.activations = [deque() for _ in roles]  # from stage k
        self.errors = [deque() for _ in roles]  # to stage k
        self.waiting = [next(ops, None) for ops in self.programs]

    def run(self) -> None:
        """To the end of every program; asserts that there is always a stage that can go on."""
        while any(self.waiting):
            went_on = [self.advance(k) for k in range(len(self.programs))]
            assert any(went_on), f"deadlock: {self.waiting}"

    def advance(self, k: int) -> bool:
        start = self.waiting[k]
        while self.waiting[k] and self.can_run(k, self.waiting[k]):
            self.waiting[k] = next(self.programs[k], None)
        return self.waiting[k] is not start

    def can_run(self, k: int, op: Op) -> bool:
        message = (op.step, op.microbatch, op.hop)
        match op.kind:
            case Kind.SEND:
                if len(self.activations[k]) >= self.capacity:
                    return False
                self.activations[k].append(message)
            case Kind.SEND_ERROR:
                self.errors[k - 1].append(message)
            case Kind.RECEIVE if k > 0:
                return self.take(self.activations[k - 1], message)
            case Kind.RECEIVE_ERROR:
                return self.take(self.errors[k], message)
        return True

    @staticmethod
    def take(queue: deque, wanted: tuple[int, int, int]) -> bool:
        if not queue:
            return False
        assert queue.popleft() == wanted
        return True


def roles_of_a_pipeline(weights: list[float], reach, take="every") -> list[Role]:
    """The roles of a stage more than there are weights λ: a stage of weight 0 wants no error of its own."""
    link = LinkConfig(reach=reach, weight=tuple(weights), take=take) if weights else LinkConfig()
    hops_in = hops(MethodConfig(link=link), len(weights) + 1)
    return [Role(k < len(weights), hops_in[k - 1] if k else (), hops_in[k]) for k in range(len(hops_in))]


@PROPERTY
@given(steps=steps_of_any_size, delay=delays, weights=st.lists(st.sampled_from([0.0, 1.0]), max_size=5),
       reach=st.sampled_from([0, 1, 2, 3, "all"]), take=st.sampled_from(["every", "farthest"]),
       capacity=st.sampled_from([1, 2, 10**9]))
def test_a_pipeline_never_deadlocks_and_receives_what_was_sent_in_order(steps, delay, weights, reach, take, capacity):
    roles = roles_of_a_pipeline(weights, reach, take)
    pipeline = Pipeline([train_program(steps, role, delay) for role in roles], roles, capacity)
    pipeline.run()
    assert not any(pipeline.activations)
    assert not any(pipeline.errors)


@PROPERTY
@given(weights=st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=6), reach=st.integers(1, 7))
def test_every_stage_gets_the_errors_within_its_reach_and_no_more_than_are_needed(weights, reach):
    last = len(weights)
    for k, role in enumerate(roles_of_a_pipeline(weights, reach)[:-1]):
        from_here_on = [min(reach, last - j) - (k - j) for j in range(k + 1) if weights[j]]
        assert role.hops_in == tuple(range(1, max([0, *from_here_on]) + 1))


@PROPERTY
@given(steps=steps_of_any_size, delay=st.integers(1, 9), reach=st.integers(1, 4))
def test_with_a_delay_nothing_waits_for_the_next_stage_before_the_flush(steps, delay, reach):
    """A stage a microbatch ahead of the next one never has to wait for it: all that it takes has been sent."""
    roles = roles_of_a_pipeline([1.0] * 4, reach)
    for here, following in zip(roles, roles[1:], strict=False):
        sent = {(op.step, op.microbatch, op.hop): when for when, part in enumerate(by_microbatch(program(
            steps, following, delay))) for op in part if op.kind is Kind.SEND_ERROR}
        for when, part in enumerate(by_microbatch(program(steps, here, delay))[:-1]):
            assert all(sent[op.step, op.microbatch, op.hop] < when for op in part if op.kind is Kind.RECEIVE_ERROR)


@PROPERTY
@given(steps=steps_of_any_size, delay=st.integers(1, 9), reach=st.integers(1, 4),
       take=st.sampled_from(["every", "farthest"]))
def test_no_more_errors_are_under_way_before_the_flush_than_there_are_receives_for(steps, delay, reach, take):
    """Where the next stage has done all that it was sent."""
    roles = roles_of_a_pipeline([1.0] * 4, reach, take)
    assert [errors_ahead(delay, 4, len(role.hops_in)) for role in roles] == [len(role.hops_in) * (delay + 1)
                                                                             for role in roles]
    for here, following in zip(roles, roles[1:], strict=False):
        sent, taken = ([sum(op.kind is kind for op in part) for part in by_microbatch(program(steps, role, delay))]
                       for role, kind in ((following, Kind.SEND_ERROR), (here, Kind.RECEIVE_ERROR)))
        for n in range(len(sent) - 1):
            assert sum(sent[:n + 1]) - sum(taken[:n]) <= errors_ahead(delay, 1, len(here.hops_in))


@PROPERTY
@given(batches=st.integers(0, 6), stages=st.integers(1, 5), capacity=st.sampled_from([1, 10**9]))
def test_an_evaluation_sends_every_batch_through_every_stage_and_no_error_back(batches, stages, capacity):
    roles = roles_of_a_pipeline([1.0] * (stages - 1), 1)
    programs = [list(evaluation_program(batches, role)) for role in roles]
    for ops, role in zip(programs, roles, strict=True):
        everything = [(index, 0) for index in range(batches)]
        assert of_kind(ops, Kind.RECEIVE) == of_kind(ops, Kind.EVALUATE) == everything
        assert of_kind(ops, Kind.SEND) == (everything if role.sends else [])
        assert len(ops) == batches * (3 if role.sends else 2)
    pipeline = Pipeline(programs, roles, capacity)
    pipeline.run()
    assert not any(pipeline.activations)
