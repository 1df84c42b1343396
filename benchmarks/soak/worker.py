"""One stage of every run, started by torchrun; see __main__.py.

    python -m benchmarks.soak.worker JOB.json
"""

import ctypes
import gc
import json
import os
import sys
import traceback
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Any

import torch
from torch import Tensor

from benchmarks.soak.cases import CASES, STALLS, outcome, same, tree
from blpipe import launch
from blpipe.config_file import parse_config
from blpipe.runs import train_run
from blpipe.transport.queues import ReceiveQueue, SendQueue
from blpipe.transport.world import meet

SAMPLE_SECONDS = 0.25  # between two looks at the resident size


@dataclass
class Count:
    """Of one queue: its messages, and the stalls before them."""

    messages: int = 0
    stalls: int = 0
    seconds: float = 0.0
    longest: float = 0.0


class Disturbance:
    """Sleeps now and then before this process sends or receives, and looks at its resident size meanwhile."""

    def __init__(self, seed: int, rank: int, times: int):
        self._random = Random(f"{seed} {rank}")
        self._stalls = [(times * probability, *seconds) for probability, *seconds in STALLS]
        self._looked = monotonic()
        self.resident: list[int] = []  # bytes
        self.counts: defaultdict[str, Count] = defaultdict(Count)

    def inject(self) -> None:
        """Disturb every queue of this process."""
        put, get = SendQueue.put, ReceiveQueue.get

        def late_put(queue: SendQueue, *tensors: Tensor) -> None:
            self._note("send", tensors, self._stall())
            put(queue, *tensors)

        def late_get(queue: ReceiveQueue) -> tuple[Tensor, ...]:
            stalled = self._stall()
            tensors = get(queue)
            self._note("receive", tensors, stalled)
            return tensors

        SendQueue.put, ReceiveQueue.get = late_put, late_get  # type: ignore[method-assign]

    def _stall(self) -> float:
        if monotonic() - self._looked > SAMPLE_SECONDS:
            self._looked = monotonic()
            self.resident.append(resident_bytes())
        seconds, drawn = 0.0, self._random.random()
        for probability, shortest, longest in self._stalls:
            if 0 <= drawn < probability:
                seconds = self._random.uniform(shortest, longest)
            drawn -= probability
        if seconds:
            sleep(seconds)
        return seconds

    def _note(self, end: str, tensors: tuple[Tensor, ...], stalled: float) -> None:
        # Activations travel with their targets, errors alone.
        count = self.counts[f"{end} {'activations' if len(tensors) == 2 else 'errors'}"]
        count.messages += 1
        count.stalls += stalled > 0
        count.seconds += stalled
        count.longest = max(count.longest, stalled)


def give_back() -> None:
    """Give the system what nobody holds: else the resident size shows what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(job: dict[str, Any]) -> None:
    """Round after round of every case, until the time is over; rank 0 compares each run with the undisturbed one.

    Every rank leaves what it counted in a file of its own.
    """
    rank, started, number = launch.rank(), monotonic(), 0
    expected = {case: torch.load(path) for case, path in job["expected"].items()} if rank == 0 else {}
    disturbance = Disturbance(job["seed"], rank, job["stalls"])
    disturbance.inject()
    rounds = []
    while _should_run(number == 0 or monotonic() - started < 60 * job["minutes"]):
        disturbance.resident = []
        for position, case in enumerate(CASES):
            config = parse_config(tree(case, f"run{number}-{position}", job["epochs"], job["runs"]))
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
                train_run(config)
                give_back()
            if rank == 0 and not same(outcome(Path(job["runs"]) / config.name), expected[case]):
                raise AssertionError(f"round {number + 1}: {case}: not the results of the undisturbed run")
        rounds.append(disturbance.resident)
        number += 1
        if rank == 0:
            print(f"soak: round {number}, {monotonic() - started:.0f} s", flush=True)
    found = {"seconds": monotonic() - started, "resident_bytes": rounds,
             "queues": {name: asdict(count) for name, count in disturbance.counts.items()}}
    Path(job["out"], f"rank{rank}.json").write_text(json.dumps(found))


def _should_run(wanted: bool) -> bool:
    """What rank 0 wants."""
    meeting = meet(60.0)
    if meeting.rank == 0:
        meeting.announce({"should_run": wanted})
    return meeting.listen()["should_run"]


if __name__ == "__main__":
    try:
        main(json.loads(Path(sys.argv[1]).read_text()))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit could wait for messages that nobody sends any more
