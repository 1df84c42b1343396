"""The processes of a pipeline run: how they meet, agree, connect and part.

A rank is a stage of a replica: with K stages, rank n is stage n % K, from 0, of replica n // K.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import blpipe
from blpipe.errors import PeerLostError, UserError, one_line
from blpipe.transport.messages import Layout
from blpipe.transport.queues import ReceiveQueue, SendQueue, lost_peer
from blpipe.transport.sums import SumQueue

_MIN_CONNECTIONS, _MOST_CONNECTIONS = 8, 32  # CUDA's own default, and the most that it takes


@dataclass
class Meeting:
    """A key-value store that all processes of a run share, before and beside any process group.

    Args:
        store: of this run alone.
    """

    store: dist.Store
    rank: int
    size: int
    timeout_seconds: float = 600.0

    def announce(self, message: dict[str, Any]) -> None:
        """Rank 0 tells the others."""
        self.store.set("announcement", json.dumps(message))

    def listen(self) -> dict[str, Any]:
        """What rank 0 announced; waits for it as long as rank 0 may need for its data."""
        try:
            self.store.wait(["announcement"], timedelta(days=1))
            return json.loads(self.store.get("announcement"))
        except RuntimeError as error:
            raise PeerLostError(f"rank {self.rank} waiting for rank 0: that process ended") from error

    def note(self, message: dict[str, Any]) -> None:
        """Leave a message to whoever looks, in place of this rank's last one."""
        with lost_peer(f"rank {self.rank} telling of its progress"):
            self.store.set(f"notes/{self.rank}", json.dumps(message))

    def notes(self) -> dict[int, dict[str, Any]]:
        """The last message of every rank that has left one."""
        with lost_peer(f"rank {self.rank} looking for the others' progress"):
            keys = {rank: f"notes/{rank}" for rank in range(self.size)}
            return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def promise(self, number: int, message: dict[str, Any]) -> None:
        """The first stage tells the others how far to go; its promises are numbered from 0."""
        with lost_peer(f"rank {self.rank} promising steps"):
            self.store.set(f"promises/{number}", json.dumps(message))

    def promised(self, number: int) -> dict[str, Any] | None:
        """What the first stage told in its promise of this number; None if it has not yet."""
        key = f"promises/{number}"
        with lost_peer(f"rank {self.rank} looking for rank 0's promise of steps"):
            return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def ask_to_stop(self) -> None:
        """Ask the first stage to stop promising."""
        with lost_peer(f"rank {self.rank} asking to stop"):
            self.store.set("stop", "")

    def stop_asked(self) -> bool:
        """Whether any process has asked for it."""
        with lost_peer(f"rank {self.rank} looking whether to stop"):
            return self.store.check(["stop"])


def meet(timeout_seconds: float) -> Meeting:
    """Meet the other processes for a run. All do so once a run, and so number the runs alike."""
    store, rank, size = _attempt(timeout_seconds)
    number = store.add(f"runs of rank {rank}", 1)
    return Meeting(dist.PrefixStore(f"run{number}", store), rank, size, timeout_seconds)


def is_reporter(timeout_seconds: float) -> bool:
    """Whether this process is to report that the processes fail: the first one that asks is."""
    store, rank, _ = _attempt(timeout_seconds)
    return store.compare_set("reporter", "", str(rank)) == str(rank).encode()


def _attempt(timeout_seconds: float) -> tuple[dist.Store, int, int]:
    """The store that torchrun's environment names, under a prefix of this attempt's own; this rank, and how many."""
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    attempt = os.environ.get("BLPIPE_ATTEMPT") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"blpipe/attempt{attempt}", store), rank, size


@contextmanager
def left_at_failure() -> Iterator[None]:
    """Leave the other processes where a run fails here: they find out at once, and all can begin another run.

    Over NCCL nothing is left: what it still has under way may never end.
    """
    hook = sys.excepthook
    try:
        yield
    except BaseException as error:
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()
            # gloo parts from a peer once nothing holds the group, as the frames of the error do.
            raised: BaseException | None = error
            while raised is not None:
                traceback.clear_frames(raised.__traceback__)
                raised = raised.__cause__ or raised.__context__
            gc.collect()
        raise
    finally:
        sys.excepthook = hook  # torch puts the rank before each line of a traceback, once more with every run


def stay_on_this_machine() -> None:
    """Where all processes are on one machine, they listen to each other on its loopback interface alone.

    An interface that the user has named stays.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def choose_device(kind: str) -> tuple[torch.device, bool]:
    """The device of this process, and whether each process on this machine has a GPU of its own.

    Raises:
        UserError: CUDA asked for where there is none.
    """
    gpus = torch.cuda.device_count()
    if kind == "cuda" and not gpus:
        raise UserError("runtime.device: cuda, but torch sees no GPU here; use runtime.device=cpu")
    if kind == "cpu" or not gpus:
        return torch.device("cpu"), False
    places = [os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    if None in places and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("LOCAL_RANK: is not set, or LOCAL_WORLD_SIZE is not: they say which GPU is this process's; use "
                        "torchrun, which sets them, or runtime.device=cpu")
    local_rank, processes = (int(value) for value in (places[0] or "0", places[1] or "1"))
    return torch.device("cuda", local_rank % gpus), processes <= gpus


def prepare_launches() -> None:
    """Over NCCL, a receive that was posted ahead must not keep what is launched after it from running.

    Streams beyond the number of CUDA's connections share one. Where the environment says nothing, CUDA has all that it
    can have from now on, if it has not begun in this process.

    Raises:
        UserError: the environment has CUDA run one after the other.
    """
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        raise UserError("CUDA_LAUNCH_BLOCKING: a stage would wait for messages that it has posted receives for, and "
                        "never send; unset it, or look for the fault in one process, without torchrun")
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    if connections.isdecimal() and int(connections) < _MIN_CONNECTIONS:
        raise UserError(f"CUDA_DEVICE_MAX_CONNECTIONS: {connections} lets a receive that was posted ahead block a "
                        f"stage's kernels; unset it, or set {_MIN_CONNECTIONS} or more")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(_MOST_CONNECTIONS))


class World:
    """The process groups of a pipeline: two for each edge (activations, errors), one for the replicas of each stage.

    NCCL where every process has a GPU of its own; else gloo, through host memory.

    Args:
        stages: of a replica; without, there is one replica, and every process is a stage of it.
        contract: what both ends of every edge must agree on; compared before the first message.
        beside: a world of the same processes that is there already; to close one closes both.
    """

    def __init__(self, meeting: Meeting, device: torch.device, own_gpu: bool, contract: dict[str, Any],
                 stages: int | None = None, beside: "World | None" = None):
        self.rank, self.size, self.device = meeting.rank, meeting.size, device
        self.stages = stages or meeting.size
        self.replica, self.stage = divmod(self.rank, self.stages)
        self.replicas = self.size // self.stages
        self.via = device if own_gpu else torch.device("cpu")
        shake_hands(meeting, {**contract, "messages through": self.via.type})
        stay_on_this_machine()
        try:
            self._connect(meeting, own_gpu, begin=beside is None)
        except RuntimeError as error:
            raise PeerLostError(f"rank {self.rank} connecting to the others: {one_line(error)}") from error

    def _connect(self, meeting: Meeting, own_gpu: bool, begin: bool) -> None:
        timeout = timedelta(seconds=meeting.timeout_seconds)
        # A time-out's word to dump stays in torchrun's store, where it would end the processes that it starts again.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        if begin:
            dist.init_process_group("nccl" if own_gpu else "gloo", store=meeting.store, rank=self.rank,
                                    world_size=self.size, timeout=timeout, device_id=self.device if own_gpu else None)
        # Any: torch gives a stand-in for groups that this process is not in; it never uses one.
        self.control: Any = dist.new_group(backend="gloo", timeout=timeout)
        self.saving: Any = dist.new_group(backend="gloo", timeout=timeout)  # of a thread beside training
        # Every process makes all groups in this order. The last stage of a replica has no edge.
        edges = [rank for rank in range(self.size) if (rank + 1) % self.stages]
        self._forward: dict[int, Any] = {k: dist.new_group([k, k + 1], timeout=timeout) for k in edges}
        self._error: dict[int, Any] = {k: dist.new_group([k, k + 1], timeout=timeout) for k in edges}
        self._same_stage = self._group_of_mine([range(k, self.size, self.stages) for k in range(self.stages)], timeout)
        self.pipeline = self._group_of_mine([range(first, first + self.stages) for first in
                                             range(0, self.size, self.stages)], timeout)
        self._warm_up()

    def _group_of_mine(self, of_ranks: Sequence[range], timeout: timedelta) -> Any:
        """Of these groups the one that has this process; None where there are no replicas to tell apart."""
        groups = [dist.new_group([*ranks], timeout=timeout) for ranks in of_ranks] if self.replicas > 1 else []
        return next((group for group, ranks in zip(groups, of_ranks, strict=False) if self.rank in ranks), None)

    def sender(self, to: int, channels_last: bool = False, layouts: Collection[Layout] | None = None) -> SendQueue:
        """The queue to a stage beside this one: activations to the next one, errors to the one before."""
        rank = self._rank_of(to)
        return SendQueue(self._group(self.rank, rank), rank, self._name("sending to", rank), self.device, self.via,
                         channels_last, layouts=layouts)

    def receiver(self, source: int, channels_last: bool = False) -> ReceiveQueue:
        """The queue from a stage beside this one: activations from the one before, errors from the next one."""
        rank = self._rank_of(source)
        return ReceiveQueue(self._group(rank, self.rank), rank, self._name("receiving from", rank),
                            self.device, self.via, channels_last)

    def control_sender(self, to: int) -> SendQueue:
        """A queue to any stage of this replica through host memory, beside the stages' own."""
        rank = self._rank_of(to)
        return SendQueue(self.control, rank, self._name("sending to", rank), self.device, torch.device("cpu"))

    def control_receiver(self, source: int) -> ReceiveQueue:
        """The other end of `control_sender`."""
        rank = self._rank_of(source)
        return ReceiveQueue(self.control, rank, self._name("receiving from", rank),
                            self.device, torch.device("cpu"))

    def replicas_sum(self) -> SumQueue | None:
        """What this stage's replicas add up; None where there is one."""
        if self._same_stage is None:
            return None
        return SumQueue(self._same_stage, f"{self._named(self.rank)} adding up with the other replicas", self.device,
                        self.via)

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, on rank 0; None elsewhere."""
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with lost_peer(f"{self._named(self.rank)} reporting"):
            dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        with lost_peer(f"{self._named(self.rank)} hearing from rank 0"):
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        with lost_peer(f"{self._named(self.rank)} waiting for all others"):
            dist.barrier(group=self.control)

    def close(self) -> None:
        """Part from the others."""
        dist.destroy_process_group()

    def _group(self, source: int, target: int) -> dist.ProcessGroup:
        return self._forward[source] if source < target else self._error[target]

    def _name(self, doing: str, peer: int) -> str:
        return f"{self._named(self.rank)} {doing} {self._named(peer)}"

    def _named(self, rank: int) -> str:
        return f"stage {rank % self.stages + 1} (rank {rank})"

    def _rank_of(self, stage: int) -> int:
        return self.replica * self.stages + stage

    def _warm_up(self) -> None:
        """A first message over every group, in one order, so that every connection stands before the run."""
        for edge in self._forward:
            for source, target, group in ((edge, edge + 1, self._forward[edge]), (edge + 1, edge, self._error[edge])):
                ping = torch.zeros(1, device=self.via)
                if self.rank == source:
                    dist.send(ping, target, group)
                elif self.rank == target:
                    dist.recv(ping, source, group)
        if self._same_stage is not None:
            dist.all_reduce(torch.zeros(1, device=self.via), group=self._same_stage)


def shake_hands(meeting: Meeting, contract: dict[str, Any]) -> None:
    """Compare versions and `contract` (JSON) with all processes, before any process group exists.

    Raises:
        UserError: one with another version or contract.
    """
    mine = {"blpipe": blpipe.__version__, "torch": torch.__version__, **contract}
    meeting.store.set(f"hands/{meeting.rank}", json.dumps(mine))
    for rank in range(meeting.size):
        with lost_peer(f"rank {meeting.rank} shaking hands with rank {rank}"):
            theirs = json.loads(meeting.store.get(f"hands/{rank}"))
        if mine != theirs:
            raise UserError(f"rank {meeting.rank} and rank {rank} differ in {_first_difference(mine, theirs)}; "
                            "start every rank with the same config, data and versions")


def _first_difference(mine: Any, theirs: Any, path: str = "") -> str:
    """The first key in which two nested dictionaries differ, and both values."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        key = next(key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key))
        return _first_difference(mine.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    return f"{path}: {mine} and {theirs}"
