"""Timelines, measured or simulated, as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import time
from typing import NamedTuple

from blpipe.files import write_text
from blpipe.program import Op


class Span(NamedTuple):
    """One operation of one stage (from 0), in seconds of one clock for all stages."""

    stage: int
    op: Op
    start: float
    end: float


class SpanLog:
    """Writes down when operations begin and end, for the first steps of a run.

    Args:
        steps: operations of this step of the run and later ones are left out.
    """

    def __init__(self, steps: int):
        self._steps = steps
        self._open: dict[int, tuple[Op, float]] = {}
        self.spans: list[Span] = []

    def begin(self, stage: int, op: Op) -> None:
        """An operation begins; the stage's last one, if it still runs, ends."""
        self.end(stage)
        if op.step < self._steps:
            self._open[stage] = (op, time())

    def end(self, stage: int) -> None:
        """The stage's operation ends, or pauses for other stages of the process."""
        if stage in self._open:
            op, start = self._open.pop(stage)
            self.spans.append(Span(stage, op, start, time()))


def write_trace(path: Path, spans: Iterable[Span], stages: Sequence[str]) -> None:
    """Write spans in the trace-event format, one row a stage.

    Args:
        stages: a name for each, such as its blocks.

    Raises:
        OSError: `path` cannot be written.
    """
    spans = list(spans)
    first = min((span.start for span in spans), default=0.0)
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": k, "args": {"name": f"stage {k + 1}: {name}"}}
        for k, name in enumerate(stages)]
    events += [{"ph": "X", "name": str(span.op.kind.value), "cat": "stage", "pid": 0, "tid": span.stage,
                "ts": round(1e6 * (span.start - first), 3), "dur": round(1e6 * (span.end - span.start), 3),
                "args": {"step": span.op.step, "microbatch": span.op.microbatch}} for span in spans]
    write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
