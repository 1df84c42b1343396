"""A discrete-event simulation of stage programs: who waits for whom, with given seconds and a given link.

The programs are the ones that the engines run (`blpipe.program`); for the baselines, those of `baselines`.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from blpipe.program import ACTIVATIONS_AHEAD, Kind, Op
from blpipe.trace import Span
from blpipe.transport.messages import IN_FLIGHT

_NEIGHBOUR: dict[Enum, int] = {Kind.SEND: 1, Kind.RECEIVE_ERROR: 1, Kind.SEND_ERROR: -1, Kind.RECEIVE: -1}


@dataclass(frozen=True)
class Connection:
    """What carries messages between neighbours, each direction by itself.

    Args:
        latency: seconds of a message on its way.
        bandwidth: bytes a second.
        host_seconds: what a message costs each end, whose stage computes nothing meanwhile.
        host_bandwidth: bytes a second that each end copies.
    """

    latency: float
    bandwidth: float
    host_seconds: float = 0.0
    host_bandwidth: float = float("inf")

    def all_reduce_seconds(self, size: int, processes: int) -> float:
        """Seconds that so many processes take to add up so many bytes, in a ring."""
        steps = 2 * (processes - 1)
        each = size / processes
        return steps * (self.latency + self.host_seconds + each / self.bandwidth + each / self.host_bandwidth)


# CPU: gloo over the loopback address, about 0.3 ms a round trip. CUDA: NCCL over NVLink; not measured.
CONNECTIONS = {"cpu": Connection(150e-6, 2e9, 100e-6, 4e9), "cuda": Connection(10e-6, 1e11)}


@dataclass
class Timeline:
    """What a simulation found: all spans, waiting left out, and when each stage ended each of its steps."""

    spans: list[Span]
    step_ends: list[list[float]]

    def seconds_per_step(self) -> float:
        """Of the slowest stage, once the pipeline has filled: the mean over half of the steps, the later ones.

        The last step is left out where there are enough, as it may have a flush. The last stage alone would not tell:
        in the first steps, without late links, those before it have got ahead.
        """
        return max(map(_later_mean, self.step_ends))


def _later_mean(ends: Sequence[float]) -> float:
    half = len(ends) // 2
    last = len(ends) - 1 - (len(ends) > 3)
    return (ends[last] - ends[last - half]) / half if half else ends[-1]


@dataclass
class _Channel:
    """The messages of one direction between two neighbours; arrivals are known once both ends are far enough."""

    connection: Connection
    size: int
    ahead: int                                        # receives posted before they are asked for
    put: list[float] = field(default_factory=list)
    got: list[float] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    free: float = 0.0                                 # when the connection is

    def arrival(self, number: int) -> float | None:
        """When this message has arrived; None while its sender or its receiver is not that far."""
        while len(self.arrived) <= number:
            n = len(self.arrived)
            if n >= len(self.put) or n - self.ahead >= len(self.got):
                return None
            posted = self.got[n - self.ahead] if n >= self.ahead else 0.0
            self.free = max(self.put[n], posted, self.free) + self.size / self.connection.bandwidth
            self.arrived.append(self.free + self.connection.latency)
        return self.arrived[number]

    def host_seconds(self) -> float:
        """What a message costs each end."""
        return self.connection.host_seconds + self.size / self.connection.host_bandwidth


def simulate(programs: Sequence[Iterator[Op]], seconds: Sequence[Mapping[Enum, float]], forward_bytes: Sequence[int],
             error_bytes: Sequence[int], connection: Connection,
             ahead: tuple[int, int] = (ACTIVATIONS_AHEAD, 1_000_000)) -> Timeline:
    """Run all stages' programs against each other.

    Args:
        programs: one a stage, over the same steps.
        seconds: by stage and by kind of operation; a kind that is not there takes no time.
        forward_bytes, error_bytes: of a message over each of the K−1 edges, forward and back.
        ahead: how many receives of activations and of errors are posted ahead.
    """
    return _Simulation(programs, seconds, forward_bytes, error_bytes, connection, ahead).run()


class _Simulation:
    def __init__(self, programs: Sequence[Iterator[Op]], seconds: Sequence[Mapping[Enum, float]],
                 forward_bytes: Sequence[int], error_bytes: Sequence[int], connection: Connection,
                 ahead: tuple[int, int]):
        self._programs, self._seconds = programs, seconds
        self._forward = [_Channel(connection, size, ahead[0]) for size in forward_bytes]
        self._errors = [_Channel(connection, size, ahead[1]) for size in error_bytes]
        self._clock = [0.0] * len(programs)
        self._timeline = Timeline([], [[] for _ in programs])

    def run(self) -> Timeline:
        stages = len(self._programs)
        pending = [next(program, None) for program in self._programs]
        ready, queued = deque(range(stages)), [True] * stages
        while ready:
            k = ready.popleft()
            queued[k] = False
            while (op := pending[k]) is not None and self._execute(k, op):
                pending[k] = next(self._programs[k], None)
                # A message that was sent or taken may be what a neighbour waits for.
                other = k + _NEIGHBOUR.get(op.kind, 0)
                if 0 <= other < stages and not queued[other]:
                    ready.append(other)
                    queued[other] = True
        assert not any(pending), "the stages' programs wait for each other"
        return self._timeline

    def _execute(self, k: int, op: Op) -> bool:
        """Advance stage k by one operation; False if it must wait for a neighbour that is not that far yet."""
        start, took = self._clock[k], self._seconds[k].get(op.kind, 0.0)
        if op.kind is Kind.RECEIVE and k > 0 or op.kind is Kind.RECEIVE_ERROR:
            channel = self._forward[k - 1] if op.kind is Kind.RECEIVE else self._errors[k]
            arrival = channel.arrival(len(channel.got))
            if arrival is None:
                return False
            start, took = max(start, arrival), channel.host_seconds()
            channel.got.append(start)
        elif op.kind in (Kind.SEND, Kind.SEND_ERROR):
            channel = self._forward[k] if op.kind is Kind.SEND else self._errors[k - 1]
            if len(channel.put) >= IN_FLIGHT:
                complete = channel.arrival(len(channel.put) - IN_FLIGHT)
                if complete is None:
                    return False
                start = max(start, complete)
            took = channel.host_seconds()
            channel.put.append(start + took)
        self._clock[k] = end = start + took
        if end > start:
            self._timeline.spans.append(Span(k, op, start, end))
        if op.kind is Kind.STEP:
            self._timeline.step_ends[k].append(end)
        return True
