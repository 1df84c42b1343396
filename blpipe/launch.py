"""How this process was started, from torchrun's environment. Imports nothing heavy."""

import os
import signal


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


def restarted_run() -> str | None:
    """The name of this launch, where torchrun has started these processes before, and they have failed."""
    return run_name() if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 else None


def run_name() -> str:
    """A name of this launch, the same after each restart: torchrun's, which may be any launch's, and its process."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {os.getppid()}"
