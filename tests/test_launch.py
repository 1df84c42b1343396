"""The scripts for a machine with a GPU and for Slurm, with programs that only say what they would run."""

import signal
import subprocess
import time

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
    throughput = f"benchmarks.throughput benchmarks/throughput/gpu.yaml --device cuda --stages {stages}"
    assert ran[:-1] == ["pytest tests/test_gpu.py", "benchmarks.ablation benchmarks/ablation/gpu.yaml",
                        "benchmarks.memory --device cuda --precision tf32 --channels-last",
                        *([throughput] if stages else [])]
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


def slurm_job(folder, srun, *arguments, **environment):
    """launch/slurm.sbatch under a Slurm that only says what it is asked; `srun` is what the run does."""
    for name, does in (("srun", f'echo "srun $*"; echo $$ > srun.pid; {srun}'),
                       ("scancel", 'echo "scancel $*"; kill -TERM "$(cat srun.pid)"'),
                       ("scontrol", 'if [ "$1" = show ]; then printf "n7\\nn9\\n"; else echo "scontrol $*"; fi')):
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)
    asked_by = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[7,9]",
                "SLURM_JOB_NUM_NODES": "2"}
    return subprocess.Popen(["bash", str(REPOSITORY / "launch/slurm.sbatch"), *arguments], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=asked_by | environment)


def end_of(job):
    """A job's exit code, and what was asked of Slurm."""
    output, _ = job.communicate(timeout=30)
    return job.returncode, output.splitlines()


NODES = "srun --kill-on-bad-exit=1 bash launch/node.sh 2 4 n7:20042 run.yaml seed=1"


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_starts_each_node_and_ends_as_they_do(code, tmp_path):
    job = slurm_job(tmp_path, f"exit {code}", "run.yaml", "seed=1", SLURM_GPUS_ON_NODE="4")
    assert end_of(job) == (code, [NODES])


@pytest.mark.parametrize(("code", "asked"), [
    (1, [NODES, "scancel --signal=TERM 42", "scontrol requeue 42"]), (0, [NODES, "scancel --signal=TERM 42"]),
])
def test_a_job_whose_time_is_up_saves_and_queues_again_unless_it_is_done(code, asked, tmp_path):
    job = slurm_job(tmp_path, f'trap "exit {code}" TERM; touch begun; while true; do sleep 0.05; done',
                    "run.yaml", "seed=1", PROCESSES="4")
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert end_of(job) == (code, asked)


@pytest.mark.parametrize(("arguments", "complaint"), [
    ([], "give CONFIG, such as configs/resnet32_cifar10_k4.yaml"),
    (["run.yaml"], "the job has no GPUs; set PROCESSES to the number of processes on a node"),
])
def test_a_job_that_cannot_begin_says_why(arguments, complaint, tmp_path):
    assert end_of(slurm_job(tmp_path, "", *arguments)) == (2, [f"slurm.sbatch: {complaint}"])
