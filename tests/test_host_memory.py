"""Whether a process keeps the host's memory that it frees: counted in page faults, in processes of their own."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from blpipe.config_file import load_config
from blpipe.device import set_up

set_up(load_config(sys.argv[1], sys.argv[2:]))
faults = []
for step in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 24) for _ in range(2)]  # 64 MiB each: 16,384 pages, or 32 huge ones
    del kept
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def faults(*overrides):
    """Of a step that makes the same tensors again, once the heap has found its shape."""
    done = subprocess.run([sys.executable, "-c", COUNT, "configs/quickstart.yaml", *overrides], check=True, timeout=120,
                          capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep it")
def test_a_step_gets_no_memory_from_the_system_that_the_step_before_had():
    assert faults() < 10 < 60 < faults("runtime.keep_memory=false")
