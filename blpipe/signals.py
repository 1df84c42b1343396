"""Signals while a run trains: SIGTERM and Ctrl-C ask it to stop, and Ctrl-C once more ends it, wherever it is."""

import os
import signal
from threading import current_thread, main_thread
from time import monotonic
from types import FrameType, TracebackType
from typing import Any

from blpipe import launch
from blpipe.errors import PeerLostError, StageError

_AGAIN_SECONDS = 0.5  # what comes sooner after a SIGINT is the same one, sent to a process and to its group
_WORD = "\nblpipe: stopping, to save the run; Ctrl-C again ends it at once\n"


class Signals:
    """While it is entered, SIGTERM and SIGINT are noted. After a SIGINT the next one raises KeyboardInterrupt.

    So does SIGTERM: as such torchrun passes a second Ctrl-C on. `asked_by` is the signal that has asked the run to
    stop, None if none has. Outside of the main thread, which alone hears signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.asked_by: signal.Signals | None = None
        self._interrupted_at: float | None = None
        self._process = os.getpid()

    def __enter__(self) -> "Signals":
        self._before: dict[signal.Signals, Any] = {}
        if current_thread() is not main_thread():
            return self
        self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._hear)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.asked_by is signal.SIGINT and isinstance(error, StageError | PeerLostError):
            raise KeyboardInterrupt from error  # of a process that was interrupted too

    def stop_asked(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self.asked_by is not None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # one that reads data, and was forked just now
            return
        if self._interrupted_at is not None:
            if monotonic() - self._interrupted_at > _AGAIN_SECONDS:
                raise KeyboardInterrupt
            return
        self.asked_by = signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupted_at = monotonic()
            if launch.rank() == 0:
                os.write(2, _WORD.encode())  # print may be at work already
