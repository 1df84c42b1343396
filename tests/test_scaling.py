"""The benchmark of scaling: what it says; test_throughput.py has it measure and predict."""

import pytest
from conftest import REPOSITORY

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling.report import conclusions
from benchmarks.throughput.settings import load_settings

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
])
def test_what_a_user_can_put_right_is_said_in_one_line(arguments, said, tmp_path, capsys):
    assert scaling.main([str(QUICK), "--device", "cpu", "--out", str(tmp_path), *arguments]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"scaling: {said}")


def test_the_shipped_configs_have_one_case():
    for name in ("quick", "resnet110"):
        assert len(load_settings(REPOSITORY / f"benchmarks/scaling/{name}.yaml", {}).cases) == 1
