"""Messages, hands shaken, and which engine a launch gets."""

import re
import threading

import pytest
import torch
import torch.distributed as dist
from conftest import small_config
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.elastic.rendezvous import RendezvousParameters

from blpipe.config_file import parse_config
from blpipe.errors import ConfigError, PeerLostError, UserError
from blpipe.specs import TensorSpec
from blpipe.trainer import choose_engine
from blpipe.transport import world
from blpipe.transport.memory import MemoryQueue
from blpipe.transport.messages import message_bytes, views
from blpipe.transport.queues import SendQueue, lost_peer
from blpipe.transport.rendezvous import open_store
from blpipe.transport.world import Meeting, shake_hands

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
LAYOUTS = st.lists(st.builds(TensorSpec, st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from(DTYPES)),
                   min_size=1, max_size=4).map(tuple)


@given(LAYOUTS, st.integers(0, 2**32))
def test_a_message_carries_its_tensors_apart(layout, seed):
    buffer = torch.zeros(message_bytes(layout), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    sent = [torch.randint(0, 2, spec.shape, generator=generator).to(spec.dtype) for spec in layout]
    for view, tensor in zip(views(buffer, layout), sent, strict=True):
        assert view.data_ptr() % view.element_size() == 0
        view.copy_(tensor)
    for view, tensor in zip(views(buffer, layout), sent, strict=True):
        assert torch.equal(view, tensor)


def test_a_queue_in_memory_keeps_order():
    queue = MemoryQueue()
    assert not queue.has_message()
    for value in (1.0, 2.0):
        queue.put(torch.full((2, 3), value).t())
    first, = queue.get()
    assert first.is_contiguous()
    assert first[0, 0] == 1.0
    assert queue.get()[0][0, 0] == 2.0
    assert not queue.has_message()


def shake(contracts):
    """What each rank raises when it shakes hands with its contract."""
    store, raised = dist.HashStore(), {}

    def rank(index):
        try:
            shake_hands(Meeting(store, index, len(contracts)), contracts[index])
        except UserError as error:
            raised[index] = str(error)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(len(contracts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return raised


def test_neighbours_with_one_contract_shake_hands():
    assert shake([{"outputs": {"8": [[8, 2]]}}] * 3) == {}


def test_one_with_another_contract_is_refused_by_all():
    one, other = ({"outputs": [1], "config": {"seed": 0, "train": {"epochs": epochs}}} for epochs in (2, 3))
    raised = shake([one, one, other])
    assert raised.keys() == {0, 1, 2}
    assert raised[1] == ("rank 1 and rank 2 differ in config.train.epochs: 2 and 3; "
                         "start every rank with the same config, data and versions")


@pytest.fixture
def at_rank(monkeypatch):
    """Calls a function as this rank of three, which share a store."""
    store = dist.HashStore()

    def call(rank, function):
        monkeypatch.setattr(world, "_attempt", lambda timeout: (store, rank, 3))
        return function(60.0)
    return call


def test_one_rank_reports_a_failure(at_rank):
    assert [at_rank(rank, world.is_reporter) for rank in (1, 0, 1)] == [True, False, True]


def test_every_run_of_the_same_processes_has_a_meeting_of_its_own(at_rank):
    at_rank(0, world.meet).announce({"run": "first"})
    at_rank(0, world.meet).announce({"run": "second"})
    assert [at_rank(rank, world.meet).listen() for rank in (1, 1, 2, 2)] == [{"run": "first"}, {"run": "second"}] * 2


@pytest.mark.parametrize(("launched", "engine", "stages", "expected"), [
    (None, "auto", 3, "local"), (None, "local", 3, "local"), (3, "auto", 3, "pipeline"), (3, "pipeline", 3, "pipeline"),
    (1, "auto", 1, "local"), (1, "local", 3, "local"),
])
def test_the_launch_chooses_the_engine(monkeypatch, launched, engine, stages, expected):
    launch(monkeypatch, launched)
    assert choose_engine(tree(engine, stages)) == expected


@pytest.mark.parametrize(("launched", "engine", "stages", "message"), [
    (2, "auto", 3, r"^partition\.stages: 3 stages need 3 processes, torchrun started 2; run `torchrun .*=3 -m blpipe"),
    (1, "auto", 3, r"^partition\.stages: 3 stages need 3 processes, torchrun started 1"),
    (3, "local", 3, r"^runtime\.engine: local, but torchrun started 3 processes"),
    (None, "pipeline", 3, r"^runtime\.engine: pipeline needs a process a stage"),
])
def test_a_launch_that_does_not_fit_is_refused(monkeypatch, launched, engine, stages, message):
    launch(monkeypatch, launched)
    with pytest.raises(ConfigError, match=message):
        choose_engine(tree(engine, stages))


def test_a_launch_that_does_not_fit_the_cuts_is_told_what_to_set(monkeypatch):
    launch(monkeypatch, 2)
    config = parse_config(small_config("run", partition={"cuts": ["2", "4"]}))
    with pytest.raises(ConfigError, match=re.escape("set 'partition={stages: 2}', or leave torchrun out")):
        choose_engine(config)


def launch(monkeypatch, processes):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", str(processes)), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value) if processes else monkeypatch.delenv(name, raising=False)


def tree(engine, stages):
    return parse_config(small_config("run", partition__stages=stages, runtime__engine=engine))


class Sent:
    """A send under way, in place of torch.distributed's."""

    def __init__(self, buffer, log):
        self.buffer, self.log, self.complete = buffer, log, False

    def wait(self):
        self.complete = True
        self.log.append(bytes(self.buffer[:1].tolist()))


def test_sends_take_buffers_in_turn_and_none_is_written_before_its_send_is_complete(monkeypatch):
    under_way, arrived = [], []

    def isend(buffer, peer, group):
        assert all(sent.complete or sent.buffer.data_ptr() != buffer.data_ptr() for sent in under_way)
        under_way.append(Sent(buffer, arrived))
        return under_way[-1]

    monkeypatch.setattr(dist, "isend", isend)
    queue = SendQueue(None, 1, "sending", torch.device("cpu"), torch.device("cpu"))
    sizes = [64, 640, 64, 64, 128, 64]
    for number, size in enumerate(sizes):
        queue.put(torch.full((size,), number, dtype=torch.uint8))
    queue.drain()
    assert arrived == [bytes([number]) for number in range(len(sizes))]
    assert [sent.buffer.nbytes for sent in under_way] == sizes
    assert queue.sent_bytes == sum(sizes)
    assert len({sent.buffer.data_ptr() for sent in under_way}) < len(sizes)


def test_what_a_gpu_says_of_its_own_kernels_is_not_blamed_on_a_neighbour():
    with pytest.raises(torch.AcceleratorError), lost_peer("stage 2 receiving"):
        raise torch.AcceleratorError("device-side assert triggered")
    with pytest.raises(PeerLostError, match="stage 2 receiving: that process ended"), lost_peer("stage 2 receiving"):
        raise RuntimeError("connection closed by peer")


def test_a_rank_that_cannot_connect_says_so(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("connect() timed\nout")

    monkeypatch.setattr(world, "shake_hands", lambda meeting, contract: None)
    monkeypatch.setattr(dist, "init_process_group", fails)
    with pytest.raises(PeerLostError, match=r"^rank 1 connecting to the others: connect\(\) timed out$"):
        world.World(Meeting(None, 1, 2, 60.0), torch.device("cpu"), False, {})


@pytest.mark.parametrize(("name", "value", "refused"), [
    ("CUDA_LAUNCH_BLOCKING", "1", True), ("CUDA_LAUNCH_BLOCKING", "0", False),
    ("CUDA_DEVICE_MAX_CONNECTIONS", "1", True), ("CUDA_DEVICE_MAX_CONNECTIONS", "32", False)])
def test_an_environment_in_which_a_posted_receive_blocks_its_stage_is_refused(name, value, refused, monkeypatch):
    monkeypatch.setattr(world.os, "environ", {name: value})
    if not refused:
        world.prepare_launches()
        assert world.os.environ == {"CUDA_DEVICE_MAX_CONNECTIONS": "32", name: value}
        return
    with pytest.raises(UserError, match=f"^{name}: .*; unset it"):
        world.prepare_launches()


def test_a_process_of_several_that_is_not_told_which_gpu_is_its_own_takes_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert world.choose_device("auto") == (torch.device("cuda", 2), True)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="^LOCAL_RANK: is not set"):
        world.choose_device("auto")
    assert world.choose_device("cpu") == (torch.device("cpu"), False)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert world.choose_device("auto") == (torch.device("cuda", 0), True)


@pytest.mark.parametrize(("endpoint", "nodes", "port"), [("node1", 2, 29400), ("node1:5000", 2, 5000)])
def test_several_nodes_meet_at_torchruns_port_unless_another_is_named(endpoint, nodes, port, monkeypatch):
    monkeypatch.setattr("blpipe.transport.rendezvous.TCPStore", lambda host, port, **options: (host, port))
    parameters = RendezvousParameters("blpipe", endpoint, "run", 1, nodes, is_host=False)
    assert open_store(parameters) == ("node1", port)
