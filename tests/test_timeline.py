"""The timelines in the two READMEs are those of the programs that the engines run."""

import pytest
from conftest import REPOSITORY

from blpipe.forecast.simulate import Connection, simulate
from blpipe.program import Kind, Role, train_program
from blpipe.steps import Step

TEXT = "".join((REPOSITORY / page).read_text() for page in ("README.md", "blpipe/README.md"))
COST = {Kind.FORWARD: 1, Kind.LOCAL_BACKWARD: 2, Kind.LINK_BACKWARD: 1}
LETTER = {Kind.FORWARD: "F", Kind.LOCAL_BACKWARD: "B", Kind.LINK_BACKWARD: "L"}


def draw(stages: int, steps: int, microbatches: int, delay: int) -> str:
    """Every stage's work over time, if a forward takes 1, a local backward 2, a link 1 and a message nothing."""
    plan = [Step(index, (1,) * microbatches) for index in range(steps)]
    last = stages - 1
    programs = [train_program(plan, Role(k < last, (1,) * (k > 0), (1,) * (k < last)), delay) for k in range(stages)]
    sizes, free = [0] * (stages - 1), Connection(latency=0.0, bandwidth=float("inf"))
    timeline = simulate(programs, [COST] * stages, sizes, sizes, free)
    width = int(max(span.end for span in timeline.spans))
    rows = [["..."] * width for _ in range(stages)]
    for span in timeline.spans:
        number = span.op.step if microbatches == 1 else span.op.microbatch
        for time in range(int(span.start), int(span.end)):
            rows[span.stage][time] = f"{LETTER[span.op.kind]}{number} "
    return "\n".join(f"stage {k + 1}  " + "".join(row).rstrip() for k, row in enumerate(rows))


@pytest.mark.parametrize(("steps", "microbatches", "delay"), [(3, 1, 0), (1, 4, 0), (2, 4, 1), (4, 1, 1)])
def test_the_readme_draws_what_the_programs_do(steps, microbatches, delay):
    drawn = draw(3, steps, microbatches, delay)
    assert drawn in TEXT, f"\n{drawn}"
