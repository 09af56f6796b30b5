"""Routing between nodes: direct and VXLAN, dual stack, and nodes that come, go and move."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from podwire.lab import connect, manifests
from podwire.lab.cluster import Lab

DAEMONS = """
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: d}
spec:
  selector: {matchLabels: {app: d}}
  template:
    metadata: {labels: {app: d}}
    spec:
      containers:
      - {name: c, ports: [{containerPort: 80}, {containerPort: 53, protocol: UDP}]}
"""


def daemons(lab: Lab) -> dict[str, dict[str, object]]:
    """The DaemonSet's running pods by node."""
    pods = lab.items("/api/v1/namespaces/default/pods")
    return {p["spec"]["nodeName"]: p for p in pods if p["status"].get("phase") == "Running"}


def outcome(lab: Lab, source: str, address: str, protocol: str = "TCP") -> str:
    """What comes of one request; "ok" only if the pod's own address arrived, unmasqueraded."""
    fd = lab.netns_fd(source)
    try:
        answer = connect.ask(fd, address, 53 if protocol == "UDP" else 80, protocol)
    finally:
        os.close(fd)
    if answer.outcome == "ok" and source.startswith("d-"):
        own = [entry["ip"] for entry in lab.pod(source)["status"]["podIPs"]]
        client = answer.seen["client"].rpartition(":")[0].strip("[]")
        return "ok" if client in own else f"masqueraded as {client}"
    return answer.outcome


def assert_all_reach_all(lab: Lab) -> None:
    pods = daemons(lab)
    assert set(pods) == set(lab.record.nodes)
    deadline = time.monotonic() + 60
    for source in pods.values():
        for target in pods.values():
            for entry in target["status"]["podIPs"]:  # pyright: ignore
                for protocol in ("TCP", "UDP"):
                    where = source["metadata"]["name"]  # pyright: ignore
                    while (seen := outcome(lab, where, entry["ip"], protocol)) != "ok":
                        assert time.monotonic() < deadline, (where, entry["ip"], protocol, seen)


@pytest.mark.parametrize("routing", ["direct", "vxlan"])
def test_pods_of_all_nodes_reach_each_other(make_lab: Callable[..., Lab], routing: str) -> None:
    lab = make_lab(dual_stack=True, routing=routing)
    lab.apply(manifests.parse(DAEMONS, "daemons"))
    lab.wait()
    assert_all_reach_all(lab)
    links = lab.run("node/node1", "ip -o link").stdout
    assert ("vxlan" in links) == (routing == "vxlan")


@pytest.mark.parametrize("routing", ["direct", "vxlan"])
def test_nodes_come_go_and_change_their_address(make_lab: Callable[..., Lab], routing: str) -> None:
    lab = make_lab(routing=routing)
    lab.apply(manifests.parse(DAEMONS, "daemons"))
    lab.wait()
    lab.control("add-node", node="node3")
    lab.wait()
    assert_all_reach_all(lab)
    lab.control("readdress-node", node="node3", host=99)
    lab.wait()
    assert lab.record.nodes["node3"].addresses == ("172.18.0.99",)
    assert_all_reach_all(lab)
    lab.control("remove-node", node="node2")
    lab.wait()
    assert_all_reach_all(lab)
    routes = lab.run("node/node1", "ip route").stdout
    assert "10.244.4.0/22" not in routes  # node2's
