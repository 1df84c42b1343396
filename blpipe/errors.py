"""The errors that users see, each with the exit code that the command line gives it."""

import signal
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right: bad usage, config, data or plug-in. Exit code 2.

    `str()` is one line per problem: the key, the value and the remedy.
    """


class DamagedError(UserError):
    """A checkpoint that is not what was written."""


class ConfigError(UserError):
    """One or more problems with the config, each "key.path: what is wrong and what to do"."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class StageError(RuntimeError):
    """An error inside one stage while it ran. Exit code 1.

    Args:
        stage: the stage's number, from 1.
        rank: of its process, where each has one.
        blocks: the names of the stage's blocks.
        where: the step or the phase, for example "step 17".
        cause: the error as it was raised.
        remedy: what may help, if that is known.
    """

    def __init__(self, stage: int, rank: int, blocks: Iterable[str], where: str, cause: BaseException,
                 remedy: str = ""):
        names = list(blocks)
        span = names[0] if len(names) == 1 else f"{names[0]}…{names[-1]}"
        reason = f"{type(cause).__name__}: {one_line(cause)}".removesuffix(": ")
        super().__init__(f"stage {stage} (rank {rank}, blocks {span}) failed at {where}: {reason}"
                         + (f"; {remedy}" if remedy else ""))
        self.stage = stage


class NonFiniteError(RuntimeError):
    """A stage's loss is NaN or infinite, or its weights are. Exit code 1."""

    def __init__(self) -> None:
        super().__init__("its loss or weights are NaN or infinite; lower optimizer.lr, look at the data, or set "
                         "train.on_nonfinite to skip or ignore")


class RecordingError(RuntimeError):
    """What a stage computes could not be recorded as CUDA graphs. Exit code 1."""

    def __init__(self, cause: BaseException):
        super().__init__("it could not be recorded as CUDA graphs, often because something waits for the GPU or memory "
                         f"is short; set runtime.cuda_graphs=false ({type(cause).__name__}: {one_line(cause)})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Exit code 1."""


class StoppedError(RuntimeError):
    """The run was asked to stop by a signal, and has: it is saved. Exit code 130 by SIGINT, 143 by SIGTERM.

    Args:
        step: how many steps are done.
        run: its folder.
        by: the signal.
    """

    def __init__(self, step: int, run: Path, by: signal.Signals):
        how = "interrupted" if by is signal.SIGINT else f"stopped by {by.name}"
        super().__init__(f"{how} after step {step}, and saved; `train --resume {run}` goes on")
        self.exit_code = 128 + by


class PeerLostError(RuntimeError):
    """A neighbour of this stage ended or did not answer in time. Exit code 1."""


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return printable(" ".join(str(error).split()), 1000)


def printable(text: str, longest: int = 200) -> str:
    """Text from outside as it can stand in a message: without control characters, and cut where it is long."""
    cut = text if len(text) <= longest else f"{text[:longest]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
