"""The overlay on eBPF in a whole lab: policies across nodes, and nodes on different data paths."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from podwire.cli import main
from podwire.datapath.ebpf.programs import missing
from podwire.kernel import netns
from podwire.lab import manifests
from podwire.lab.cluster import Lab
from podwire.lab.connect import ask
from tests.lab.conftest import wait_for

pytestmark = pytest.mark.skipif(bool(missing()), reason="no eBPF data path here")

OBJECTS = """
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: client, labels: {may: "true"}}
  spec: &client {nodeName: node1, containers: [{name: c}]}
- {apiVersion: v1, kind: Pod, metadata: {name: stranger}, spec: *client}
- apiVersion: v1
  kind: Pod
  metadata: {name: there, labels: {app: echo}}
  spec:
    nodeName: node2
    containers: [{name: c, ports: [{containerPort: 80}, {containerPort: 53, protocol: UDP}]}]
- apiVersion: v1
  kind: Service
  metadata: {name: echo}
  spec:
    type: NodePort
    ipFamilyPolicy: PreferDualStack
    selector: {app: echo}
    ports: [{port: 80, nodePort: 30080}]
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: some}
  spec:
    podSelector: {matchLabels: {app: echo}}
    ingress: [{from: [{podSelector: {matchLabels: {may: "true"}}}]}]
"""
# Who comes through a NodePort bears the address that the node has inside the tunnel.
NODES = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nodes}
spec:
  podSelector: {matchLabels: {app: echo}}
  ingress: [{from: [{ipBlock: {cidr: %s/32}}, {ipBlock: {cidr: "%s/128"}}]}]
"""
REQUEST = b"GET / HTTP/1.1\r\nHost: echo\r\n\r\n"


@pytest.fixture(scope="module")
def lab(module_lab: Callable[..., Lab]) -> Lab:
    lab = module_lab(datapath="ebpf", wiring="routed", routing="vxlan", dual_stack=True)
    lab.apply(manifests.parse(OBJECTS, "objects"))
    lab.wait()
    return lab


def addresses(lab: Lab) -> list[str]:
    """Of the server and of its Service, both families."""
    pod = lab.pod("there")["status"]["podIPs"]
    service = lab.api("GET", "/api/v1/namespaces/default/services/echo")["spec"]["clusterIPs"]
    return [*(entry["ip"] for entry in pod), *service]


def outcome(lab: Lab, source: str, address: str, port: int = 80, timeout_s: float = 5) -> str:
    fd = lab.netns_fd(source)
    try:
        return ask(fd, address, port, timeout_s=timeout_s).outcome
    finally:
        os.close(fd)


def assert_policies_hold(lab: Lab) -> None:
    for address in addresses(lab):
        assert outcome(lab, "client", address) == "ok", address
        assert outcome(lab, "stranger", address, timeout_s=0.3) == "timeout", address


def why(lab: Lab, source: str) -> set[str]:
    """The verdicts that node2 would give, for both families."""
    out = io.StringIO()
    ends = [f"default/{source}", "default/there:80"]
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main.main(["policy", "why", *ends, "--lab", lab.name, "--node", "node2", "--json"])
    return {answer["verdict"] for answer in json.loads(out.getvalue())}


def switch(lab: Lab, node: str, datapath: str) -> None:
    """Restart the node's agent on another data path, and wait until only that one is left."""
    lab.control("stop", process=f"agent-{node}")
    lab.control("start", process=f"agent-{node}", settings={"datapath": datapath})
    wait_for(lambda: serves(lab, node) == {datapath})
    wait_for(lambda: lab.agent(node, "/v1/status")["healthy"])


def serves(lab: Lab, node: str) -> set[str]:
    """Whose programs and rules are in the node's kernel."""
    tables = lab.run(f"node/{node}", "nft list tables").stdout
    pinned = lab.run(f"node/{node}", f"ls /sys/fs/bpf/podwire/{node}/links").stdout
    found = {"nftables"} if "podwire-policy" in tables else set()
    return found | ({"ebpf"} if "from_overlay" in pinned else set())


class Traffic:
    """A connection that stays open, new ones all the time, and datagrams that must not pass."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self._client = lab.netns_fd("client")
        stack.callback(os.close, self._client)
        self._pod = lab.pod("there")["status"]["podIP"]
        self._kept = netns.socket(self._client, socket.AF_INET, socket.SOCK_STREAM)
        stack.callback(self._kept.close)
        self._kept.settimeout(10)
        self._kept.connect((self._pod, 80))
        stranger = lab.netns_fd("stranger")
        stack.callback(os.close, stranger)
        self._stranger = netns.socket(stranger, socket.AF_INET, socket.SOCK_DGRAM)
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
        self._thread.join(20)

    def ask_the_kept_one(self) -> bytes:
        self._kept.sendall(REQUEST)
        return self._kept.recv(4096)

    def _run(self) -> None:
        while not self._ended.is_set():
            answer = ask(self._client, self._pod, 80, timeout_s=10)
            self.asked += 1
            if answer.outcome != "ok":
                self.wrong.append(answer.outcome)
            self._stranger.sendto(b"who", (self._pod, 53))
            with suppress(BlockingIOError):
                self.wrong.append(f"the stranger got {self._stranger.recv(100)!r}")


@pytest.fixture
def traffic(lab: Lab) -> Iterator[Traffic]:
    with ExitStack() as stack:
        yield Traffic(lab, stack)


def test_policies_and_services_across_nodes(lab: Lab) -> None:
    assert serves(lab, "node1") == serves(lab, "node2") == {"ebpf"}
    assert_policies_hold(lab)
    assert (why(lab, "client"), why(lab, "stranger")) == ({"allow"}, {"deny"})


def test_a_node_port_leads_to_the_other_node_and_back(lab: Lab) -> None:
    cidrs = lab.api("GET", "/api/v1/nodes/node1")["spec"]["podCIDRs"]
    nodes = manifests.parse(NODES % tuple(cidr.partition("/")[0] for cidr in cidrs), "nodes")
    lab.apply(nodes)
    for address in lab.record.nodes["node1"].addresses:
        wait_for(lambda address=address: outcome(lab, "outside", address, 30080) == "ok", 10)
    lab.delete(nodes)


def test_nodes_on_different_data_paths_understand_each_other(lab: Lab, traffic: Traffic) -> None:
    """Node by node to nftables and back, under traffic: nothing is lost or let through."""
    for node, datapath in (
        ("node2", "nftables"),
        ("node1", "nftables"),
        ("node2", "ebpf"),
        ("node1", "ebpf"),
    ):
        before = traffic.asked
        switch(lab, node, datapath)
        assert_policies_hold(lab)
        wait_for(lambda before=before: traffic.asked > before + 20)
        assert traffic.ask_the_kept_one().startswith(b"HTTP/1.1 200")
    traffic.end()
    assert traffic.wrong == []
