"""The benchmark of single optimisations: a small case, and what it says of bad input."""

import json

import pytest
import torch
import yaml
from conftest import REPOSITORY

from benchmarks.ablation import __main__ as ablation
from benchmarks.environment import folder_name

SMALL = {
    "base": {"model": {"name": "mlp", "args": {"hidden": [4, 4]}}, "partition": {"stages": 2},
             "data": {"name": "synthetic", "args": {"shape": [3, 4, 4], "classes": 3}},
             "train": {"batch_size": 4}, "runtime": {"device": "cpu"}},
    "rows": {"nothing": {}, "greedy": {"method.name": "greedy"}},
    "rounds": 2, "steps": 3,
}


@pytest.fixture
def measure(tmp_path):
    """Runs the benchmark on a config; returns its exit code and the folder of its results."""
    def run(tree):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return ablation.main([str(path)]), tmp_path / "results" / folder_name(torch.device("cpu"))
    return run


def test_every_row_is_measured_in_every_round_and_compared_with_the_first(measure, capsys):
    code, results = measure(SMALL)
    assert code == 0
    found = json.loads((results / "small.json").read_text())
    assert list(found["rows"]) == ["nothing", "greedy"]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in found["rows"].values())
    table = (results / "small.md").read_text().splitlines()
    assert table[2].startswith("| nothing | – | ")
    assert table[2].endswith(" | 1.00 | 1.00 … 1.00 | – |")
    assert table[3].startswith("| greedy | `method.name: greedy` | ")
    assert "round 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "said"), [
    ({"rows": {"wrong": {"train.precison": "bf16"}}}, "train.precison: unknown key; did you mean train.precision?"),
    ({"rounds": 0}, "rounds: "),
    ({"base": {**SMALL["base"], "train": {}}}, "base.train.batch_size: missing"),
])
def test_bad_input_is_said_in_one_line(change, said, measure, capsys):
    code, results = measure({**SMALL, **change})
    assert code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ablation: {said}")
    assert not results.exists()


@pytest.mark.parametrize(("name", "device"), [
    ("cpu", "cpu"), ("cpu_memory_kept", "cpu"), ("cpu_memory_given_back", "cpu"), ("gpu", "cuda"),
    ("gpu_compiled", "cuda")])
def test_the_shipped_configs_are_sound(name, device, monkeypatch):
    monkeypatch.setattr(ablation, "open_local", lambda plan, data: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = ablation.parse_as(ablation.AblationConfig, ablation.read_yaml(
        REPOSITORY / f"benchmarks/ablation/{name}.yaml"))
    for row in settings.rows:
        assert ablation._open(settings, row).config.runtime.device == device
