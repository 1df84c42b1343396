"""Train lists of configs, each in one set of real processes, one config after the other; used by the tests.

    python tests/ranks.py

reads a job a line, as JSON, and for each says the worst exit code of its processes:

    {"processes": 2, "trees": [CONFIG, …], "environment": {…}, "folder": WHERE, "said": FILE}

They run in that folder, with that environment, and what they print goes to the file. A config's `resume_from`, if
there is one, is the checkpoint to go on from; its `call` a "module:function" that is called with it instead.

The processes are forked from one that has imported torch already, and find each other through the variables
that torchrun sets. (What torchrun itself does is tested by test_processes.py and test_readme.py.)
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

from blpipe import cli


def rank(index: int, job: dict) -> None:
    """One stage of every run."""
    # Loaded by `load_commands`, quicker than at the top.
    import torch

    from blpipe.config_file import parse_config
    from blpipe.plugins import import_target
    from blpipe.runs import train_run
    from blpipe.transport.world import meet
    os.chdir(job["folder"])
    with Path(job["said"]).open("ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ.clear()
    os.environ.update(job["environment"] | {"RANK": str(index), "LOCAL_RANK": str(index)})
    sys.path[:0] = job["environment"]["PYTHONPATH"].split(os.pathsep)  # read when an interpreter begins
    if "NCCL_ON_ONE_GPU" in os.environ:
        # As on machines of one GPU each. NCCL refuses two ranks on a GPU of what it takes for one host.
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", NCCL_HOSTID=f"host{index}",
                          NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
    if "DETERMINISTIC" in os.environ:
        torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    store = meet(timeout_seconds=60)  # keeps rank 0's server up from the first run to the last
    for tree in job["trees"]:
        checkpoint, call = tree.pop("resume_from", None), tree.pop("call", None)
        if call:
            import_target("call", call)(tree)
            continue
        train_run(parse_config(tree), resume_from=checkpoint and Path(checkpoint))
    del store


def run(job: dict) -> int:
    """Run a job in processes of its own; returns the worst of their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = job["processes"]
    job["environment"].update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes),
                              LOCAL_WORLD_SIZE=str(processes))
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, args=(index, job)) for index in range(processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode) for process in ranks)


if __name__ == "__main__":
    cli.load_commands()
    for line in sys.stdin:
        print(run(json.loads(line)), flush=True)
