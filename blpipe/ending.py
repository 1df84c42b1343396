"""Whether a run ends before `train.epochs` are done: by `train.patience`, or by a function of the user's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from blpipe.errors import UserError, one_line
from blpipe.text import percent

Rows = Sequence[dict[str, Any]]
"""Of `metrics.jsonl`."""

OnEpoch = Callable[[list[dict[str, Any]]], object]
"""Called with the rows of each epoch, one a stage; the run ends where it returns False."""

PATIENCE, ON_EPOCH = "train.patience", "on_epoch"


@dataclass(frozen=True)
class Ending:
    """Why a run ends before its last epoch.

    Args:
        by: `train.patience` or `on_epoch`.
        why: in words.
        error: what is to be raised in this process, where `on_epoch` has raised; the run is not finished then.
    """

    by: str
    why: str
    error: BaseException | None = None

    @property
    def remedy(self) -> str:
        """What has the run go on."""
        return "go on with `train --resume RUN`" + " and a larger train.patience, or null" * (self.by == PATIENCE)

    def told(self) -> "Ending":
        """As the other processes are told of it."""
        return self if self.error is None else replace(self, error=UserError(f"rank 0: {self.why}"))


def by_patience(rows: Rows, patience: int | None) -> Ending | None:
    """Whether so many evaluations in a row were no better than the best before, the last of them after the last epoch.

    Args:
        rows: of all epochs done; an epoch's last one is the last stage's.
    """
    measured = [(row["epoch"], *_score(row)) for row in {row["epoch"]: row for row in rows}.values()]
    scores = [(epoch, score, shown) for epoch, score, shown in measured if score is not None]
    if patience is None or not scores or scores[-1][0] != measured[-1][0]:
        return None
    best = max(range(len(scores)), key=lambda i: scores[i][1])  # the first of them
    since = len(scores) - 1 - best
    if since < patience:
        return None
    return Ending(PATIENCE, f"no better than the {scores[best][2]} of epoch {scores[best][0]} in {since} "
                            f"evaluation{'s' * (since > 1)} ({PATIENCE})")


def _score(row: dict[str, Any]) -> tuple[float | None, str]:
    """The accuracy, or of values the loss, turned round; and in words."""
    if row["val_accuracy"] is not None:
        return row["val_accuracy"], f"accuracy {percent(row['val_accuracy'])}"
    return (None, "") if row["val_loss"] is None else (-row["val_loss"], f"loss {row['val_loss']:.4f}")


def by_on_epoch() -> Ending:
    """The user's function has said so."""
    return Ending(ON_EPOCH, f"{ON_EPOCH} returned False")


def notes_on_end(epochs: int, of: int, ending: Ending | None) -> list[str]:
    """A note where nothing is left to train after so many epochs `of` all."""
    if ending is not None:
        return [f"nothing is left to train: the run has ended after epoch {epochs}/{of}: {ending.why}; {ending.remedy}"]
    return [] if epochs < of else [f"nothing is left to train: all {epochs} epochs are done; give more by "
                                   "train.epochs=…"]


def after_epoch(rows: Rows, patience: int | None, on_epoch: OnEpoch | None) -> Ending | None:
    """Whether a run ends after the epoch of the last rows. Of the leading process; calls `on_epoch`."""
    if on_epoch is not None:
        try:
            answer = on_epoch([row for row in rows if row["epoch"] == rows[-1]["epoch"]])
            if isinstance(answer, bool | np.bool_) and not answer:
                return by_on_epoch()
        except (Exception, SystemExit) as error:
            return Ending(ON_EPOCH, f"{ON_EPOCH} raised {type(error).__name__}: {one_line(error)}", error)
    return by_patience(rows, patience)
