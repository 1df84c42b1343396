"""What the benchmarks' figures are measured on."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the sweep of accuracies runs others, and does without torch
    import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def environment(device: "torch.device") -> dict[str, Any]:
    """Device, cores, versions and commit, for a results file."""
    import torch

    return {"device": device_name(device), "cores": os.cpu_count(), "python": platform.python_version(),
            "torch": torch.__version__, "commit": commit()}


def device_name(device: "torch.device") -> str:
    """The GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def folder_name(device: "torch.device") -> str:
    """Device and cores, as the name of the folder that results of this machine go into."""
    return re.sub(r"[^a-z0-9]+", "-", f"{device_name(device)} {os.cpu_count()} cores".lower()).strip("-")


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the code, "-dirty" where the package was changed since."""
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True)
        return done.stdout.strip()
    try:
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", "blpipe")
    except OSError:  # no git here
        return "unknown"
    return f"{head or 'unknown'}{'-dirty' if changed else ''}"
