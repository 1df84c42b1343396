"""The benchmark of scaling: what it says, and its timed blocks; test_throughput.py has it measure and predict."""

import pytest
import torch
from conftest import REPOSITORY

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import timed
from benchmarks.scaling.report import as_markdown, conclusions
from benchmarks.throughput.cuts import find_cuts
from benchmarks.throughput.settings import case_tree, load_settings
from blpipe.boundary import Boundary

QUICK = REPOSITORY / "benchmarks/scaling/quick.yaml"


def test_where_it_overtakes_is_where_it_stays_ahead():
    def row(ours, others):
        return {"BackLink d=1": ours, "GPipe": others, "1F1B": 1.0, "zero-bubble": 100.0}

    gpipe, one_f_one_b, zero_bubble, paper = conclusions({
        "1": {"one device": 1.0}, "2": row(1.5, 1.0), "4": row(2.0, 2.5), "8": row(6.0, 3.0), "16": row(9.0, 4.0)})
    assert gpipe.endswith("faster than GPipe from K = 8 on")
    assert one_f_one_b.endswith("faster than 1F1B from K = 2 on")
    assert zero_bubble.endswith("faster than zero-bubble at none of these K up to the last")
    assert "48% of one device's time from K = 8 on" in paper


@pytest.mark.parametrize(("arguments", "said"), [
    (["--stages", "two"], "--stages: 'two' must be whole numbers from 1 on, such as 1,2,4,8"),
    (["--stages", "2,64"], "--stages: 64 stages need as many blocks, and the model has 5"),
    (["--stages", "1"], "--stages: 1 leaves nothing to compare; give numbers from 2 on"),
    (["--measure", "5"], "microbatches: 4 are fewer than the 5 stages, and torch's 1F1B wants as many; use more, or "),
    (["--measure", "3"], "cases.ResNet-8: a batch of 16 does not divide among 4 microbatches and 3 processes; use a m"),
])
def test_what_a_user_can_put_right_is_said_in_one_line(arguments, said, tmp_path, capsys):
    assert scaling.main([str(QUICK), "--device", "cpu", "--out", str(tmp_path), *arguments]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"scaling: {said}")


def test_the_shipped_configs_have_one_case():
    for name in ("quick", "resnet110", "timed"):
        assert len(load_settings(REPOSITORY / f"benchmarks/scaling/{name}.yaml", {}).cases) == 1


def test_timed_parts_take_their_time_for_what_is_asked_of_them(monkeypatch):
    taken = []
    monkeypatch.setattr(timed, "sleep", taken.append)
    seconds = {"forward_seconds": 1.0, "backward_seconds": 4.0}
    first, _ = timed.blocks(2, [3, 1, 1], 5, **seconds)
    x = torch.rand(2, 3, 1, 1, requires_grad=True)
    out = first(x)
    torch.testing.assert_close(out, x)
    assert taken == [2.0]
    for wanted, halves in (([x], 1), ([first.weight], 1), ([x, first.weight], 2)):
        taken.clear()
        error = torch.rand(2, 3, 1, 1)
        gradients = torch.autograd.grad(out, wanted, error, retain_graph=True)
        assert taken == [4.0] * halves
        assert all(gradient is not None for gradient in gradients)
    taken.clear()
    assert first.to("meta")(x.detach().to("meta")).shape == x.shape
    assert not taken  # where only shapes are wanted
    assert timed.head(Boundary((3, 1, 1), 5), **seconds)(x).shape == (2, 5)
    assert taken == [2.0]


def test_timed_blocks_are_cut_evenly_by_their_time_and_that_of_heads_and_links(monkeypatch):
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(timed, "sleep", sleep)
    monkeypatch.setattr("blpipe.forecast.costs.perf_counter", lambda: clock[0])
    settings = load_settings(REPOSITORY / "benchmarks/scaling/timed.yaml", {"stages": 2})
    name, = settings.cases
    cuts = find_cuts(case_tree(settings, name, "cpu"), settings.measured, settings.microbatches, torch.device("cpu"))
    # Each block takes 3, a head 3, and the link 1, for the parameters of one block: 15 · 3 + 3 + 1 is 49, 17 · 3 is 51.
    assert cuts == {"stages": ["15"], "no_heads": ["16"], "backprop": ["16"], "virtual": ["8", "16", "24"]}


def test_columns_that_nobody_measured_or_predicted_are_left_out():
    found = {"case": "C", "batch": 8, "microbatches": 2, "environment": {"device": "D"},
             "measured": {"1": {"one device": 1.0}, "2": {"greedy": 2.0}},
             "predicted": {"1": {"one device": 1.0}, "2": {"BackLink d=1": 1.5, "1F1B": 1.0}}}
    header, _, measured, predicted = [line for line in as_markdown(found).splitlines() if line.startswith("|")]
    assert header == "| K |  | BackLink d=1 | greedy | 1F1B |"
    assert measured == "| 2 | measured | – | 2.00 | – |"
    assert predicted == "| 2 | predicted | 1.50 | – | 1.00 |"


def test_only_the_stages_asked_for_are_measured(monkeypatch):
    settings, cpu = load_settings(QUICK, {}), torch.device("cpu")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert settings.microbatches == 4  # torch's 1F1B wants as many as there are stages
    assert scaling._measured_counts(None, [2, 3, 4, 8], settings, 32, cpu) == [2, 4]
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert scaling._measured_counts(None, [2, 3, 4, 8], settings, 32, cpu) == [2]
    assert scaling._measured_counts("4", [2, 3, 4, 8], settings, 32, cpu) == [4]
