"""The memory benchmark: its figures against what torch allocates, its tables, and the local engine's peaks."""

import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from benchmarks.memory import cases, measure, report
from benchmarks.memory.__main__ import main
from benchmarks.memory.results import Results
from blpipe.engines.alone import rehearsed_steps
from blpipe.engines.common import train_epoch
from blpipe.plan import make_network, make_plan

CPU = torch.device("cpu")
SMALL = cases.Size(14, 32, (4,))
RECOMPUTED = cases.backlink("all", 1, "recompute")


@pytest.mark.parametrize("case", [cases.BP, cases.CHECKPOINTED[3], cases.GREEDY, cases.backlink(1, 0), RECOMPUTED],
                         ids=lambda case: case.name)
def test_fake_peaks_of_one_process_are_within_15_percent_of_what_torch_allocates(case):
    task = cases.Task("local", case, 4)
    config = SMALL.config(case, task.parts)
    counted = measure.local_peak(task, SMALL, config, CPU)
    data = SMALL.data(rehearsed_steps(config))
    plan = make_plan(config, data, make_network(config, data))
    held = sum(tensor.nbytes for tensor in (*plan.model.parameters(), *plan.model.buffers()))
    with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train_epoch(measure.local_engine(plan, case, task.stages, CPU), 0)
    assert counted == pytest.approx(held + peak_of(profiled), rel=0.15)  # kernels' own workspaces


def peak_of(profiled):
    """The most bytes that torch had allocated at a time."""
    live = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_in_one_process_one_body_graph_is_alive_at_a_time():
    def peak(case):
        return measure.local_peak(cases.Task("local", case, 4), SMALL, SMALL.config(case, 4), CPU)

    greedy, linked = peak(cases.GREEDY), peak(cases.backlink(1, 0))
    assert greedy < max(measure.stage_peaks(cases.GREEDY, SMALL, SMALL.config(cases.GREEDY, 4), CPU))
    # With a delay of 0, the tails of two stages at most are alive.
    assert linked < greedy + 2 * block_bytes(SMALL)


def block_bytes(size):
    """What a block of the first layer keeps: its input, and four maps of 16 channels."""
    return 5 * 4 * size.batch * 16 * 32 * 32


def test_checkpointed_blocks_learn_as_the_blocks_do():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    blocks = make_network(SMALL.config(cases.BP, 1), SMALL.data(1)).model
    gradients = []
    for part in (blocks, measure.checkpointed(blocks, 3)):
        blocks.zero_grad()
        part(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in blocks.parameters()])
    assert len(measure.checkpointed(blocks, 3)) == 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_benchmark_measures_and_keeps_the_rows_that_are_there(tmp_path):
    options = ["--device", "cpu", "--depth", "8", "--batch", "4", "--stages", "2", "--lengths", "1", "--delays", "0",
               "--rounds", "1", "--steps", "1", "--time-batch", "4", "--out", str(tmp_path)]
    assert main([*options, "--only", "local", "--only", "time"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"local", "time"}
    assert {"device", "torch", "commit"} <= rows[0].keys()
    table = (tmp_path / "table.md").read_text()
    assert "| BackLink, length 1, d = 0, recompute | even |" in table
    assert (tmp_path / "memory_by_k.png").stat().st_size > 1000
    assert main([*options, "--only", "local"]) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)


def test_the_stages_of_a_pipeline_are_measured_one_by_one():
    size = cases.Size(8, 8, (2,))
    backprop, checkpointed, ours, least = (measure.measure(task, size, CPU) for task in (
        cases.Task("microbatches", cases.BP, 2), cases.Task("microbatches", cases.CHECKPOINTED[0], 2),
        cases.Task("microbatches", cases.GREEDY, 2), cases.Task("pipeline", cases.GREEDY, 2, "least")))
    assert all(len(row["stage_bytes"]) == 2 for row in (backprop, checkpointed, ours, least))
    # The first stage of 1F1B has two microbatches under way, the last has one.
    assert ours["stage_bytes"][0] < backprop["stage_bytes"][0]
    assert checkpointed["peak_bytes"] < backprop["peak_bytes"] == backprop["stage_bytes"][0]
    assert least["peak_bytes"] == max(least["stage_bytes"])


def test_goals_are_reached_or_not(tmp_path):
    results = Results(tmp_path / "results.jsonl", {"device": "a", "cores": 1, "torch": "t", "python": "p",
                                                   "commit": "c"})
    size = cases.Size(20, 64, (16,))
    for part, method, stages, peak in (("local", "bp", 1, 1000), ("local", "bp, checkpoint every block", 1, 300),
                                       ("local", "greedy", 16, 200), ("local", "BackLink, length 1, d = 0", 16, 350),
                                       ("pipeline", "BackLink, length 1, d = 0", 16, 209),
                                       ("pipeline", "BackLink, length 1, d = 1", 16, 211)):
        results.add({"part": part, "method": method, "stages": stages, "cut": "even", **size.key(),
                     "peak_bytes": peak})
        other = replace(size, precision="bf16").key()  # of another table
        results.add({"part": part, "method": method, "stages": stages, "cut": "even", **other,
                     "peak_bytes": peak - 2 * (part == "pipeline")})
    for method, stages, ratio in (("bp", 1, 1.0), ("bp, checkpoint every block", 1, 1.3), ("greedy", 16, 1.1),
                                  ("BackLink, length 1, d = 0", 16, 1.2)):
        results.add({"part": "time", "method": method, "stages": stages, "cut": "even", **size.key(),
                     "timed_batch": 8, "seconds": [ratio], "ratios": [ratio], "threads": 1})
    read = Results(tmp_path / "results.jsonl", {}).rows
    text, in_bf16 = report.as_markdown(read, size).split("# ResNet-20, batch 64, bf16\n")
    assert text.startswith("# ResNet-20, batch 64, float32\n")
    assert "BackLink, length 1, d = 1: −79 %, reached" in in_bf16
    assert "even cut: BackLink, length 1, d = 0: −79 %, reached; BackLink, length 1, d = 1: −79 %, not reached" in text
    assert "- greedy, K = 16, even cut: 200 B (less), +10% time (less): reached" in text
    assert "- BackLink, length 1, d = 0, K = 16, even cut: 350 B (not less), +20% time (less): not reached" in text


@pytest.mark.parametrize(("options", "message"), [
    (["--depth", "9"], "memory: --depth: depth 9 is not 6n + 2; the nearest is 8"),
    (["--depth", "8", "--stages", "2,9"], "memory: --stages: 9 is more than the 5 blocks"),
    (["--batch", "6", "--stages", "4"], "memory: --batch: 6 cannot be cut into 4 microbatches")])
def test_options_that_do_not_fit_are_refused_with_a_remedy(options, message, tmp_path, capsys):
    assert main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
