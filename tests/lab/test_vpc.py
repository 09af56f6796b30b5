"""VPC mode with real packets: three nodes in the lab's cloud, pods over several ENIs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from podwire.errors import PodwireError
from podwire.lab import connect, manifests, teardown
from podwire.lab.cluster import Lab, ask_unix
from podwire.lab.state import LabDir
from podwire.net import parse_address, parse_prefix
from tests.lab.conftest import wait_for

PODS = """
apiVersion: v1
kind: List
items:
- apiVersion: apps/v1
  kind: Deployment
  metadata: {{name: web}}
  spec:
    replicas: {replicas}
    selector: {{matchLabels: {{app: web}}}}
    template:
      metadata: {{labels: {{app: web}}}}
      spec: {{containers: [{{name: c, ports: [{{containerPort: 80}}]}}]}}
- apiVersion: v1
  kind: Service
  metadata: {{name: web}}
  spec:
    type: NodePort
    ipFamilies: [{family}]
    selector: {{app: web}}
    ports: [{{port: 80, nodePort: 30080}}]
- apiVersion: v1
  kind: Service
  metadata: {{name: local}}
  spec:
    type: NodePort
    ipFamilies: [{family}]
    externalTrafficPolicy: Local
    selector: {{app: web}}
    ports: [{{port: 80, nodePort: 30081}}]
"""
NODES = {f"node{i}": f"10.0.0.{10 + i}" for i in (1, 2, 3)}
WORLD = "203.0.113.10"


def up(name: str, replicas: int, **options: Any) -> Lab:
    lab = Lab.up(name, wiring="vpc", **options)
    lab.wait()
    family = "IPv6" if options.get("dual_stack") else "IPv4"
    lab.apply(manifests.parse(PODS.format(replicas=replicas, family=family), "pods"))
    lab.wait()
    return lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three small instances, with four to eight pods each: no ENI holds more than three."""
    name = f"pwt-{os.getpid()}-vpc"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WARM_IP_TARGET", "2")
        environment.setenv("IP_COOLDOWN_PERIOD", "1")
        try:
            yield up(name, 18, nodes=3, instance_type="t3.small")
        finally:
            teardown.down(LabDir(name))


def pods_of(lab: Lab) -> dict[str, dict[str, Any]]:
    """Web pods by name: address, node, ENI, device, table."""
    found: dict[str, dict[str, Any]] = {}
    for node in NODES:
        for row in lab.agent(node, "/v1/vpc/pods"):
            if row["pod"].startswith("web-"):
                found[row["pod"]] = {**row, "node": node}
    return found


def listed(lab: Lab) -> list[str]:
    """Pods of which the API knows, also those that are going."""
    return [pod["metadata"]["name"] for pod in lab.items("/api/v1/namespaces/default/pods")]


def seen(lab: Lab, source: str, address: str, port: int = 80) -> dict[str, Any]:
    """What the echo server at `address` says of a request from `source`."""
    fd = lab.netns_fd(source)
    try:
        answer = connect.ask(fd, address, port)
        return answer.seen or {}
    finally:
        os.close(fd)


def client(answer: dict[str, Any]) -> str:
    return str(answer.get("client", "")).rpartition(":")[0].strip("[]")


def test_pods_have_addresses_of_the_vpc_on_several_enis(lab: Lab) -> None:
    pods = pods_of(lab)
    assert len(pods) == 18
    subnet = parse_prefix("10.0.0.0/20")
    assert all(parse_address(pod["address"]) in subnet for pod in pods.values())
    assert {pod["device"] for pod in pods.values()} >= {0, 1}
    shown = {name: lab.pod(name)["status"]["podIP"] for name in pods}
    assert shown == {name: pod["address"] for name, pod in pods.items()}


def test_every_pod_reaches_pods_on_its_eni_across_enis_and_across_nodes(lab: Lab) -> None:
    pods = pods_of(lab)
    kinds: set[str] = set()
    for name, source in pods.items():
        for other, target in pods.items():
            if name == other:
                continue
            kind = "other node"
            if source["node"] == target["node"]:
                kind = "same ENI" if source["eni"] == target["eni"] else "other ENI"
            if (kind, source["device"], target["device"]) in kinds:
                continue
            kinds.add((kind, source["device"], target["device"]))
            answer = seen(lab, name, target["address"])
            assert (answer.get("pod"), client(answer)) == (other, source["address"]), kind
    assert {kind for kind, *_ in kinds} == {"same ENI", "other ENI", "other node"}


def test_pods_are_seen_outside_as_their_nodes_primary_address(lab: Lab) -> None:
    for name, pod in pods_of(lab).items():
        assert client(seen(lab, name, WORLD)) == NODES[pod["node"]]


def test_the_gateway_and_the_source_check_let_nothing_else_out(lab: Lab) -> None:
    """So that the test above shows what it says: without SNAT nothing comes back."""
    name, pod = next((n, p) for n, p in pods_of(lab).items() if p["device"])
    lab.run(f"node/{pod['node']}", "nft delete table ip podwire-vpc")
    assert seen(lab, name, WORLD) == {}


def test_wiped_rules_and_routes_come_back(lab: Lab) -> None:
    node = "node1"
    lab.run(f"node/{node}", "ip rule del prio 32765; ip route flush table 2; ip rule del prio 1536")
    pods = [name for name, pod in pods_of(lab).items() if pod["node"] == node]
    wait_for(lambda: all(client(seen(lab, name, NODES["node2"], 30080)) for name in pods))
    rules = lab.run(f"node/{node}", "ip rule").stdout
    assert "32765:" in rules
    for at in NODES:  # the wiped table of the test before
        wait_for(lambda at=at: "snat to" in lab.run(f"node/{at}", "nft list ruleset").stdout, 60)


def test_node_ports_lead_to_pods_on_every_eni(lab: Lab) -> None:
    pods = pods_of(lab)
    devices: set[int] = set()
    for node, address in NODES.items():
        for _ in range(30):
            answer = seen(lab, "outside", address, 30081)
            pod = pods[answer["pod"]]
            assert pod["node"] == node
            assert client(answer) == WORLD  # externalTrafficPolicy Local: the client's own address
            devices.add(pod["device"])
            assert seen(lab, "outside", address, 30080)["pod"] in pods
    assert devices >= {0, 1}


def test_services_from_pods_and_nodes(lab: Lab) -> None:
    service = lab.api("GET", "/api/v1/namespaces/default/services/web")["spec"]["clusterIP"]
    pods = pods_of(lab)
    for name, pod in pods.items():
        answer = seen(lab, name, service)
        assert answer["pod"] in pods
        if answer["pod"] != name:
            assert client(answer) == pod["address"]
    for node in NODES:
        assert seen(lab, f"node/{node}", service)["pod"] in pods


def test_listings_in_the_pod_are_those_of_eks(lab: Lab) -> None:
    name, pod = next((n, p) for n, p in pods_of(lab).items() if p["device"] == 1)
    address = pod["address"]
    shown = lab.run(name, "ip -4 addr show eth0; ip link show eth0").stdout
    assert f"inet {address}/32 scope global eth0" in shown
    assert "mtu 9001" in shown
    routes = lab.run(name, "ip route").stdout.split("\n")
    assert [line.strip() for line in routes if line] == [
        "default via 169.254.1.1 dev eth0",
        "169.254.1.1 dev eth0 scope link",
    ]
    (neighbour,) = lab.run(name, "ip neigh").stdout.strip().split("\n")
    assert re.match(r"169\.254\.1\.1 dev eth0 lladdr [0-9a-f:]{17} PERMANENT", neighbour)
    rules = lab.run(f"node/{pod['node']}", "ip rule").stdout
    assert re.search(rf"^512:\s+from all to {re.escape(address)} lookup main", rules, re.M)
    assert re.search(r"^1024:\s+from all fwmark 0x80/0x80 lookup main", rules, re.M)
    assert re.search(rf"^1536:\s+from {re.escape(address)} lookup 2", rules, re.M)
    links = lab.run(f"node/{pod['node']}", f"ip route get {address}").stdout
    assert re.search(r"dev eni[0-9a-f]{11}\b", links)


def test_people_can_look(lab: Lab) -> None:
    answer = json.loads(lab.run("node/node1", ["curl", "-s", "127.0.0.1:61679/v1/enis"]).stdout)
    cli = subprocess.run(
        [sys.executable, "-m", "podwire", "vpc", "enis", "--lab", lab.name, "--node", "node1"],
        capture_output=True, text=True, timeout=30, check=True,
    ).stdout  # fmt: skip
    assert len(answer["ENIs"]) >= 2
    assert all(id in cli for id in answer["ENIs"])
    metrics = lab.run("node/node1", ["curl", "-s", "127.0.0.1:61679/metrics"]).stdout
    assert f"awscni_assigned_ip_addresses {float(answer['AssignedIPs'])}" in metrics
    assert f"awscni_eni_allocated {float(len(answer['ENIs']))}" in metrics


def test_a_full_node_says_so_with_error_11(lab: Lab) -> None:
    """t3.small: three ENIs with three addresses for pods; the scheduler does not know."""
    lab.apply(
        manifests.parse(
            "\n---\n".join(
                f"{{apiVersion: v1, kind: Pod, metadata: {{name: more-{i}}},"
                f" spec: {{nodeName: node3, containers: [{{name: c}}]}}}}"
                for i in range(9)
            ),
            "more",
        )
    )

    def refused() -> bool:
        text = (lab.dir.log("agent-node3")).read_text()
        return "3 of 3 ENIs are attached" in text

    wait_for(refused)
    for i in range(9):
        lab.api("DELETE", f"/api/v1/namespaces/default/pods/more-{i}")
    wait_for(lambda: not [name for name in listed(lab) if name.startswith("more-")])


def test_an_agent_that_is_killed_keeps_pods_and_addresses(lab: Lab) -> None:
    before = pods_of(lab)
    lab.control("stop", process="agent-node2", signal=9)
    name, pod = next((n, p) for n, p in before.items() if p["node"] == "node2")
    assert client(seen(lab, name, WORLD)) == NODES["node2"]
    lab.control("start", process="agent-node2")

    def same() -> bool:
        try:
            return pods_of(lab) == before
        except PodwireError:  # the agent is not there yet
            return False

    wait_for(same)
    assert seen(lab, "outside", pod["address"]) == {}


def misbehave(lab: Lab, path: str, **faults: Any) -> None:
    command = ["curl", "-sf", "--unix-socket", str(lab.dir.path / "cloud.sock"), f"http://x{path}"]
    subprocess.run([*command, "-d", json.dumps(faults)], check=True, timeout=10)


@pytest.mark.timeout(400)
def test_pods_come_although_ec2_throttles_fails_and_is_slow(lab: Lab) -> None:
    path = "/apis/apps/v1/namespaces/default/deployments/web"
    misbehave(lab, "/faults", bucket={"rate": 3, "burst": 2}, attach_delay_s=1.0)
    misbehave(lab, "/faults", operations="Assign*", lose_answer=True, times=2)
    misbehave(lab, "/faults", operations="*", code="InternalError", probability=0.2)
    try:
        for replicas in (4, 22):
            patch = {"spec": {"replicas": replicas}}
            lab.api("PATCH", path, patch, "application/merge-patch+json")
            # A pod that is going has no address any more, but counts where the scheduler looks
            # for the node with fewest: ten new ones on one node would be one too many for ever.
            wait_for(lambda n=replicas: len(pods_of(lab)) == len(listed(lab)) == n, 180)
        lab.wait()
    finally:
        misbehave(lab, "/faults/clear")
    pods = pods_of(lab)
    assert len({pod["address"] for pod in pods.values()}) == 22
    for name, pod in pods.items():
        assert client(seen(lab, name, WORLD)) == NODES[pod["node"]]


def test_no_eni_is_left_when_pods_go(lab: Lab) -> None:
    patch = {"spec": {"replicas": 0}}
    path = "/apis/apps/v1/namespaces/default/deployments/web"
    lab.api("PATCH", path, patch, "application/merge-patch+json")
    wait_for(lambda: not pods_of(lab))
    enis = ask_unix(lab.dir.path / "cloud.sock", "/enis")["NetworkInterfaces"]
    books = {id for node in NODES for id in lab.agent(node, "/v1/vpc/enis")["ENIs"]}
    assert {eni["NetworkInterfaceId"] for eni in enis} == books


def test_ipv6_only_pods() -> None:
    name = f"pwt-{os.getpid()}-vpc6"
    try:
        lab = up(name, 6, nodes=2, dual_stack=True)
        prefix = parse_prefix("fd00:10::/64")
        pods = lab.items("/api/v1/namespaces/default/pods")
        shown = {pod["metadata"]["name"]: pod["status"]["podIPs"] for pod in pods}
        assert all(len(ips) == 1 for ips in shown.values())
        addresses = {pod: ips[0]["ip"] for pod, ips in shown.items()}
        assert all(parse_address(address) in prefix for address in addresses.values())
        for source, own in addresses.items():
            for target, address in addresses.items():
                if source != target:
                    answer = seen(lab, source, address)
                    assert (answer.get("pod"), client(answer)) == (target, own)
            assert client(seen(lab, source, "2001:db8:113::10")) == own  # good everywhere: no SNAT
        service = lab.api("GET", "/api/v1/namespaces/default/services/web")["spec"]["clusterIP"]
        source = next(iter(addresses))
        assert seen(lab, source, service)["pod"] in addresses
        assert seen(lab, "outside", addresses[source])["pod"] == source
        assert "fe80::1" in lab.run(source, "ip -6 route").stdout
    finally:
        teardown.down(LabDir(name))
