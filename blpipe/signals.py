"""Signals while a run trains: SIGTERM asks it to stop, and Ctrl-C ends it, wherever it is."""

import signal
from types import FrameType, TracebackType
from typing import NoReturn

from blpipe.errors import StageError


class Signals:
    """While it is entered, SIGTERM is noted, and SIGINT noted and raised as KeyboardInterrupt.

    Python drops what is raised while an object is deleted, such as the reader of an epoch's data: `check` raises it
    again.
    """

    def __init__(self) -> None:
        self._stop_asked = self._interrupted = False

    def __enter__(self) -> "Signals":
        self._before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._ask_to_stop)}
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._interrupted and isinstance(error, StageError):  # of a process that was interrupted too
            raise KeyboardInterrupt from error

    def stop_asked(self) -> bool:
        """Whether SIGTERM has come."""
        return self._stop_asked

    def check(self) -> None:
        """Raises KeyboardInterrupt where that was dropped."""
        if self._interrupted:
            raise KeyboardInterrupt

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_asked = True

    def _interrupt(self, number: int, frame: FrameType | None) -> NoReturn:
        self._interrupted = True
        raise KeyboardInterrupt
