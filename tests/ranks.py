"""Train a list of configs one after the other, in one set of real processes; used by the tests.

A config's `resume_from`, if there is one, is the checkpoint to go on from; its `call` a "module:function" that is
called with it instead.

    python tests/ranks.py K JOBS.json

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


def rank(index: int, trees: list[dict]) -> None:
    """One stage of every run."""
    # Loaded by `load_commands`, quicker than at the top.
    import torch

    from blpipe.config_file import parse_config
    from blpipe.plugins import import_target
    from blpipe.runs import train_run
    from blpipe.transport.world import meet
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(index)
    if "NCCL_ON_ONE_GPU" in os.environ:
        # As on machines of one GPU each. NCCL refuses two ranks on a GPU of what it takes for one host.
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", NCCL_HOSTID=f"host{index}",
                          NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
    if "DETERMINISTIC" in os.environ:
        torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    store = meet(timeout_seconds=60)  # keeps rank 0's server up from the first run to the last
    for tree in trees:
        checkpoint, call = tree.pop("resume_from", None), tree.pop("call", None)
        if call:
            import_target("call", call)(tree)
            continue
        train_run(parse_config(tree), resume_from=checkpoint and Path(checkpoint))
    del store


if __name__ == "__main__":
    cli.load_commands()
    processes, trees = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes),
                      LOCAL_WORLD_SIZE=str(processes))
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, args=(index, trees)) for index in range(processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))
