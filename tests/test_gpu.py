"""On a GPU: every engine learns what the CPU learns, to rounding. Skipped where there is none."""

import pytest
import torch
from conftest import metrics_of, small_config, train_in_processes, train_locally

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none here")]

LATE = small_config("late", method__link={"delay": 1, "length": 2}, train__microbatches=2,
                    model={"target": "models_under_test:conv_net", "args": {"dropout": 0.0}})
ON_GPU = {**LATE, "runtime": {"device": "cuda"}}


def learned(run):
    return [number for row in metrics_of(run) for number in row[3:]]


def test_the_local_engine_learns_as_on_the_cpu(tmp_path):
    on_cpu, on_gpu = train_locally(LATE, tmp_path / "cpu"), train_locally(ON_GPU, tmp_path / "gpu")
    assert learned(on_gpu) == pytest.approx(learned(on_cpu), rel=0.05, abs=0.05)


def test_the_pipeline_learns_as_the_local_engine(tmp_path):
    """Over NCCL with three GPUs or more; with fewer, through host memory."""
    run, = train_in_processes([ON_GPU], 3, tmp_path)
    assert learned(run) == pytest.approx(learned(train_locally(ON_GPU, tmp_path)), rel=0.05, abs=0.05)
