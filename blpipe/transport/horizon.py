"""How far the stages go before they stop together, where they are asked to."""

from collections.abc import Callable
from time import monotonic, perf_counter, sleep

from blpipe.errors import PeerLostError
from blpipe.transport.world import Meeting

_PATIENCE = 5.0  # seconds, of a process that has been told to end
_SECONDS = 1.0  # about as far ahead as the first stage promises steps


class Horizon:
    """Which steps are done: all of them, until a stop is wanted, then those that have been promised.

    Stages run apart, so none can stop by itself. The first one, which no other overtakes, promises the next second's
    steps or so to all, in good time, and stops promising once any process wants to stop. Then each ends its program
    before the same step. When that is depends on timing; what a run computes does not.

    Args:
        stop_wanted: whether this process has been asked to stop.
        meeting: with the other processes; None where there is one.
        ahead: how many steps ahead of the first stage another one may ask.
    """

    def __init__(self, start: int, stop_wanted: Callable[[], bool], meeting: Meeting | None = None,
                 ahead: int = 0):
        self._stop_wanted, self._meeting, self._ahead = stop_wanted, meeting, ahead
        self._until = start  # steps before this one are promised
        self._ends = self._asked = False
        self._promises = 0
        self._start, self._started = start, perf_counter()
        self._further = 1  # steps of a promise

    def covers(self, step: int) -> bool:
        """Whether this step is to be done; every stage asks before it begins one."""
        if self._meeting is not None and self._meeting.rank > 0:
            while step >= self._until and not self._ends:
                self._hear(self._meeting)
        elif step + self._ahead >= self._until and not self._ends:
            self._promise(step)
        return step < self._until

    def _promise(self, step: int) -> None:
        if self._stop_wanted() or (self._meeting is not None and self._meeting.stop_asked()):
            self._ends = True
        else:
            if self._meeting is not None:
                in_time = int(_SECONDS * (step - self._start) / (perf_counter() - self._started))
                self._further = max(1, min(in_time, 2 * self._further))
            self._until = step + self._ahead + self._further
        if self._meeting is not None:
            self._meeting.promise(self._promises, {"until": self._until, "ends": self._ends})
            self._promises += 1

    def _hear(self, meeting: Meeting) -> None:
        if self._stop_wanted() and not self._asked:
            self._asked = True
            meeting.ask_to_stop()
        began = monotonic()
        while (promise := meeting.promised(self._promises)) is None:
            patience = _PATIENCE if self._stop_wanted() else meeting.timeout_seconds
            if monotonic() - began > patience:
                raise PeerLostError(f"rank {meeting.rank} waiting for rank 0 to promise steps: that process ended, or "
                                    "did not answer within runtime.timeout_seconds")
            sleep(0.01)  # not in the store, where no signal is heard
        self._promises += 1
        self._until, self._ends = promise["until"], promise["ends"]
