"""The script for a machine with a GPU, with an interpreter that only says what it would run."""

import subprocess

import pytest
from conftest import REPOSITORY


def gpu_script(folder, gpus, *arguments, tests=0):
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo {gpus}; else echo "ran $*"; fi\n'
                      f'[ "$2" != pytest ] || exit {tests}\n')
    python.chmod(0o755)
    return subprocess.run(["bash", str(REPOSITORY / "launch/gpu.sh"), *arguments], capture_output=True, text=True,
                          timeout=30, env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)})


def test_without_a_gpu_nothing_is_run(tmp_path):
    done = gpu_script(tmp_path, 0)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.sh: torch sees no GPU here\n"


@pytest.mark.parametrize(("gpus", "stages"), [(1, None), (2, 2), (3, 2), (8, 4)])
def test_the_tests_come_first_and_what_time_is_left_goes_to_accuracy(gpus, stages, tmp_path):
    done = gpu_script(tmp_path, gpus)
    ran = [line.removeprefix("ran -m ") for line in done.stdout.splitlines() if line.startswith("ran")]
    throughput = [f"benchmarks.throughput --device cuda --stages {stages}"] if stages else []
    assert ran[:-1] == ["pytest tests/test_gpu.py", "benchmarks.ablation benchmarks/ablation/gpu.yaml",
                        "benchmarks.memory --device cuda", *throughput]
    assert ran[-1] in [f"benchmarks.accuracy benchmarks/accuracy/gpu.yaml --minutes {left}" for left in (9, 10)]


def test_tests_that_fail_are_the_exit_code_and_the_rest_is_run(tmp_path):
    done = gpu_script(tmp_path, 1, tests=1)
    assert done.returncode == 1
    assert done.stdout.count("ran") == 4
    assert "exit code 1" in done.stdout


def test_an_interruption_ends_all_of_it(tmp_path):
    done = gpu_script(tmp_path, 1, tests=130)
    assert (done.returncode, done.stdout.count("ran")) == (130, 1)


def test_minutes_must_be_a_number(tmp_path):
    done = gpu_script(tmp_path, 1, "ten")
    assert (done.returncode, done.stderr) == (2, "gpu.sh: ten: must be a number of minutes\n")


def test_nothing_is_begun_that_has_no_time_left(tmp_path):
    done = gpu_script(tmp_path, 1, "0")
    assert "ran" not in done.stdout
    assert done.stdout.count("no time left") == 3
