"""From one data path to another under traffic: nothing is lost, and nothing is let through."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from podwire.kernel import netns
from podwire.kernel.bpf import features
from podwire.lab import manifests
from podwire.lab.cluster import Lab
from podwire.lab.connect import ask
from tests.lab.conftest import wait_for

OBJECTS = """
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: client, labels: {may: "true"}}
  spec: {nodeName: node1, containers: [{name: c}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: stranger}
  spec: {nodeName: node1, containers: [{name: c}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: here, labels: {app: echo}}
  spec: &echo
    nodeName: node1
    containers: [{name: c, ports: [{containerPort: 80}, {containerPort: 53, protocol: UDP}]}]
- apiVersion: v1
  kind: Pod
  metadata: {name: there, labels: {app: echo, at: node2}}
  spec: {<<: *echo, nodeName: node2}
- apiVersion: v1
  kind: Pod
  metadata: {name: host, labels: {app: host}}
  spec:
    nodeName: node1
    hostNetwork: true
    containers: [{name: c, ports: [{containerPort: 8081}]}]
- apiVersion: v1
  kind: Service
  metadata: {name: echo}
  spec:
    selector: {app: echo}
    ports: [{name: tcp, port: 80}, {name: udp, port: 53, protocol: UDP}]
- apiVersion: v1
  kind: Service
  metadata: {name: far}
  spec: {type: NodePort, selector: {at: node2}, ports: [{port: 80, nodePort: 30080}]}
- apiVersion: v1
  kind: Service
  metadata: {name: host}
  spec: {type: NodePort, selector: {app: host}, ports: [{port: 8081, nodePort: 30081}]}
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: some}
  spec:
    podSelector: {matchLabels: {app: echo}}
    ingress:
    - from:
      - {podSelector: {matchLabels: {may: "true"}}}
      - {ipBlock: {cidr: 203.0.113.0/24}}
      - {ipBlock: {cidr: 172.16.0.0/12}}
      - {ipBlock: {cidr: 192.168.0.0/16}}
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: nobody-calls-the-client}
  spec: {podSelector: {matchLabels: {may: "true"}}, policyTypes: [Ingress]}
"""
REQUEST = b"GET / HTTP/1.1\r\nHost: echo\r\n\r\n"
WORLD = "203.0.113.10"


class Traffic:
    """Connections that stay open, new ones all the time, and datagrams that must not pass.

    Sockets are this process's, which is in no cgroup of a node: no socket hook sees them, so all
    goes packet by packet.
    """

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        names = ("client", "stranger", "outside", "node/node1")
        self._fds = {name: lab.netns_fd(name) for name in names}
        for fd in self._fds.values():
            stack.callback(os.close, fd)
        self._stack = stack
        self._services = {
            item["metadata"]["name"]: item["spec"]["clusterIP"]
            for item in lab.items("/api/v1/namespaces/default/services")
        }
        self._node_ip = lab.pod("host")["status"]["podIP"]
        self._pod = lab.pod("here")["status"]["podIP"]
        self._world = netns.socket(self._fds["outside"], socket.AF_INET, socket.SOCK_STREAM)
        stack.callback(self._world.close)
        self._world.bind((WORLD, 0))
        self._world.listen()
        self._kept: dict[str, socket.socket] = {}
        self._far_end: dict[str, socket.socket] = {}
        self._stranger = self._socket("stranger", socket.SOCK_DGRAM)
        self._stranger.setblocking(False)
        self.asked = 0
        self.wrong: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        stack.callback(self.end)

    def end(self) -> None:
        self._ended.set()
        self._thread.join(10)

    def open(self, when: str) -> None:
        """One connection of each kind, to be kept."""
        echo, far, host = (self._services[name] for name in ("echo", "far", "host"))
        for kind, space, target in (
            ("pod to Service", "client", (echo, 80)),
            ("pod to pod", "client", (self._pod, 80)),
            ("pod to a Service of the node itself", "client", (host, 8081)),
            ("node to Service", "node/node1", (far, 80)),
            ("outside to NodePort, elsewhere", "outside", (self._node_ip, 30080)),
            ("outside to NodePort, the node itself", "outside", (self._node_ip, 30081)),
            ("pod to the world", "client", self._world.getsockname()),
        ):
            name = f"{kind} under {when}"
            self._kept[name] = self._socket(space, socket.SOCK_STREAM, target)
            if kind == "pod to the world":
                self._far_end[name] = self._world.accept()[0]
                self._far_end[name].settimeout(3)
                self._stack.callback(self._far_end[name].close)
        name = f"pod to Service by UDP under {when}"
        self._kept[name] = self._socket("client", socket.SOCK_DGRAM, (echo, 53))

    def ask_the_kept_ones(self) -> list[str]:
        """Kinds of connections that do not answer any more."""
        return [f"{name}: {wrong}" for name in self._kept if (wrong := self._ask(name))]

    def _ask(self, name: str) -> str:
        kept = self._kept[name]
        try:
            kept.sendall(REQUEST)
            if name in self._far_end:
                self._far_end[name].sendall(self._far_end[name].recv(4096))
            answer = kept.recv(4096)
        except OSError as error:
            return str(error)
        return "" if answer else "closed"

    def _socket(
        self, space: str, kind: int, target: tuple[str, int] | None = None
    ) -> socket.socket:
        made = netns.socket(self._fds[space], socket.AF_INET, kind)
        self._stack.callback(made.close)
        made.settimeout(3)
        if target:
            made.connect(target)
        return made

    def _run(self) -> None:
        while not self._ended.is_set():
            answer = ask(self._fds["client"], self._services["echo"], 80, timeout_s=10)
            self.asked += 1
            if answer.outcome != "ok":
                self.wrong.append(answer.outcome)
            self._stranger.sendto(b"who", (self._pod, 53))
            with suppress(BlockingIOError):
                self.wrong.append(f"a stranger got {self._stranger.recv(100)!r}")


@pytest.fixture(params=["bridge", "routed"])
def lab(request: pytest.FixtureRequest, make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(datapath="nftables", wiring=request.param)
    lab.apply(manifests.parse(OBJECTS, "objects"))
    lab.wait()
    return lab


@pytest.fixture
def traffic(lab: Lab) -> Iterator[Traffic]:
    with ExitStack() as stack:
        yield Traffic(lab, stack)


def holds(lab: Lab) -> set[str]:
    """Whose rules are in node1's kernel."""
    fd = lab.netns_fd("node/node1")
    try:
        tables = netns.run(fd, ["nft", "list", "tables"]).stdout
        saved = "".join(netns.run(fd, [f"iptables-{f}-save"]).stdout for f in ("nft", "legacy"))
        sets = netns.run(fd, ["ipset", "list", "-n"]).stdout
    finally:
        os.close(fd)
    found = {"nftables"} if "podwire-services" in tables or "podwire-policy" in tables else set()
    if "PODWIRE-" in saved or "podwire-" in sets:
        found.add("iptables")
    links = lab.run("node/node1", ["ls", "/sys/fs/bpf/podwire/node1/links"])
    return found | ({"ebpf"} if "from_node-1-egress" in links.stdout else set())


def test_the_data_path_changes_under_traffic(lab: Lab, traffic: Traffic) -> None:
    """Through all ordered pairs of data paths; connections of each stage live to the end."""
    order = ["iptables", "nftables"]
    if lab.record.settings["wiring"] == "routed" and not features.missing():
        order = ["ebpf", "iptables", "ebpf", "nftables", "iptables", "nftables"]
    wait_for(lambda: holds(lab) == {"nftables"})
    traffic.open("nftables")
    for datapath in order:
        lab.control("stop", process="agent-node1")
        assert (datapath, "before", traffic.ask_the_kept_ones()) == (datapath, "before", [])
        before = traffic.asked
        lab.control("start", process="agent-node1", settings={"datapath": datapath})
        wait_for(lambda datapath=datapath: holds(lab) == {datapath})
        wait_for(lambda: lab.agent("node1", "/v1/status")["healthy"])
        wait_for(lambda before=before: traffic.asked > before + 20)
        assert (datapath, "after", traffic.ask_the_kept_ones()) == (datapath, "after", [])
        traffic.open(datapath)
    assert traffic.ask_the_kept_ones() == []
    traffic.end()
    assert traffic.wrong == []
    assert traffic.asked > 40
