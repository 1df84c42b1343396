"""What the benchmarks' command lines share."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable

from benchmarks.environment import REPOSITORY
from blpipe.errors import UserError


def guarded(name: str, run: Callable[[], int], interrupted: str) -> int:
    """The exit code of `run`; a UserError is said under the benchmark's name and gives 2, and Ctrl-C 130.

    Args:
        interrupted: what becomes of the results then.
    """
    try:
        return run()
    except UserError as error:
        print("\n".join(f"{name}: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        return 130


def count(text: str) -> int:
    """An option's whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def run_processes(processes: int, module: str, argument: str) -> int:
    """Run `module` in so many processes under torchrun, one thread each; returns the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", module, argument]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
