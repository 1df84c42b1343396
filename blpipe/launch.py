"""How this process was started, from torchrun's environment. Imports nothing heavy."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from uuid import UUID


def under_torchrun() -> bool:
    """Whether a launcher has said who this process is and where the others meet."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def world_size() -> int | None:
    """How many processes torchrun started; None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else None


def rank() -> int:
    """This process's rank; 0 without torchrun."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


def outlive_sigterm(seconds: float) -> None:
    """From now on, SIGTERM ends this process only after so many seconds."""
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, seconds))


def is_restarted() -> bool:
    """Whether torchrun has started these processes before, and they have failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def run_name() -> str:
    """A name of this launch, the same after each restart.

    It is torchrun's id of the run. One that a user gave, or the one without a user's, may be another launch's too: only
    with torchrun's process and when that began is it a name.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    try:
        return str(UUID(name))  # as with --standalone: no other launch has it
    except ValueError:
        return f"{name} {_launcher(name)}"


def has_this_id(name: str) -> bool:
    """Whether the name is of a launch that has the same id, if not of this one."""
    return name.startswith(os.environ.get("TORCHELASTIC_RUN_ID", "") + " ")


def _launcher(run_id: str) -> str:
    """The nearest ancestor whom nobody has given this id, and when it began, in clock ticks since the machine did.

    Whatever stands between torchrun and this process, such as a shell script, is a new process after each restart.
    """
    process, given = os.getppid(), f"TORCHELASTIC_RUN_ID={run_id}".encode()
    while given in _read(process, "environ").split(b"\0"):
        process = int(_status(process)[1])
    return " ".join([str(process), *_status(process)[19:20]])


def _status(process: int) -> list[str]:
    """The fields of a process's `stat` after its name, which may hold anything."""
    return _read(process, "stat").decode(errors="replace").rpartition(")")[2].split()


def _read(process: int, name: str) -> bytes:
    with suppress(OSError):  # another user's, or outside of this container
        return Path("/proc", str(process), name).read_bytes()
    return b""
