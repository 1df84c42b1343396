"""How the samples of an epoch are cut into steps, and these into the microbatches of each replica."""

from dataclasses import dataclass

from blpipe.config import Config
from blpipe.specs import DataSpec, Share


@dataclass(frozen=True)
class Step:
    """One optimizer step of a replica: its number in the run, from 0, and the sizes of its microbatches.

    elsewhere: how many samples of the batch other replicas have.
    """

    index: int
    sizes: tuple[int, ...]
    elsewhere: int = 0

    @property
    def samples(self) -> int:
        """Of the batch, in all replicas."""
        return sum(self.sizes) + self.elsewhere


def batch_sizes(samples: int, config: Config) -> list[int]:
    """The samples of every step of an epoch; the last batch, if kept, may be smaller."""
    full, rest = divmod(samples, config.train.batch_size)
    return [config.train.batch_size] * full + ([rest] if rest and not config.train.drop_last else [])


def step_sizes(samples: int, config: Config, replica: int = 0) -> list[tuple[int, ...]]:
    """The sizes of a replica's microbatches in every step of an epoch."""
    return [_microbatches(batch, config, replica) for batch in batch_sizes(samples, config)]


def _microbatches(batch: int, config: Config, replica: int) -> tuple[int, ...]:
    """The sizes of a replica's microbatches of a batch of so many samples."""
    micro, share = config.train.microbatch_size, Share(replica, config.train.replicas)
    full, rest = divmod(len(range(batch)[share.of(batch)]), micro)
    return (micro,) * full + ((rest,) if rest else ())


def training_sizes(data: DataSpec, config: Config) -> list[int]:
    """The sizes of all microbatches of all replicas, each once, the largest first."""
    sizes = {size for batch in {*batch_sizes(data.train_samples, config)} for replica in range(config.train.replicas)
             for size in _microbatches(batch, config, replica)}
    return sorted(sizes, reverse=True)


def evaluation_sizes(samples: int, config: Config) -> list[int]:
    """The batch sizes of an evaluation: every sample once."""
    size = config.train.eval_batch_size or config.train.batch_size
    full, rest = divmod(samples, size)
    return [size] * full + ([rest] if rest else [])
