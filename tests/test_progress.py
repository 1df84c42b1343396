"""What a user sees while a run goes on."""

import json
import os
import pty
import re
import subprocess
import sys
import termios

import pytest
import yaml
from conftest import child_environment, small_config, torchrun_command, train_in_processes

from blpipe.progress import stage_text

TRAIN = ["-m", "blpipe", "train", "long.yaml"]


def on_a_terminal(command, folder) -> str:
    """What a command writes to a terminal that shows its errors."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 150))
    with subprocess.Popen(command, cwd=folder, env=child_environment(), stderr=follower,
                          stdout=subprocess.DEVNULL, start_new_session=True) as process:
        os.close(follower)
        written = b""
        try:
            while part := os.read(leader, 4096):
                written += part
        except OSError:  # the other end is closed
            pass
        os.close(leader)
        assert process.wait(timeout=100) == 0, written.decode()
    return written.decode()


@pytest.mark.parametrize("command", [[sys.executable, *TRAIN], torchrun_command(2, *TRAIN)], ids=["local", "pipeline"])
def test_every_stage_has_a_bar_that_says_how_it_gets_on(command, tmp_path):
    tree = small_config("long", partition__stages=2, train__epochs=40, train__eval_every_epochs=0)
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(tree))
    shown = on_a_terminal(command, tmp_path)
    for stage in (1, 2):
        bars = re.findall(rf"stage {stage} +\d+%\|[^|]*\| (\d+)/240 \[[^],\r\n]*, loss (\d\.\d+), [\d,]+ samples/s, "
                          r"busy [\d.]+ %, waiting [\d.]+ %\]", shown)
        assert bars, shown
        steps = [int(number) for number, _ in bars]
        assert steps == sorted(steps)
        assert 0 < steps[-1] <= 240


def test_what_is_not_known_of_a_stage_is_left_out():
    on_cpu = {"loss": None, "busy_seconds": None, "wait_seconds": None, "gpu_utilization": None,
              "gpu_memory_bytes": None}
    assert stage_text(on_cpu, None) == ""
    on_gpu = {"loss": 0.5, "busy_seconds": 3.0, "wait_seconds": 1.0, "gpu_utilization": 0.8, "gpu_memory_bytes": 2**30}
    assert stage_text(on_gpu, 1234.0) == "loss 0.5000, 1,234 samples/s, busy 75.0 %, waiting 25.0 %, GPU 80.0 %, 1 GiB"


def test_lines_come_every_so_many_steps_without_a_terminal(tmp_path):
    tree = small_config("long", partition__stages=2, train__epochs=2, runtime__log_every_steps=4)  # of 6 an epoch
    run, = train_in_processes([tree], 2, tmp_path)
    said, = tmp_path.glob("said_*")
    lines = re.findall(r"^epoch (\d)/2  step (\d)/6  train loss (\d\.\d{4})  [\d,]+ samples/s$", said.read_text(), re.M)
    assert [line[:2] for line in lines] == [("1", "4"), ("2", "2"), ("2", "6")]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert float(lines[-1][2]) == pytest.approx(rows[-1]["train_loss"], abs=1e-4)
