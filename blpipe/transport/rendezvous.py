"""`torchrun --rdzv-backend=blpipe`: how torchruns meet, over a store that listens on one address alone.

torchrun's own stores listen on all of a machine's addresses, those of `--standalone` too. Without
`--rdzv-endpoint=HOST:PORT` that address is the loopback one. Several nodes meet as by torchrun's own c10d backend,
whose options `--rdzv-conf` takes; one of them, with `is_host=1`, is HOST. setup.cfg names `backend` to torchrun.
"""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from uuid import uuid4

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint


class OneStoreRendezvous(RendezvousHandler):
    """torchrun's c10d rendezvous, whose store the workers share, under a name of each attempt's own.

    c10d itself opens a second store for them, and nodes that stay do not learn its address when another takes it over.
    How often each torchrun has restarted its workers is no common name: a node that is new counts from 0.
    """

    use_agent_store = True

    def __init__(self, parameters: RendezvousParameters):
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # no second one
        self._store = open_store(parameters)
        self._nodes = create_handler(self._store, C10dRendezvousBackend(self._store, parameters.run_id), parameters)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all nodes are there, and tell the workers, through their environment, which attempt it is."""
        met = self._nodes.next_rendezvous()
        os.environ["BLPIPE_ATTEMPT"] = met.store.compare_set("attempt", "", uuid4().hex).decode()
        return RendezvousInfo(met.store, met.rank, met.world_size,
                              RendezvousStoreInfo(self._store.host, self._store.port))

    def get_backend(self) -> str:
        """The name that `--rdzv-backend` gives."""
        return "blpipe"

    def get_run_id(self) -> str:
        """That of `--rdzv-id`."""
        return self._nodes.get_run_id()

    def is_closed(self) -> bool:
        """Whether a node has ended the run."""
        return self._nodes.is_closed()

    def set_closed(self) -> None:
        """End the run on all nodes."""
        self._nodes.set_closed()

    def num_nodes_waiting(self) -> int:
        """How many nodes wait for the next attempt."""
        return self._nodes.num_nodes_waiting()

    def shutdown(self) -> bool:
        """Part from the other nodes."""
        return self._nodes.shutdown()


def open_store(parameters: RendezvousParameters) -> TCPStore:
    """The store at `--rdzv-endpoint`; the host's own listens on that address alone.

    Several nodes meet at torchrun's own port where the endpoint names none.
    """
    several = parameters.max_nodes > 1
    host, port = parse_rendezvous_endpoint(parameters.endpoint or "127.0.0.1", default_port=29400 if several else 0)
    timeout = timedelta(seconds=parameters.get_as_int("read_timeout", 60) or 60)
    if not parameters.get_as_bool("is_host", not several):
        return TCPStore(host, port, is_master=False, timeout=timeout)
    with socket.create_server((host, port)) as server:
        host, port = server.getsockname()
        return TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False,
                        master_listen_fd=server.detach())


def backend() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What makes torchrun's rendezvous handler from its options."""
    return OneStoreRendezvous
