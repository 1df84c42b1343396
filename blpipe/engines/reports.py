"""What the engines report of each stage, epoch by epoch and in between."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass

import pynvml
import torch

from blpipe.tally import Tally


@dataclass(frozen=True)
class StageReport:
    """What one stage did in one epoch, in all replicas: losses and accuracies of all samples, means of seconds and
    utilisations, the most of memory. None: not measured, or no such thing (a `bp` stage's own loss).

    busy_seconds and wait_seconds are of training alone: computing, and blocked on a neighbour. The GPU's
    utilisation (0…1) and memory in use are its driver's readings at the end of the epoch, all programs' together.
    skipped_steps: of the run, by `train.on_nonfinite`.
    """

    train_loss: float | None
    train_accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    busy_seconds: float | None
    wait_seconds: float | None
    train_seconds: float
    peak_memory_bytes: int
    gpu_utilization: float | None
    gpu_memory_bytes: int | None
    skipped_steps: list[int]


@dataclass(frozen=True)
class ReplicaReport:
    """Of a stage in one replica, as `StageReport`; `train` and `val` are the states of tallies."""

    train: list[float]
    val: list[float]
    busy_seconds: float | None
    wait_seconds: float | None
    train_seconds: float
    peak_memory_bytes: int
    gpu_utilization: float | None
    gpu_memory_bytes: int | None


@dataclass(frozen=True)
class StageProgress:
    """One stage in the middle of an epoch: loss and seconds so far, and its device's readings, as in `StageReport`."""

    loss: float | None
    busy_seconds: float | None
    wait_seconds: float | None
    gpu_utilization: float | None
    gpu_memory_bytes: int | None


@dataclass(frozen=True)
class EpochSums:
    """Of one stage, in the training of one epoch: the sums of its tally, and seconds."""

    tally: Tally
    busy_seconds: float = 0.0
    wait_seconds: float = 0.0
    train_seconds: float = 0.0

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Busy, waiting and all of them."""
        return self.busy_seconds, self.wait_seconds, self.train_seconds


def replica_report(train: Tally, val: Tally, busy: float | None, wait: float | None, train_seconds: float,
                   device: torch.device) -> ReplicaReport:
    """Of one stage of one replica, with the readings of its device."""
    return ReplicaReport(train.state(), val.state(), busy, wait, train_seconds, peak_memory_bytes(device),
                         *gpu_readings(device))


def report(replicas: Sequence[ReplicaReport]) -> StageReport:
    """A stage's report, from those of all of its replicas."""
    train, val = Tally.of_all([each.train for each in replicas]), Tally.of_all([each.val for each in replicas])

    def mean(key: str) -> float | None:
        values = [getattr(each, key) for each in replicas]
        return None if None in values else sum(values) / len(values)

    readings = [each.gpu_memory_bytes for each in replicas if each.gpu_memory_bytes is not None]
    return StageReport(train.loss, train.accuracy, val.loss, val.accuracy, mean("busy_seconds"), mean("wait_seconds"),
                       max(each.train_seconds for each in replicas), max(each.peak_memory_bytes for each in replicas),
                       mean("gpu_utilization"), max(readings, default=None), train.skipped)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of torch's allocations on a GPU; on a CPU the peak resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_readings(device: torch.device) -> tuple[float | None, int | None]:
    """The GPU's utilisation 0…1 and its memory in use, by NVML; None where there is no GPU or no reading."""
    if device.type != "cuda":
        return None, None
    try:
        return torch.cuda.utilization(device) / 100, torch.cuda.device_memory_used(device)
    except (pynvml.NVMLError, RuntimeError):  # a driver or a container without NVML
        return None, None
