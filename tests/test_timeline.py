"""The timelines in the README are those of the programs that the engines run."""

import pytest
from conftest import REPOSITORY

from blpipe.plan import Step
from blpipe.program import Kind, Role, train_program

COST = {Kind.FORWARD: 1, Kind.LOCAL_BACKWARD: 2, Kind.LINK_BACKWARD: 1}
LETTER = {Kind.FORWARD: "F", Kind.LOCAL_BACKWARD: "B", Kind.LINK_BACKWARD: "L"}


def draw(stages: int, steps: int, microbatches: int, delay: int) -> str:
    """Every stage's work over time, if a forward takes 1, a local backward 2, a link 1 and a message nothing."""
    plan = [Step(index, (1,) * microbatches) for index in range(steps)]
    programs = [list(train_program(plan, Role(k < stages - 1, k > 0, k < stages - 1), delay)) for k in range(stages)]
    clock, rows, sent = [0] * stages, [[] for _ in range(stages)], {}
    while any(programs):
        for k, program in enumerate(programs):
            while program:
                op = program[0]
                source = {Kind.RECEIVE: (k - 1, Kind.SEND), Kind.RECEIVE_ERROR: (k + 1, Kind.SEND_ERROR)}.get(op.kind)
                if source and source[0] >= 0:
                    arrival = sent.get((*source, op.step, op.microbatch))
                    if arrival is None:
                        break
                    clock[k] = max(clock[k], arrival)
                sent[k, op.kind, op.step, op.microbatch] = clock[k]
                if op.kind in COST:
                    rows[k] += ["..."] * (clock[k] - len(rows[k]))
                    label = f"{LETTER[op.kind]}{op.step if microbatches == 1 else op.microbatch} "
                    rows[k] += [label] * COST[op.kind]
                    clock[k] += COST[op.kind]
                program.pop(0)
    width = max(map(len, rows))
    return "\n".join(f"stage {k + 1}  " + "".join(row + ["..."] * (width - len(row))).rstrip()
                     for k, row in enumerate(rows))


@pytest.mark.parametrize(("steps", "microbatches", "delay"), [(3, 1, 0), (1, 4, 0), (4, 1, 1)])
def test_the_readme_draws_what_the_programs_do(steps, microbatches, delay):
    drawn = draw(3, steps, microbatches, delay)
    assert drawn in (REPOSITORY / "README.md").read_text(), f"\n{drawn}"
