"""The benchmark of the engine's overhead: what it is compared with."""

import torch

from benchmarks.overhead import worker
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.engines.build import build_stage
from blpipe.plan import make_plan


def test_the_plain_loop_trains_the_stage(monkeypatch):
    monkeypatch.setattr(worker, "STEPS", 3)
    config = parse_config(worker.EMPTY)
    data = open_data(config.data, config.seed)
    stage = build_stage(make_plan(config, data.spec), 0, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in stage.blocks.parameters()]
    worker._plain_loop(stage, *next(iter(data.train_batches(0, 0, worker.BATCH, True))))
    assert not any(map(torch.equal, before, stage.blocks.parameters()))
