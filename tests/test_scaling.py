"""The benchmark of scaling: a small case, measured in two processes and predicted in more."""

import json

import pytest
import torch
from conftest import REPOSITORY

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling.report import COLUMNS, PREDICTED, conclusions
from benchmarks.throughput.settings import load_settings
from blpipe.forecast.report import make_report

QUICK = REPOSITORY / "benchmarks/scaling/quick.yaml"


def test_what_the_machine_has_is_measured_and_the_rest_predicted(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert scaling.main([str(QUICK), "--device", "cpu", "--stages", "2,4", "--out", str(tmp_path)]) == 0
    path, = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert set(found["measured"]) == {"1", "2"} and set(found["predicted"]) == {"1", "2", "4"}
    assert all(set(found["predicted"][count]) == set(PREDICTED) for count in ("2", "4"))
    assert set(COLUMNS) <= set(found["measured"]["2"])
    config = scaling._config(load_settings(QUICK, {}), "ResNet-8", torch.device("cpu"))
    assert config.train.microbatches == 1  # one device trains whole batches
    assert found["predicted"]["1"]["one device"] == make_report(config).methods[-1].samples_per_second
    assert all(value > 0 for rows in (found["measured"], found["predicted"])
               for row in rows.values() for value in row.values())
    table = path.with_suffix(".md").read_text()
    kinds = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| ")]
    assert kinds[2:] == [["2", "measured"], ["2", "predicted"], ["4", "predicted"]]
    assert path.with_suffix(".png").exists()
    assert table in capfd.readouterr().out


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
])
def test_what_a_user_can_put_right_is_said_in_one_line(arguments, said, tmp_path, capsys):
    assert scaling.main([str(QUICK), "--device", "cpu", "--out", str(tmp_path), *arguments]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"scaling: {said}")


def test_the_shipped_configs_have_one_case():
    for name in ("quick", "resnet110"):
        assert len(load_settings(REPOSITORY / f"benchmarks/scaling/{name}.yaml", {}).cases) == 1
