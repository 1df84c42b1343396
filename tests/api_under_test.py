"""What each of two processes does by `blpipe.train`, one run after the other; see ranks.py."""

import os
import time

import pytest
from models_under_test import conv_net, failing_net

import blpipe


class Pruned(Exception):
    """Of a user's search."""


def prune(rows):
    """End the run after its first epoch."""
    raise Pruned("hopeless")


def search_without_failures(tree):
    """As `search`, over NCCL, which no failed stage leaves."""
    search(tree, failures=False)


def search(tree, failures=True):
    """Runs that end early, fail, are refused, or are as any other."""
    leads, seen = os.environ["RANK"] == "0", []
    tree["model"] = {"target": conv_net}

    def until_the_second(rows):
        seen.append([(row["epoch"], row["stage"]) for row in rows])
        return len(seen) < 2

    def come_to(epochs, ended_by, **changes):
        result = blpipe.train(tree, **changes)
        assert (result and (result["epochs"], result["steps"], result["ended_by"])) == (
            (epochs, 6 * epochs, ended_by) if leads else None)

    come_to(3, "train.patience", overrides={"name": "patient", "train.patience": 2})

    come_to(2, "on_epoch", overrides={"name": "cut", "train.eval_every_epochs": 3}, on_epoch=until_the_second)
    assert seen == ([[(1, 1), (1, 2)], [(2, 1), (2, 2)]] if leads else [])

    with pytest.raises(Pruned if leads else blpipe.UserError,
                       match="^hopeless$" if leads else "^rank 0: on_epoch raised Pruned: hopeless$"):
        blpipe.train(tree, {"name": "pruned"}, on_epoch=prune)

    if failures:
        began = time.monotonic()
        with pytest.raises(blpipe.StageError if leads else blpipe.PeerLostError):  # while a checkpoint is written
            blpipe.train(tree, {"name": "failed", "checkpoint.every_epochs": 1,
                                "model": {"target": failing_net, "args": {"at": 9}}})
        assert time.monotonic() - began < 20

    with pytest.raises(blpipe.UserError, match=r"^train\.batch_size: 1000 is more than the 88 training samples"):
        blpipe.train(tree, {"name": "refused", "train.batch_size": 1000})

    come_to(1, "train.epochs", overrides={"name": "after", "train.epochs": 1})
