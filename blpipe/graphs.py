"""CUDA graphs: what a stage computes on a microbatch, recorded once, and then launched as a whole.

A stage of small kernels takes as long as the host needs to launch them one by one. A CUDA graph is launched at once,
but only repeats what was recorded: the same kernels on the same addresses ("CUDA Graphs" in the CUDA C++ Programming
Guide, and in torch's notes on CUDA semantics). So a microbatch has a recording to itself from its forward to its last
link backward. As many are made as are under way at a time, and later microbatches use them again. What happens outside
of them sees the same results as without: tensors that live until the recording is used again.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from blpipe.errors import RecordingError

Result = TypeVar("Result")

WARM_UP = 2  # microbatches that run as they are, so that libraries have started before anything is recorded


class Runner(Protocol):
    """How a stage runs the parts of what it computes on one microbatch.

    repeats: whether results live in memory that is overwritten when it runs a later microbatch.
    """

    repeats: bool

    def run(self, part: str, function: Callable[..., Result], *inputs: Tensor | float) -> Result:
        """`function(*inputs)`. Other tensors that it uses are the stage's own, or results of earlier parts.

        Args:
            part: a name, different for each function of a microbatch.
        """


class Plain:
    """Runs everything as it is: on the current stream, or on `stream`, between what that does before and after."""

    repeats = False

    def __init__(self, stream: torch.cuda.Stream | None = None):
        self._stream = stream

    def run(self, part: str, function: Callable[..., Result], *inputs: Tensor | float) -> Result:
        """See `Runner`."""
        if self._stream is None:
            return function(*inputs)
        return _on(self._stream, lambda: function(*inputs))


class Graph:
    """One function, recorded at the first call. Results are the same objects each time, their tensors overwritten.

    Args:
        stream: to record on.
        pool: where the memory that it allocates comes from.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: Any):
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream, self._pool = stream, pool
        self._inputs: list[Tensor] = []
        self._numbers: list[float | None] = []  # the inputs that are numbers, as last written

    def __call__(self, function: Callable[..., Result], inputs: tuple[Tensor | float, ...]) -> Result:
        """`function(*inputs)`; later calls launch what was recorded, on these inputs, and do not call `function`."""
        if self._graph is None:
            self._inputs = [torch.empty_like(x) if isinstance(x, Tensor)  # a float of Python has 64 bits
                            else torch.empty((), dtype=torch.float64, device=self._stream.device) for x in inputs]
            self._numbers = [None] * len(inputs)
        for at, (x, own) in enumerate(zip(inputs, self._inputs, strict=True)):
            if isinstance(x, Tensor):
                own.copy_(x)
            elif x != self._numbers[at]:
                own.fill_(x)
                self._numbers[at] = x
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            self._results = self._record(self._graph, function)
        self._graph.replay()
        result: Result = self._results
        return result

    def _record(self, graph: torch.cuda.CUDAGraph, function: Callable[..., Result]) -> Result:
        # Not by torch.cuda.graph, which waits for the whole device: a receive that was posted ahead may run there.
        def record() -> Result:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                results = function(*self._inputs)
            except BaseException:
                with suppress(RuntimeError):  # what went wrong is said by the first error
                    graph.capture_end()
                raise
            graph.capture_end()
            return results

        try:
            with _undisturbed():
                return _on(self._stream, record)
        except Exception as error:
            raise RecordingError(error) from error


class Recording:
    """The graphs of one microbatch on its way through a stage.

    They share memory with each other alone: what one of them no longer needs, a later one uses. Other microbatches
    run in between, so that each has memory of its own.
    """

    repeats = True

    def __init__(self, stream: torch.cuda.Stream):
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[str, Graph] = {}

    def run(self, part: str, function: Callable[..., Result], *inputs: Tensor | float) -> Result:
        """See `Runner`."""
        if part not in self._graphs:
            self._graphs[part] = Graph(self._stream, self._pool)
        return self._graphs[part](function, inputs)


class Recorder:
    """The recordings of one stage, for microbatches of the first size that comes twice in a row.

    Args:
        plain: runs what is not recorded.
        record: makes a recording; None to run everything as it is.
    """

    def __init__(self, plain: Runner | None = None, record: Callable[[], Runner] | None = None):
        self._plain, self._record = plain or Plain(), record
        self._seen = 0
        self._shape: torch.Size | None = None
        self._free: list[Runner] = []

    def begin(self, x: Tensor) -> Runner:
        """What runs the microbatch with this input."""
        if self._record is None:
            return self._plain
        if self._shape is None or (self._seen < WARM_UP and x.shape != self._shape):
            self._shape, self._seen = x.shape, 0
        if x.shape != self._shape:
            return self._plain
        self._seen += 1
        if self._seen <= WARM_UP:
            return self._plain
        return self._free.pop() if self._free else self._record()

    def end(self, runner: Runner) -> None:
        """Free its recording: its last part still runs before another microbatch begins."""
        if runner.repeats:
            self._free.append(runner)


def recorder_on(stream: torch.cuda.Stream | None) -> Recorder:
    """Records on this stream of a GPU; without one, runs everything as it is.

    What is not recorded runs on it too: autograd keeps the stream on which it first met a parameter, and waits for it
    in every backward, which a recording cannot.
    """
    return Recorder() if stream is None else Recorder(Plain(stream), lambda: Recording(stream))


def _on(stream: torch.cuda.Stream, function: Callable[[], Result]) -> Result:
    """`function()` on this stream, after what the current one does, and before what it does next."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        results = function()
    current.wait_stream(stream)
    return results


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without garbage collection: a graph that it found could not be destroyed while another one is recorded."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # a stage may be all tail
            yield
    finally:
        if collects:
            gc.enable()
