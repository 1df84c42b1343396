"""Run under torchrun by the tests: train a list of configs one after the other, in one set of processes.

    torchrun --standalone --nproc-per-node=K tests/ranks.py JOBS.json
"""

import json
import sys
from pathlib import Path

import torch

from blpipe.config import parse_config
from blpipe.runs import train_run

if __name__ == "__main__":
    torch.set_num_threads(1)
    for tree in json.loads(Path(sys.argv[1]).read_text()):
        train_run(parse_config(tree))
