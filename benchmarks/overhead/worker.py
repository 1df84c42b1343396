"""One process of the measurement, started by torchrun; see __main__.py.

    python -m benchmarks.overhead.worker OUT.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.device import set_up
from blpipe.engines.build import build_stage
from blpipe.engines.common import train_epoch
from blpipe.engines.pipeline import PipelineEngine, contract
from blpipe.plan import make_plan
from blpipe.stage import Stage
from blpipe.transport.messages import message_bytes
from blpipe.transport.world import World, meet

ROUNDS, STEPS, BATCH = 7, 300, 8
EMPTY = {  # two layers of a few weights
    "name": "empty", "model": {"name": "mlp", "args": {"hidden": [8], "batch_norm": False}}, "partition": {"stages": 2},
    "data": {"name": "synthetic", "args": {"shape": [1, 2, 2], "classes": 2, "samples": STEPS * BATCH}},
    "method": {"head": "linear", "link": {"delay": 1}},
    "optimizer": {"name": "sgd", "lr": 0.01, "args": {"momentum": 0.9}},
    "train": {"batch_size": BATCH}, "runtime": {"device": "cpu", "threads": 1},
}


def main(out: Path) -> None:
    """Rounds of the engine, the bare messages and the plain loop, in turn; the first is thrown away."""
    config = parse_config(EMPTY)
    set_up(config)
    data = open_data(config.data, config.seed)
    plan = make_plan(config, data.spec)
    world = World(meet(60.0), torch.device("cpu"), False, contract(plan))
    engine = PipelineEngine(plan, data if world.rank == 0 else None, world)
    plain = build_stage(make_plan(config, data.spec), 0, world.device)
    messages = [message_bytes((plan.activation(BATCH, 0), plan.targets(BATCH))), message_bytes((plan.error(BATCH, 0),))]
    batch = next(iter(data.train_batches(0, 0, BATCH, True)))
    rounds = []
    for number in range(ROUNDS + 1):
        rounds.append({
            "step": _seconds(world, lambda epoch=number: train_epoch(engine, epoch)),
            "messages": _seconds(world, lambda: _there_and_back(world.rank, messages)),
            "plain": _seconds(world, lambda: _plain_loop(plain, *batch) if world.rank == 0 else None),
        })
    if world.rank == 0:
        out.write_text(json.dumps(rounds[1:]))
    engine.close()


def _seconds(world: World, run: Callable[[], None]) -> float:
    """Of one of `STEPS` steps, in this process, both having begun together."""
    world.barrier()
    started = perf_counter()
    run()
    return (perf_counter() - started) / STEPS


def _there_and_back(rank: int, sizes: list[int]) -> None:
    there, back = (torch.zeros(size, dtype=torch.uint8) for size in sizes)
    for _ in range(STEPS):
        if rank == 0:
            dist.send(there, 1)
            dist.recv(back, 1)
        else:
            dist.recv(there, 0)
            dist.send(back, 0)


def _plain_loop(stage: Stage, x: Tensor, targets: Tensor) -> None:
    """Forward, head, local backward, a second backward as the link's, and the optimizer's step."""
    optimizer = stage.update.optimizer
    assert stage.head is not None and optimizer is not None
    parameters = list(stage.blocks.parameters())
    error: Tensor | None = None
    for _ in range(STEPS):
        out = stage.blocks(x)
        cross_entropy(stage.head(out), targets).backward(retain_graph=True)
        error = torch.zeros_like(out) if error is None else error
        for parameter, gradient in zip(parameters, torch.autograd.grad(out, parameters, error), strict=True):
            parameter.grad += gradient
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
