"""Independent random streams, each a pure function of the run's seed and of what it is for."""

import zlib
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


class RandomStream:
    """torch's global random stream, kept apart for one stage: `with stream: ...` continues where it left off.

    A stage in a process of its own and one of several in a process thus draw the same numbers.
    """

    def __init__(self, seed: int, device: torch.device):
        self._device = device
        with torch.random.fork_rng(devices=self._cuda_devices()):
            torch.manual_seed(seed)
            self.state = self._read()

    def __enter__(self) -> None:
        self._outside = self._read()
        self._write(self.state)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.state = self._read()
        self._write(self._outside)

    def _cuda_devices(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []

    def _read(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._cuda_devices())]

    def _write(self, state: list[torch.Tensor]) -> None:
        torch.set_rng_state(state[0])
        for device, cuda_state in zip(self._cuda_devices(), state[1:], strict=True):
            torch.cuda.set_rng_state(cuda_state, device)
