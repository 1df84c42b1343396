"""What a run has saved, put to use: evaluated, or written as the plain model's weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blpipe import resume
from blpipe.checkpoint.state import load_weights, model_state
from blpipe.config import Config, OptimizerConfig, ScheduleConfig
from blpipe.config_file import Overrides
from blpipe.data import open_data
from blpipe.device import set_up
from blpipe.errors import UserError
from blpipe.files import put
from blpipe.metrics import stage_rows
from blpipe.plan import make_network, make_plan
from blpipe.text import say_notes
from blpipe.trainer import open_local


def evaluate_run(path: Path, overrides: Overrides = (), best: bool = False, raw: bool = False
                 ) -> list[dict[str, Any]]:
    """Evaluate a run's newest checkpoint, its best one, or the one at `path`.

    Returns the blocks, params, loss and accuracy of every stage.

    Args:
        overrides: of the config's data, and of how it is computed.
        raw: whether to take the weights that training goes on with, where there are averages of them.

    Raises:
        UserError: no run, no checkpoint, or no data; or a key that evaluation does not take.
    """
    found = _found(path, best)
    config = resume.evaluated_config(found, overrides)
    set_up(config)
    data = open_data(config.data, config.seed)
    config = _for_evaluation(config, data.spec.train_samples)
    plan = make_plan(config, data.spec, make_network(config, data.spec, pretrained=False))
    data.check_fits_model(plan.classes)
    engine = open_local(plan, data)
    load_weights(found, engine.stages.values(), averaged=not raw)
    engine.evaluate()
    reports = engine.reports()
    assert reports is not None
    say_notes([*data.notes_on_layout(), *data.notes()])
    return [stage | {"loss": report.val_loss, "accuracy": report.val_accuracy}
            for stage, report in zip(stage_rows(plan), reports, strict=True)]


def _for_evaluation(config: Config, train_samples: int) -> Config:
    """The config with batches for training that any data have, and without what only training needs."""
    method, train = config.method, config.train
    return config.model_copy(update={
        "method": method.model_copy(update={"link": method.link.model_copy(update={"schedule": ScheduleConfig()})}),
        "optimizer": OptimizerConfig(), "schedule": ScheduleConfig(),
        "train": train.model_copy(update={
            "batch_size": min(train.batch_size, train_samples), "replicas": 1, "microbatches": 1, "drop_last": True,
            "ema": None, "eval_batch_size": train.eval_batch_size or train.batch_size})})


def state_of_run(path: Path, best: bool = False, raw: bool = False) -> dict[str, Tensor]:
    """The plain model's state_dict of a run's newest checkpoint, its best, or the one at `path`. Raises UserError.

    Args:
        raw: see `evaluate_run`.
    """
    return model_state(_found(path, best), averaged=not raw)


def export_run(path: Path, out: Path, best: bool = False, overwrite: bool = False, raw: bool = False) -> None:
    """Write what `state_of_run` returns, by torch.save.

    Args:
        overwrite: whether to replace a file that is there.
        raw: see `evaluate_run`.

    Raises:
        UserError: no run or no checkpoint, or `out` is there or cannot be written.
    """
    state = state_of_run(path, best, raw)
    if out.is_file() and not overwrite:
        raise UserError(f"--out: {out} exists; say --overwrite, or give another name")

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # whose errors say what is wrong, as those of torch's own do not
            torch.save(state, file)

    try:
        put(out, write)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "it could not be written whole; is the disk full?"
        raise UserError(f"--out: cannot write {out}: {why}; give a file's name in a folder that is there") from error


def _found(path: Path, best: bool) -> Path:
    start_point = resume.find(path, best)
    say_notes(start_point.notes)
    assert start_point.checkpoint is not None
    return start_point.checkpoint
