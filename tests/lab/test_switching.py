"""From one data path to another under traffic: nothing is lost, and nothing is let through."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from podwire.kernel import netns
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
  metadata: {name: there, labels: {app: echo}}
  spec: {<<: *echo, nodeName: node2}
- apiVersion: v1
  kind: Service
  metadata: {name: echo}
  spec: {selector: {app: echo}, ports: [{port: 80}]}
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: some}
  spec:
    podSelector: {matchLabels: {app: echo}}
    ingress: [{from: [{podSelector: {matchLabels: {may: "true"}}}]}]
"""
REQUEST = b"GET / HTTP/1.1\r\nHost: echo\r\n\r\n"


class Traffic:
    """One connection that stays open, new ones all the time, and datagrams that must not pass."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self._fds = {name: lab.netns_fd(name) for name in ("client", "stranger")}
        for fd in self._fds.values():
            stack.callback(os.close, fd)
        service = lab.api("GET", "/api/v1/namespaces/default/services/echo")
        self._service = service["spec"]["clusterIP"]
        self._pod = lab.pod("here")["status"]["podIP"]
        self._kept = netns.socket(self._fds["client"], socket.AF_INET, socket.SOCK_STREAM)
        stack.callback(self._kept.close)
        self._kept.settimeout(5)
        self._kept.connect((self._service, 80))
        self._stranger = netns.socket(self._fds["stranger"], socket.AF_INET, socket.SOCK_DGRAM)
        stack.callback(self._stranger.close)
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

    def ask_the_kept_one(self) -> bytes:
        self._kept.sendall(REQUEST)
        return self._kept.recv(4096)

    def _run(self) -> None:
        while not self._ended.is_set():
            answer = ask(self._fds["client"], self._service, 80)
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
    return found | ({"iptables"} if "PODWIRE-" in saved or "podwire-" in sets else set())


def test_the_data_path_changes_under_traffic(lab: Lab, traffic: Traffic) -> None:
    assert traffic.ask_the_kept_one().startswith(b"HTTP/1.1 200")
    wait_for(lambda: holds(lab) == {"nftables"})
    for datapath in ("iptables", "nftables"):
        lab.control("stop", process="agent-node1")
        assert holds(lab) != set()  # without an agent everything goes on
        before = traffic.asked
        lab.control("start", process="agent-node1", settings={"datapath": datapath})
        wait_for(lambda datapath=datapath: holds(lab) == {datapath})
        wait_for(lambda: lab.agent("node1", "/v1/status")["healthy"])
        wait_for(lambda before=before: traffic.asked > before + 20)
        assert traffic.ask_the_kept_one().startswith(b"HTTP/1.1 200")
    traffic.end()
    assert traffic.wrong == []
    assert traffic.asked > 40
