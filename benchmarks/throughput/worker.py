"""One process of the measurement, started by torchrun; see __main__.py.

    python -m benchmarks.throughput.worker JOB.json

Rank 0 writes what all of them measured to the file that the job names.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from benchmarks.throughput.methods import Batches, Method, Run, make_configs, make_methods
from blpipe import launch
from blpipe.config_file import parse_config
from blpipe.device import set_up
from blpipe.engines.pipeline import contract
from blpipe.errors import UserError
from blpipe.plan import make_plan
from blpipe.transport.world import World, choose_device, meet

Window = dict[str, Any]  # of one process: seconds, busy and waiting shares, and sent_bytes of a step


class Stopwatch:
    """Notes where a method stands at two optimizer steps, `warmup` and `warmup` + `steps` after it began."""

    def __init__(self, warmup: int, steps: int, device: torch.device, read: Callable[[], tuple[float, ...]]):
        self._at, self._steps, self._device, self._read = (warmup, warmup + steps), steps, device, read
        self._count = 0
        self._notes: list[tuple[float, ...]] = []
        self._moments: list[Any] = []

    def on_step(self) -> None:
        """A step begins."""
        self._count += 1
        if self._count in self._at:
            self._moments.append(self._moment())
            self._notes.append(self._read())

    def per_step(self) -> list[float]:
        """Of a step between the two: seconds, then what `read` gave."""
        begun, ended = self._moments
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            seconds = begun.elapsed_time(ended) / 1000
        else:
            seconds = ended - begun
        return [value / self._steps
                for value in (seconds, *(b - a for a, b in zip(*self._notes, strict=True)))]

    def _moment(self) -> Any:
        if self._device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def main(job: dict[str, Any]) -> None:
    """Measure one case: every method in turn, round after round."""
    config = parse_config(job["config"])
    set_up(config)
    device, own_gpu = choose_device(config.runtime.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    data = Batches(config, device)
    configs = make_configs(job["config"], job["cuts"], job["microbatches"], job["methods"])
    plans = {name: make_plan(configs[name], data.spec, replica=launch.rank() // configs[name].partition.stage_count)
             for name in configs}
    agreed = {name: contract(plan) for name, plan in plans.items()}
    world = World(meet(config.runtime.timeout_seconds), device, own_gpu, agreed)
    worlds = {1: world}
    if world.size % 2 == 0:
        worlds[2] = World(meet(config.runtime.timeout_seconds), device, own_gpu, agreed, world.size // 2, beside=world)
    methods = make_methods(plans, data, worlds)
    rounds = []
    for number in range(job["rounds"] + 1):  # one to warm up
        started = perf_counter()
        turn = number % len(methods)
        rounds.append({method.name: measure(method, job, world) for method in methods[turn:] + methods[:turn]})
        if world.rank == 0:
            what = f"round {number} of {job['rounds']}" if number else "warm-up"
            print(f"{job['case']}: {what}, {perf_counter() - started:.0f} s", flush=True)
    if world.rank == 0:
        Path(job["out"]).write_text(json.dumps(rounds[1:]))
    world.barrier()
    world.close()


def measure(method: Method, job: dict[str, Any], world: World) -> dict[str, Any]:
    """One window of a method, then of each process on its own: all of them at once, and one after the other.

    Returns:
        Of every process that takes part: the windows, and the seconds of a step of its own (None: not measured).
    """
    windows = _together(method, method.run, job, world)
    at_once = apart = None
    if method.alone is not None and job["own_speed"]:
        at_once = [window["seconds"] for window in _together(method, method.alone, job, world)]
        in_turn = [_together(method, method.alone if world.rank == rank else None, job, world)
                   for rank in range(world.size)]
        apart = [window["seconds"] for found in in_turn for window in found]
    return {"windows": windows, "side_by_side_seconds": at_once, "own_seconds": apart}


def _together(method: Method, run: Run | None, job: dict[str, Any], world: World) -> list[Window]:
    """The windows of the processes that have something to run, on rank 0; none elsewhere."""
    world.barrier()
    window = None if run is None else _window(method, run, job, world.device)
    gathered = world.gather(window)
    return [found for found in gathered or () if found is not None]


def _window(method: Method, run: Run, job: dict[str, Any], device: torch.device) -> Window:
    def read() -> tuple[float, ...]:
        return process_time(), method.wait_seconds() if method.wait_seconds else 0.0, method.sent_bytes()

    watch = Stopwatch(job["warmup"], job["steps"], device, read)
    threads = torch.get_num_threads()
    torch.set_num_threads(method.threads)
    run(watch.on_step)
    torch.set_num_threads(threads)
    seconds, cpu_seconds, wait_seconds, sent_bytes = watch.per_step()
    busy = None if device.type == "cuda" else min(1.0, cpu_seconds / (seconds * method.threads))
    # Where nothing tells what a process waited for, it is all that it did not compute.
    waiting = None if busy is None else min(1.0, wait_seconds / seconds) if method.wait_seconds else 1 - busy
    return {"seconds": seconds, "busy": busy, "waiting": waiting, "sent_bytes": sent_bytes}


if __name__ == "__main__":
    try:
        main(json.loads(Path(sys.argv[1]).read_text()))
    except UserError as error:
        print(f"throughput: {error}", file=sys.stderr)
        sys.exit(2)
