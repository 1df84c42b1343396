"""What feeds the first stage: microbatches of the data."""

from collections.abc import Iterator

from torch import Tensor

from blpipe.data import Data
from blpipe.plan import Plan


class Feed:
    """The first stage's inbox: microbatches (x, targets) from the data."""

    def __init__(self, messages: Iterator[tuple[Tensor, Tensor]]):
        self._messages = messages

    def has_message(self) -> bool:
        """Always."""
        return True

    def get(self) -> tuple[Tensor, ...]:
        """The next microbatch."""
        return next(self._messages)


def train_microbatches(data: Data, plan: Plan, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The microbatches of one epoch from step `start` of the run on, in order, on the device of the data."""
    train, steps = plan.config.train, plan.train_steps(epoch)
    first = start - steps[0].index
    batches = data.train_batches(plan.config.seed, epoch, train.batch_size, train.drop_last, first, plan.share)
    for step, (x, targets) in zip(steps[first:], batches, strict=True):
        mixed = plan.mixing.of_step(step.index).of if plan.mixing else lambda x_BCHW: x_BCHW
        yield from zip(map(mixed, x.split(step.sizes)), targets.split(step.sizes), strict=True)


class TrainFeed:
    """The first stage's microbatches. While steps of an epoch follow each other it is one feed, with its workers."""

    def __init__(self, data: Data, plan: Plan):
        self._data, self._plan = data, plan
        self._at: tuple[int, int] | None = None
        self._feed: Feed | None = None

    def begin(self, epoch: int, start: int) -> Feed:
        """From step `start` of the run on, in this epoch."""
        if self._feed is None or self._at != (epoch, start):
            self._feed = Feed(train_microbatches(self._data, self._plan, epoch, start))
        return self._feed

    def leave(self, epoch: int, step: int) -> None:
        """All of it has been taken up to this step."""
        self._at = epoch, step


def test_microbatches(data: Data, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one evaluation, in order, on the device of the data."""
    config = plan.config.train
    return data.test_batches(config.eval_batch_size or config.batch_size, plan.share)
