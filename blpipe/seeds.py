"""Independent random streams, each a pure function of the run's seed and of what it is for."""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import numpy as np
import torch


def derive_seed(seed: int, *labels: int | str) -> int:
    """A 63-bit seed for one purpose, for example `derive_seed(seed, "order", epoch)`."""
    words = [zlib.crc32(label.encode()) if isinstance(label, str) else label for label in labels]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, *labels: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream named by `labels`."""
    return torch.Generator().manual_seed(derive_seed(seed, *labels))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's CPU stream begins at `seed`; outside, it is as it was. `torch.manual_seed` would move GPUs' too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def fixed_randomness(seed: int) -> Iterator[None]:
    """Users' code sees the global CPU streams of torch, numpy and Python at `seed`; outside, they are as they were."""
    outside = np.random.get_state(), random.getstate()
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        with seeded(seed):
            yield
    finally:
        np.random.set_state(outside[0])
        random.setstate(outside[1])


class RandomStream:
    """torch's global random stream, kept apart for one stage: `with stream: ...` continues where it left off.

    A stage in a process of its own and one of several in a process thus draw the same numbers.
    """

    def __init__(self, seed: int, device: torch.device):
        cuda = device.type == "cuda"
        with torch.random.fork_rng(devices=[device] if cuda else []):
            torch.manual_seed(seed)
            self._generators = [torch.default_generator]
            if cuda:  # started by fork_rng; before, it has no generators
                index = torch.cuda.current_device() if device.index is None else device.index
                self._generators.append(torch.cuda.default_generators[index])
            self.state = self.read()

    def __enter__(self) -> None:
        self._outside = self.read()
        self._write(self.state)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.state = self.read()
        self._write(self._outside)

    @contextmanager
    def rewound_to(self, state: list[torch.Tensor]) -> Iterator[None]:
        """Draw once more from where the stream stood at `state`; the stream itself does not move."""
        outside = self.read()
        self._write(state)
        try:
            yield
        finally:
            self._write(outside)

    def read(self) -> list[torch.Tensor]:
        """Where torch's global stream stands, which inside `with` is this one."""
        # Of the generators themselves: this happens several times a microbatch, and torch's functions for it copy
        # and check more. A GPU's state is on the host, so that nothing waits for the GPU.
        return [generator.get_state() for generator in self._generators]

    def _write(self, state: list[torch.Tensor]) -> None:
        for generator, generator_state in zip(self._generators, state, strict=True):
            generator.set_state(generator_state)
