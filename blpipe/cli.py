"""The command line: how it is read, and what each kind of error prints and returns."""

import argparse
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from io import TextIOWrapper
from types import ModuleType
from typing import NoReturn, TextIO

import blpipe
from blpipe import launch
from blpipe.errors import CheckpointError, NonFiniteError, PeerLostError, StageError, StoppedError, UserError

_EXAMPLES = """\
examples:
  torchrun --standalone --nproc-per-node=4 -m blpipe train configs/quickstart.yaml
  python -m blpipe train configs/quickstart.yaml train.epochs=3 name=short
  python -m blpipe plan configs/quickstart.yaml partition.strategy=balanced --out plan.png
  python -m blpipe eval runs/quickstart
  python -m blpipe export runs/quickstart --out model.pt
  python -m blpipe compare runs/quickstart runs/short

exit codes: 0 done, 1 failed while running, 2 bad usage or config, 130 interrupted by Ctrl-C, 141 if the reader of the
output has gone, 143 by SIGTERM; torchrun itself returns 1 for all but the first"""

_RUN_OR_CHECKPOINT = "a run folder, such as runs/quickstart, or one of its checkpoints/step_…"
_BEST = "the checkpoint that training evaluated as best (by accuracy, of values by loss), of those that were kept"
_RAW = "the weights that training goes on with; else, where train.ema has averages of them, these"
_GRACE_SECONDS = 2.0  # between SIGTERM and the end of a process under torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code, or raises SystemExit with it."""
    if launch.under_torchrun():
        # Once one process has ended, torchrun ends the others: first let them find out and say what happened.
        launch.outlive_sigterm(_GRACE_SECONDS)
    _open_streams()
    arguments = None
    try:
        arguments = _parse(argv)
        try:
            return _main(arguments)
        finally:
            _flush(may_lose=arguments.command == "train")
    except KeyboardInterrupt:
        _end_interrupted(arguments is not None and arguments.command == "train")
    except BrokenPipeError:  # who read what we print has gone, as in `plan … | head -1`
        _drop(sys.stdout)
        return 128 + signal.SIGPIPE


def _flush(may_lose: bool) -> None:
    """Write out all that was printed.

    What may be lost is dropped where there is no room, as on a full disk; on stderr always, as the exit code says it
    too.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if stream is sys.stdout and (isinstance(error, BrokenPipeError) or not may_lose):
                raise
            _drop(stream)


def _drop(stream: TextIO) -> None:
    """Let what is still to be written go nowhere: else the interpreter's last flush fails, and sets the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_streams() -> None:
    """Have stdout and stderr take all that is printed, line by line: a file shows at once how far a run is."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # as the shell has closed it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that lacks a character shows another
            stream.reconfigure(errors="replace", line_buffering=True)


def _main(arguments: argparse.Namespace) -> int:
    command = getattr(load_commands(), arguments.command)
    from torch.distributed.elastic.multiprocessing.errors import record
    try:
        (record(_run) if launch.under_torchrun() else _run)(command, arguments)
        return 0
    except (StageError, PeerLostError, CheckpointError) as error:
        if not launch.under_torchrun():
            if error.__cause__ is not None and not isinstance(error.__cause__, NonFiniteError):
                traceback.print_exception(error.__cause__)
            _report(str(error))
            return 1
        _report(str(error))  # the recorded traceback stands in torchrun's own summary
        _leave(1)


@cache  # a second call would keep what is garbage by then
def load_commands() -> ModuleType:
    """The commands, with torch and all that they need: seconds, for which --help and usage errors need not wait.

    What modules hold lives as long as the process. Freezing it keeps the garbage collector from scanning it: a process
    starts and ends in a third less time, and the scans while it trains are shorter too.
    """
    gc.disable()
    try:
        from blpipe import commands
        gc.freeze()
    finally:
        gc.enable()
    return commands


def _end_interrupted(trained: bool) -> NoReturn:
    text = "interrupted" + trained * "; `train --resume RUN` goes on from the last checkpoint, if there is one"
    if not launch.under_torchrun():
        _say(text)
        raise SystemExit(130) from None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it would end this process before it has spoken
    if load_commands.cache_info().currsize:
        _report(text)
    elif launch.rank() == 0:  # torch may be half loaded: the others cannot be asked
        _say(text)
    _leave(130)


def _leave(code: int) -> NoReturn:
    """End at once: an ordinary exit could wait for messages that nobody sends any more."""
    _flush(may_lose=True)
    os._exit(code)


def _run(command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    try:
        command(arguments)
    except UserError as error:
        _report(str(error))
        raise SystemExit(2) from error
    except StoppedError as error:
        if launch.rank() == 0:
            _say(str(error))
        raise SystemExit(error.exit_code) from None


def _report(text: str) -> None:
    """Print each line to stderr, from one rank alone: what one meets, others meet too, or lose a neighbour by it."""
    ending = 0 < signal.getitimer(signal.ITIMER_REAL)[0] < _GRACE_SECONDS / 2  # as are the others: nobody is to blame
    if not launch.under_torchrun() or (not ending and _is_reporter()):
        _say(text)
    elif not signal.getitimer(signal.ITIMER_REAL)[0]:
        time.sleep(1)  # once a rank has ended, torchrun ends the others: let the reporter speak


def _say(text: str) -> None:
    with suppress(OSError):  # see `_flush`
        print("\n".join(f"blpipe: {line}" for line in text.splitlines()), file=sys.stderr, flush=True)


def _is_reporter() -> bool:
    from blpipe.transport.world import is_reporter
    try:
        return is_reporter(timeout_seconds=10)
    except (RuntimeError, ValueError):  # no store there (any more): better twice than never
        return True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Bad usage is one line too."""
        _report(f"{message}; see {self.prog} --help")
        raise SystemExit(2)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no positional after an option: `train CONFIG --overwrite key=value`.
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "overrides")):
        keys = "; a key of the config is set by key.sub=value" if any(word.startswith("--") for word in rest) else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{keys}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="blpipe", description="Pipeline training with BackLink: one process a stage "
                                     "under torchrun, or all stages in one process.", epilog=_EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"blpipe {blpipe.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train a config",
                                description="Train a config. Under torchrun each process is a stage; without it, all "
                                            "stages run in this one, with the same results.")
    train.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")
    train.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="keys to set over the file's")
    train.add_argument("--overwrite", action="store_true", help="replace the run that the run folder holds")
    train.add_argument("--resume", metavar="RUN", help="go on with this run folder from its last intact checkpoint, or "
                                                       "from one of its checkpoints, removing later ones")
    train.add_argument("--auto-resume", action="store_true",
                       help="go on where the run folder holds a checkpoint, else begin; as restarts by torchrun do")
    train.set_defaults(command="train")

    plan = commands.add_parser("plan", help="show what a config will cost before it runs",
                               description="Measure every block, cut the model and simulate its stages. Nothing is "
                                           "trained, and no other process is needed.")
    plan.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value",
                      help="keys to set over the file's; partition.costs=analytic runs nothing")
    plan.add_argument("--stages", metavar="1,2,4,…", help="also simulate these numbers of stages")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument("--out", metavar="FILE.png", help="draw the timeline, and with --stages the scaling curve")
    plan.add_argument("--trace", metavar="FILE.json", help="write the timeline for ui.perfetto.dev")
    plan.add_argument("--latency", type=float, metavar="SECONDS", help="of a message between two stages")
    plan.add_argument("--bandwidth", metavar="BYTES", help="a second, between two stages, such as 10GB")
    plan.set_defaults(command="plan")

    evaluate = commands.add_parser("eval", help="evaluate a run's last checkpoint, or any other",
                                   description="Evaluate every stage's head on the test samples.")
    evaluate.add_argument("run", metavar="RUN", help=_RUN_OR_CHECKPOINT)
    evaluate.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value",
                          help="keys to set over the run's: of data, of runtime, and how it is computed")
    evaluate.add_argument("--best", action="store_true", help=_BEST)
    evaluate.add_argument("--raw", action="store_true", help=_RAW)
    evaluate.set_defaults(command="evaluate")

    export = commands.add_parser("export", help="write the plain model's weights",
                                 description="Write the plain model's state_dict under the model's own names.")
    export.add_argument("run", metavar="RUN", help=_RUN_OR_CHECKPOINT)
    export.add_argument("--best", action="store_true", help=_BEST)
    export.add_argument("--raw", action="store_true", help=_RAW)
    export.add_argument("--out", required=True, metavar="FILE", help="where to, such as model.pt")
    export.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    export.set_defaults(command="export")

    compare = commands.add_parser("compare", help="show what several runs came to, side by side",
                                  description="Accuracy, speed and memory of runs, finished or not, and the keys in "
                                              "which they differ.")
    compare.add_argument("runs", nargs="*", metavar="RUN", help="run folders; if there is none, all in runs/")
    compare.add_argument("--json", action="store_true", help="print JSON instead of tables")
    compare.set_defaults(command="compare")
    return parser
