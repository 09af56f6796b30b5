"""Clients outside, a NodePort of one node, a backend on another: the options of eBPF at work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from podwire.datapath.ebpf.programs import missing
from podwire.kernel import netns
from podwire.lab import manifests
from podwire.lab.cluster import Lab
from podwire.lab.connect import Answer, ask
from podwire.lab.topology import OUTSIDE

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this kernel lacks {missing()}")

OBJECTS = """
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: far, labels: {app: echo}}
  spec:
    nodeName: node2
    containers: [{name: c, ports: [{containerPort: 80}, {containerPort: 53, protocol: UDP}]}]
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: only-the-world}
  spec:
    podSelector: {matchLabels: {app: echo}}
    ingress:
    - from: [{ipBlock: {cidr: 203.0.113.0/24}}, {ipBlock: {cidr: "2001:db8:113::/64"}}]
- apiVersion: v1
  kind: Service
  metadata: {name: echo}
  spec:
    type: NodePort
    selector: {app: echo}
    ipFamilyPolicy: RequireDualStack
    ports:
    - {name: http, port: 80, nodePort: 30080}
    - {name: dns, port: 53, protocol: UDP, nodePort: 30053}
"""


@pytest.fixture(scope="module")
def lab(module_lab: Callable[..., Lab]) -> Lab:
    agent = {
        "lb_algorithm": "maglev",
        "maglev_table_size": 251,
        "lb_mode": "dsr",
        "lb_acceleration": "native",
    }
    lab = module_lab(datapath="ebpf", wiring="routed", dual_stack=True, agent=agent)
    lab.apply(manifests.parse(OBJECTS, "objects"))
    lab.wait()
    return lab


@pytest.fixture
def outside(lab: Lab) -> Iterator[int]:
    fd = lab.netns_fd("outside")
    yield fd
    os.close(fd)


def ask_node(lab: Lab, outside: int, family: int, protocol: str) -> Answer:
    address = lab.record.nodes["node1"].addresses[family]
    port = {"TCP": 30080, "UDP": 30053}[protocol]
    return ask(outside, address, port, protocol, timeout_s=5)


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_backend_on_another_node_answers_the_client_itself(
    lab: Lab, outside: int, family: int, protocol: str
) -> None:
    """Its policy, too, sees the client: the node's address would not be let in."""
    for _ in range(4):
        answer = ask_node(lab, outside, family, protocol)
        assert answer.outcome == "ok", answer
        assert answer.seen["pod"] == "far"
        assert OUTSIDE[family] in answer.seen["client"]


def test_the_uplink_runs_xdp_as_told(lab: Lab) -> None:
    fd = lab.netns_fd("node/node1")
    try:
        shown = netns.run(fd, ["ip", "link", "show", "eth0"]).stdout
    finally:
        os.close(fd)
    assert " xdp " in shown  # at the driver: the stack's would be xdpgeneric
    assert lab.agent("node1", "/v1/status")["reasons"] == []
