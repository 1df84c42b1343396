"""Runs on several nodes, and where each process listens: two nodes are played by one machine."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from conftest import REPOSITORY, assert_same_run, child_environment, small_config, train_locally

from blpipe.transport.world import stay_on_this_machine

NODE = str(REPOSITORY / "launch/node.sh")
LISTENING = "0A"  # a socket's state in /proc/net/tcp


class Network:
    """Two network namespaces with a cable between them; where they are not permitted, two loopback addresses."""

    def __init__(self):
        self._started: list[Started] = []
        self._names = [f"blpipe-{uuid4().hex[:6]}-{node}" for node in (1, 2)]
        try:
            self._lay_cable(*self._names)
            self.addresses = ["192.0.2.1", "192.0.2.2"]
            self._prefixes = [["ip", "netns", "exec", name] for name in self._names]
            self._environments = [{}, {}]
        except (OSError, subprocess.CalledProcessError):
            self.close()
            self.addresses = ["127.0.0.1", "127.0.0.2"]
            self._prefixes = [[], []]
            self._environments = [{"ADDRESS": address, "GLOO_SOCKET_IFNAME": "lo"} for address in self.addresses]

    def start(self, node: int, folder: Path, *command: str) -> "Started":
        """A command on node 1 or 2."""
        self._started.append(Started([*self._prefixes[node - 1], *command], folder, self._environments[node - 1]))
        return self._started[-1]

    def start_where_the_host_has_a_name(self, folder: Path, *command: str) -> "Started":
        """A command on node 1; the host's name stands for its address in the network, if it has one."""
        if not self._prefixes[0]:
            return self.start(1, folder, *command)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{self.addresses[0]} {os.uname().nodename}\n")
        return self.start(1, folder, "bash", "-c", 'mount --bind hosts /etc/hosts && exec "$@"', "-", *command)

    def close(self) -> None:
        """Whatever still runs is killed; both namespaces go, and the cable with them."""
        for command in self._started:
            command.kill()
        for name in self._names:
            with suppress(OSError):
                subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, timeout=10)

    def _lay_cable(self, one: str, other: str) -> None:
        for words in (f"netns add {one}", f"netns add {other}",
                      f"link add cable netns {one} type veth peer name cable netns {other}",
                      f"-n {one} address add 192.0.2.1/30 dev cable", f"-n {other} address add 192.0.2.2/30 dev cable",
                      *(f"-n {name} link set {device} up" for name in (one, other) for device in ("lo", "cable"))):
            subprocess.run(["ip", *words.split()], check=True, capture_output=True, timeout=10)


class Started:
    """A command in the background; what it says goes to a file."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]):
        self._log = folder / f"{uuid4().hex}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT,
                                             env=child_environment() | {"PYTHON": sys.executable} | environment)

    def wait_for(self, text: str, seconds: float = 90) -> None:
        """Until a line begins with this text."""
        end = time.monotonic() + seconds
        while f"\n{text}" not in f"\n{self._log.read_text()}":
            assert time.monotonic() < end and self._process.poll() is None, f"no {text!r} in:\n{self._log.read_text()}"
            time.sleep(0.05)

    def finish(self, seconds: float = 90) -> None:
        """Until it has ended, without a failure."""
        assert self._process.wait(timeout=seconds) == 0, self._log.read_text()

    def kill(self) -> None:
        """As a power cut would: torchrun's workers each have a process group of their own."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def processes(self) -> list[int]:
        """This one, those that it started, and those that they started."""
        found = [self._process.pid]
        for pid in found:
            with suppress(FileNotFoundError):
                found += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return found

    def listens(self) -> set[str]:
        """The addresses on which any of its processes listens."""
        return {address for pid in self.processes() for address in listening(pid)}


def listening(pid: int) -> set[str]:
    """The addresses on which a process listens."""
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            own.add(os.readlink(descriptor))
    rows = [line.split() for table in ("tcp", "tcp6")
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
    return {readable(row[1]) for row in rows if row[3] == LISTENING and f"socket:[{row[9]}]" in own}


def readable(address_and_port: str) -> str:
    """An address from /proc/net/tcp: words of four bytes, the last one first."""
    packed = bytes.fromhex(address_and_port.split(":")[0])
    return str(ip_address(b"".join(packed[i:i + 4][::-1] for i in range(0, len(packed), 4))))


@pytest.fixture
def network():
    """Two nodes; nothing that ran on them is left when the test ends."""
    network = Network()
    try:
        yield network
    finally:
        network.close()


def start_node(network: Network, number: int, folder: Path, restarts: int = 0) -> Started:
    """run.yaml by launch/node.sh, one of its stages on each node."""
    return network.start(number, folder, "env", f"RESTARTS={restarts}", "bash", NODE, "2", "1", network.addresses[0],
                         "run.yaml")


def write_config(folder: Path, stages: int, **changes) -> dict:
    """run.yaml."""
    tree = small_config("run", partition__stages=stages, **changes)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return tree


@pytest.mark.timeout(300)
def test_a_node_that_is_lost_and_started_again_changes_nothing(tmp_path, network):
    tree = write_config(tmp_path, 2, train__epochs=15, checkpoint={"every_epochs": 1})
    first, second = (start_node(network, number, tmp_path, restarts=1) for number in (1, 2))
    first.wait_for("epoch 3/")
    assert first.listens() | second.listens() <= {*network.addresses}
    second.kill()
    second = start_node(network, 2, tmp_path)
    first.finish()
    second.finish()
    assert_same_run(tmp_path / "runs/run", train_locally(tree, tmp_path))


def test_on_one_machine_nothing_listens_beyond_it(tmp_path, network):
    write_config(tmp_path, 2, train__epochs=10_000)
    run = network.start_where_the_host_has_a_name(
        tmp_path, sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=blpipe", "--rdzv-endpoint=localhost",
        "--nproc-per-node=2", "-m", "blpipe", "train", "run.yaml")
    run.wait_for("epoch 1/")
    assert [listening(pid) for pid in run.processes()] == [{"127.0.0.1"}] * 3


@pytest.mark.parametrize(("processes_here", "named", "interface"), [
    ("4", None, "lo"), ("4", "eth1", "eth1"), ("2", None, None), ("2", "eth1", "eth1"),
])
def test_the_loopback_interface_is_for_one_machine_and_a_named_one_stays(processes_here, named, interface, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes_here)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, named or "")
        if named is None:
            monkeypatch.delenv(name)
    stay_on_this_machine()
    assert [os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")] == [interface] * 2


@pytest.mark.parametrize(("words", "complaint"), [
    (["2", "2", "127.0.0.1"], "give NODES PROCESSES FIRST CONFIG, such as 2 8 node1 configs/resnet32_cifar10_k16.yaml"),
    (["two", "2", "127.0.0.1", "run.yaml"], "NODES: two: must be a number from 1 on"),
    (["2", "0", "127.0.0.1", "run.yaml"], "PROCESSES: 0: must be a number from 1 on, or gpu"),
    (["2", "2", "127.0.0.1:x", "run.yaml"], "FIRST: 127.0.0.1:x: must be HOST or HOST:PORT"),
    (["2", "2", "127.0.0.1", "other.yaml"], "CONFIG: other.yaml: no such file here"),
    (["2", "2", "no.such.host.invalid", "run.yaml"], "FIRST: no.such.host.invalid: no such host, or no route to it"),
    (["2", "2", "localhost", "run.yaml"], "FIRST: localhost is 127.0.0.1 here, which no other node can reach; give its "
                                          "address on the network"),
])
def test_wrong_usage_is_one_line(words, complaint, tmp_path):
    write_config(tmp_path, 4)
    done = subprocess.run(["bash", NODE, *words], cwd=tmp_path, capture_output=True, text=True, timeout=30,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"node.sh: {complaint}\n")
