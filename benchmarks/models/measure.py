"""What is found out about one model, in a process of its own."""

import os
import re
import resource
import signal
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from benchmarks.jsonl import Row
from benchmarks.models.cases import Case
from benchmarks.models.same import EQUAL, differences, plain_state
from benchmarks.models.samples import batch
from blpipe.config_file import parse_config
from blpipe.errors import one_line
from blpipe.metrics import read_rows
from blpipe.models.build import as_blocks, model_notes
from blpipe.plugins import import_target
from blpipe.runs import train_run

LONGEST_SECONDS = 300
STAGES = 4
NOISE = 0.02


def measured(cases: Sequence[Case]) -> Iterator[Row]:
    """A row for each case, as they are done: one at a time, in a new process each."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *{case.library for case in cases}])
    for case in cases:
        with ProcessPoolExecutor(1, context) as pool:
            try:
                yield pool.submit(measure_within, LONGEST_SECONDS, case).result()
            except BrokenProcessPool:
                yield case.name | {"why": f"its process ended: memory was short, or {LONGEST_SECONDS} s were over"}


def measure_within(seconds: int, case: Case) -> Row:
    """`measure` in this process, which ends after so many seconds."""
    signal.alarm(seconds)  # nothing catches it
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        row = measure(case)
    signal.alarm(0)
    return row


def measure(case: Case) -> Row:
    """Cut the model, compare its blocks with it, and train them for a step; `why` says what came in between."""
    started, row = perf_counter(), dict[str, Any](case.name)
    try:
        row |= cut_and_compared(case)
        row["stages"] = min(STAGES, row["blocks"])
        row["losses"] = losses_of_a_step(case, row["stages"])
    except Exception as error:  # whatever a model does
        row["why"] = _without_folders(f"{type(error).__name__}: {one_line(error)}")
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts it in KiB
    return row | {"seconds": round(perf_counter() - started, 1), "peak_bytes": peak}


def cut_and_compared(case: Case) -> Row:
    """How the model is cut, and what differs between it and its blocks."""
    torch.manual_seed(0)
    plain = import_target("model.target", case.target)(**case.args)
    _disturb(plain)
    x = batch(case.shape, case.tokens)
    blocks = as_blocks(plain, x, case.live_tensors)
    found = differences(plain, blocks, x)
    if found != EQUAL:
        found["repeats"] = differences(plain, plain, x) == EQUAL
    notes = [_without_folders(note) for note in model_notes(blocks)]
    live = {"live_tensors": case.live_tensors} if case.live_tensors > 1 else {}
    return _sizes(blocks) | found | {"state_dict": _loads(plain, blocks), "notes": notes} | live


def _without_folders(text: str) -> str:
    """Without the places where the packages are installed."""
    return re.sub(r"[^\s(]*/(?=timm/|transformers/)", "", text)


@torch.no_grad()
def _disturb(model: nn.Module) -> None:
    """Add noise to all weights: many begin as zeros, with which whole branches would not count."""
    for parameter in model.parameters():
        parameter.add_(NOISE * torch.randn_like(parameter))


def _sizes(blocks: nn.Sequential) -> Row:
    """How many blocks and parameters there are, and the shares of the largest block and of the largest weight."""
    weights = {parameter: parameter.numel() for parameter in blocks.parameters()}
    total = sum(weights.values())
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    return {"blocks": len(blocks), "parameters": total, "largest_block": round(largest / total, 4),
            "largest_weight": round(max(weights.values()) / total, 4)}


def _loads(plain: nn.Module, blocks: nn.Sequential) -> bool:
    """Whether the exported names are those of the plain model."""
    state, own = plain_state(blocks), plain.state_dict()
    if state.keys() != own.keys() or not all(torch.equal(state[key], own[key]) for key in own):
        return False
    plain.load_state_dict(state, strict=True)
    return True


def losses_of_a_step(case: Case, stages: int) -> list[float]:
    """Train one step of BackLink in the local engine; returns the loss of every stage."""
    data = {"shape": list(case.shape), "classes": case.classes, "tokens": case.tokens,
            "every_position": case.every_position}
    with tempfile.TemporaryDirectory() as folder:
        train_run(parse_config({
            "name": "step", "model": {"target": case.target, "args": case.args, "live_tensors": case.live_tensors},
            "data": {"target": "benchmarks.models.samples:samples", "args": data},
            "partition": {"stages": stages}, "method": "backlink", "optimizer": {"name": "sgd", "lr": 0.001},
            "train": {"epochs": 1, "batch_size": 2}, "checkpoint": {"every_epochs": 0},
            "runtime": {"device": "cpu", "runs": folder}}))
        return [row["train_loss"] for row in read_rows(Path(folder) / "step")]
