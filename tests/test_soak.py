"""The soak: two minutes of it in real processes, and what it takes for a failure."""

import json

import pytest
import torch

from benchmarks.soak import __main__ as soak
from benchmarks.soak.cases import CASES, same
from benchmarks.soak.report import grown

MIB = 2 ** 20


@pytest.mark.timeout(480)  # the undisturbed runs come before, and a round that has begun is finished
def test_two_minutes_of_stalls_change_no_result_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # threads that wait leave their core to other tests
    # Forty times as often as in the hour, so that these processes sleep, and other tests have the cores.
    assert soak.main(["--minutes", "2", "--stalls", "40", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["steps"] == dict.fromkeys(CASES, 51)
    assert [set(stage["queues"]) for stage in found["stages"]] == [
        {"send activations", "receive errors"},
        {"receive activations", "send activations", "receive errors", "send errors"},
        {"receive activations", "send activations", "receive errors", "send errors"},
        {"receive activations", "send errors"}]
    for stage in found["stages"]:
        assert len(stage["resident_bytes"]) >= 2  # rounds
        assert all(count["stalls"] > 10 and count["longest"] > 0.01 for count in stage["queues"].values())
    table = (tmp_path / "cpu.md").read_text()
    assert table.startswith(f"{len(found['stages'][0]['resident_bytes']) * 204:,} steps in ")


def test_any_other_weight_or_metric_is_another_result():
    def outcome(weight=1.0, loss=2.0):
        return {"weights": {"a": torch.tensor([weight])}, "metrics": [[1, 1, loss]]}
    assert same(outcome(), outcome())
    assert not same(outcome(), outcome(weight=1.0 + 2 ** -20))
    assert not same(outcome(), outcome(loss=2.1))
    assert not same(outcome(), outcome() | {"weights": {}})


@pytest.mark.parametrize(("last", "says"), [
    (101, []),
    (103, ["stage 2: its resident size grew from 100.0 to 103.0 MiB, more than 2 %"]),
])
def test_a_process_that_grows_after_the_warm_up_is_named(last, says):
    def rounds(*sizes):
        return {"resident_bytes": [[size * MIB] for size in sizes]}
    found = {"stages": [rounds(50, 100, 100, 100, 101), rounds(50, 100, 101, 102, last)]}
    assert grown(found) == says
