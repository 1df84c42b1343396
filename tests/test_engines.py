"""The pipeline engine and the local engine compute the same, bit for bit (DESIGN §3, invariant 1)."""

import pytest
from conftest import assert_same_run, small_config, train_in_processes, train_locally

ADAMW = {"name": "adamw", "lr": 0.01, "args": {"fused": True, "weight_decay": 0.1}}

GRID = {
    2: [
        small_config("greedy", partition__stages=2, method__name="greedy"),
        small_config("exact", partition__stages=2, method__link__delay=0),
        small_config("exact_micro", partition__stages=2, method__link__delay=0, train__microbatches=4, optimizer=ADAMW),
        small_config("late", partition__stages=2, method__link__length=2),
        small_config("very_late", partition__stages=2, method__link={"delay": 2, "length": "all"},
                     train__microbatches=2),
        small_config("recompute", partition__stages=2, method__link={"keep": "recompute", "delay": 1}, optimizer=ADAMW),
        small_config("weighted", partition__stages=2, method__link__weight=0.5, method__head="linear"),
        small_config("drop_last", partition__stages=2, train__drop_last=True, schedule={"name": "cosine"}),
    ],
    3: [
        small_config("exact", method__link={"delay": 0, "length": 2}, optimizer=ADAMW),
        small_config("exact_micro", method__link__delay=0, train__microbatches=2),
        small_config("late_all", method__link={"delay": 1, "length": "all"}),
        small_config("late_micro", method__link__delay=1, train__microbatches=4, optimizer=ADAMW),
        small_config("very_late", method__link={"delay": 3, "length": 1}),
        small_config("unweighted", method__link__weight=0.0),
    ],
}


@pytest.mark.parametrize("stages", GRID)
def test_pipeline_equals_local_bit_for_bit(stages, tmp_path):
    runs = train_in_processes(GRID[stages], stages, tmp_path)
    for tree, run in zip(GRID[stages], runs, strict=True):
        assert_same_run(run, train_locally(tree, tmp_path))
