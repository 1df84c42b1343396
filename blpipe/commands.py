"""The subcommands. Imports torch and all the rest: see cli.py for the command line itself."""

import json
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

from blpipe import api, launch, saved
from blpipe.comparison import compare as compare_runs
from blpipe.config_file import load_config
from blpipe.config_types import bytes_of
from blpipe.errors import ConfigError
from blpipe.forecast import report
from blpipe.forecast.picture import draw
from blpipe.metrics import evaluation_table


def train(arguments: Namespace) -> None:
    """`train`: a config, or on with a run."""
    config, overrides = arguments.config, arguments.overrides
    if arguments.resume:
        config, overrides = None, [*filter(None, [config]), *overrides]
        if any("=" not in override for override in overrides):
            raise ConfigError("--resume: goes on with the run's own config; give no CONFIG, only keys to change, such "
                              "as 'partition={stages: 2}'")
    api.start(config, overrides, overwrite=arguments.overwrite, resume=arguments.resume,
              auto_resume=arguments.auto_resume)


def plan(arguments: Namespace) -> None:
    """`plan`: what a config will cost."""
    _refuse_torchrun()
    config = load_config(arguments.config, arguments.overrides)
    stages = whole_numbers("--stages", arguments.stages)
    found = report.make_report(config, stages, arguments.latency, _bandwidth(arguments.bandwidth))
    print(json.dumps(report.as_json(found), indent=2) if arguments.json else report.as_text(found))
    if arguments.out:
        draw(found, Path(arguments.out))
    if arguments.trace:
        report.save_trace(found, Path(arguments.trace))


def _bandwidth(text: str | None) -> float | None:
    if text is None:
        return None
    with suppress(ValueError):
        return float(text)
    try:
        return float(bytes_of(text))
    except ValueError as error:
        raise ConfigError(f"--bandwidth: {text!r} {error}") from None


def whole_numbers(option: str, text: str | None) -> list[int]:
    """The numbers of an option such as `--stages 1,2,4`, in order; none where it was not given.

    Raises:
        ConfigError: others than whole numbers from 1 on.
    """
    words = [word for word in (text or "").split(",") if word]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"{option}: {text!r} must be whole numbers from 1 on, such as 1,2,4,8")
    return sorted({int(word) for word in words})


def evaluate(arguments: Namespace) -> None:
    """`eval`: a checkpoint's losses and accuracies on the test samples."""
    _refuse_torchrun()
    print(evaluation_table(api.evaluate(arguments.run, arguments.overrides, arguments.best, arguments.raw)))


def export(arguments: Namespace) -> None:
    """`export`: the plain model's weights."""
    _refuse_torchrun()
    saved.export_run(Path(arguments.run), Path(arguments.out), arguments.best, arguments.overwrite, arguments.raw)
    print(f"wrote {arguments.out}")


def compare(arguments: Namespace) -> None:
    """`compare`: what several runs came to."""
    _refuse_torchrun()
    found = compare_runs([Path(run) for run in arguments.runs])
    print(json.dumps(found.as_json(), indent=2) if arguments.json else found.as_text())


def _refuse_torchrun() -> None:
    if (launch.world_size() or 1) > 1:
        raise ConfigError("torchrun: only train runs in several processes; run `python -m blpipe …`")
