"""What the benchmarks' command lines share."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.environment import REPOSITORY
from blpipe.errors import UserError

if TYPE_CHECKING:  # the sweep of accuracies does without torch
    import torch


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


def device_for(wanted: str, stages: int) -> "torch.device":
    """Where so many processes compute: each on a GPU of its own, or on the CPU. Raises UserError."""
    import torch

    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return torch.device("cpu")
    if gpus < stages:
        raise UserError(f"--device: {wanted}, but {stages} stages need a GPU each, and torch sees {gpus} here; give "
                        "--device cpu, or fewer --stages")
    return torch.device("cuda")


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread, as a stage does on a CPU, and afterwards with as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_processes(processes: int, module: str, argument: str) -> int:
    """Run `module` in so many processes under torchrun, one thread each; returns the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", module, argument]
    with subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}) as torchrun:
        try:
            return torchrun.wait()
        except BaseException:
            torchrun.terminate()  # it ends its processes, which would outlive it if it were killed
            torchrun.wait()
            raise
