"""The pipeline engine and the local engine compute the same, bit for bit."""

from itertools import product

import pytest
from conftest import assert_same_run, small_config, train_in_processes, train_locally

SGD = {"name": "sgd", "lr": 0.05, "args": {"momentum": 0.9}}
ADAMW = {"name": "adamw", "lr": 0.01, "args": {"fused": True, "weight_decay": 0.1}, "lr_factors": {"*.bias": 0.5}}
DEEP = {"name": "mlp", "args": {"hidden": [12] * 8, "dropout": 0.2}}


def far(name, delay, microbatches, alpha, head="conv", **link):
    """Links that reach further than the next stage, and treat their errors in every way there is."""
    return small_config(name, partition__stages=4, method={"local_weight": alpha, "head": head, "link": {
        "length": "all", "delay": delay, **link}}, train__microbatches=microbatches,
        data__args={"shape": [2, 8, 8], "classes": 4, "samples": 56})


HEADS = [{"name": "mlp_sr", "args": {"convs": 1, "layers": 1}}, {"name": "blocks", "args": {"count": 2}}, "linear"]
LOSSES = ["supcon", {"name": "pred_sim", "args": {"beta": 0.5}}, {"name": "cross_entropy",
                                                                  "args": {"label_smoothing": 0.1}}, "pred_sim"]


def mixed(stages):
    """A head and a loss of its own for every stage; losses with parameters."""
    return small_config("mixed", partition__stages=stages, train__microbatches=2, optimizer=ADAMW,
                        method={"head": HEADS[:stages - 1], "loss": LOSSES[:stages], "link": {"delay": 1}})


def grid(stages, lengths, delays, microbatches):
    """Every combination, the optimizers in turn."""
    return [small_config(f"length_{length}_delay_{delay}_micro_{micro}", partition__stages=stages,
                         method__link={"length": length, "delay": delay}, train__microbatches=micro,
                         data__args={"shape": [2, 8, 8], "classes": 4, "samples": 56},
                         optimizer=(SGD, ADAMW)[number % 2])
            for number, (length, delay, micro) in enumerate(product(lengths, delays, microbatches))]


JOBS = {
    2: [
        *grid(2, [2], [0, 1], [1, 4]),
        small_config("microbatch", partition__stages=2, train__microbatches=4,
                     method__link={"delay": 3, "delay_unit": "microbatch", "keep": "recompute"}),
        small_config("greedy", partition__stages=2, method="greedy", optimizer=ADAMW),
        small_config("weighted", partition__stages=2, method={"link": {"weight": 0.5}, "head": "linear"}),
        small_config("unweighted", partition__stages=2, method__link__weight=0.0),
        small_config("drop_last", partition__stages=2, train__drop_last=True, schedule="cosine"),
        mixed(2),
        small_config("bf16_channels_last", partition__stages=2, train__precision="bf16", train__channels_last=True,
                     train__microbatches=2, method__link={"length": 2, "keep": "recompute"}, train__wire="bf16"),
    ],
    4: [
        *grid(4, [1, "all"], [0, 1], [1, 2]), *grid(4, ["all"], [3], [1, 2]),
        small_config("greedy", partition__stages=4, method="greedy", train__microbatches=2),
        far("two", 1, 1, 0.0, reach=2),
        far("two_in_time", 0, 4, 1.0, reach=2, weight=[1.0, 0.0, 0.5]),
        far("farthest", 1, 2, 0.0, reach="all", take="farthest", wire="bf16"),
        far("without_heads", 1, 4, 0.0, "none", reach="all", take="farthest", delay_unit="microbatch",
            keep="recompute"),
        far("normalized", 2, 4, 0.5, reach=3, normalize=True, keep="recompute"),
        far("late", 4, 1, 1.0, schedule="cosine", wire="bf16"),
        far("joint_in_time", 0, 4, 0.5, joint=True, weight=[1.0, 0.0, 0.5]),
        far("joint_late", 1, 2, 1.0, joint=True, keep="recompute", wire="bf16"),
        small_config("joint_tails", partition__stages=4, train__microbatches=2, method__link={"joint": True}),
        far("a_microbatch_late", 1, 4, 0.0, reach="all", delay_unit="microbatch"),
        small_config("recompute", partition__stages=4, method__link={"keep": "recompute", "length": "all"},
                     train__wire="bf16"),
        mixed(4),
        small_config("skips", partition__stages=4, train__microbatches=2, train__on_nonfinite="skip",
                     model={"target": "models_under_test:exploding_net", "args": {"at": 7}}),
    ],
    8: [
        small_config("late", partition__stages=8, model=DEEP, optimizer=ADAMW),
    ],
}


@pytest.mark.parametrize("stages", JOBS)
def test_pipeline_equals_local_bit_for_bit(stages, tmp_path):
    runs = train_in_processes(JOBS[stages], stages, tmp_path)
    for tree, run in zip(JOBS[stages], runs, strict=True):
        assert_same_run(run, train_locally(tree, tmp_path))
