"""Where load balancer addresses go, and the plan of nodes. Pure."""

from __future__ import annotations

import msgspec
import pytest

from podwire.errors import ConfigError
from podwire.kube.objects import EndpointSlice, Service
from podwire.lab import topology
from podwire.lab.readiness import is_ready, replicas
from podwire.lab.runtime.balancer import wanted
from podwire.net import parse_address

NODES = {f"n{i}": topology.make_node(f"n{i}", i, dual_stack=True) for i in (1, 2)}


def balanced(policy: str, *addresses: str) -> Service:
    ingress = [{"ip": address} for address in addresses]
    return msgspec.convert(
        {
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"externalTrafficPolicy": policy},
            "status": {"loadBalancer": {"ingress": [*ingress, {"hostname": "a.example"}]}},
        },
        Service,
    )


def endpoints(**ready: bool) -> EndpointSlice:
    return msgspec.convert(
        {
            "metadata": {
                "name": "web-1",
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "web"},
            },
            "endpoints": [
                {"addresses": ["10.0.0.1"], "nodeName": node, "conditions": {"ready": is_ready}}
                for node, is_ready in ready.items()
            ],
        },
        EndpointSlice,
    )


def via(*texts: str) -> tuple[bytes, ...]:
    return tuple(map(parse_address, texts))


def test_an_address_goes_to_every_node_by_its_own_family() -> None:
    table = wanted([balanced("Cluster", "198.51.100.1", "2001:db8:51::1")], [], NODES)
    assert table == {
        parse_address("198.51.100.1"): via("172.18.0.11", "172.18.0.12"),
        parse_address("2001:db8:51::1"): via("fd00:18::b", "fd00:18::c"),
    }


def test_with_the_local_policy_only_nodes_with_ready_endpoints_get_traffic() -> None:
    service = balanced("Local", "198.51.100.1")
    table = wanted([service], [endpoints(n1=False, n2=True)], NODES)
    assert table == {parse_address("198.51.100.1"): via("172.18.0.12")}
    assert wanted([service], [endpoints(n1=False)], NODES) == {}


def test_nodes_get_pod_ranges_that_do_not_meet() -> None:
    assert NODES["n1"].pod_cidrs == ("10.244.0.0/22", "fd00:10:244:1::/64")
    assert NODES["n2"].pod_cidrs == ("10.244.4.0/22", "fd00:10:244:2::/64")
    assert topology.make_node("n1", 1, False, host=99).addresses == ("172.18.0.99",)
    with pytest.raises(ConfigError, match="at most 64 nodes"):
        topology.make_node("n65", 65, False)


def test_readiness_counts_the_workload_that_owns_the_others() -> None:
    deployment = {"metadata": {}, "spec": {"replicas": 3}, "status": {"readyReplicas": 2}}
    assert replicas("Deployment", deployment) == (3, 2)
    assert replicas("StatefulSet", {"metadata": {}, "spec": {}}) == (1, 0)
    owned = {"metadata": {"ownerReferences": [{"controller": True}]}, "spec": {"replicas": 3}}
    assert replicas("ReplicaSet", owned) == (0, 0)
    daemons = {"metadata": {}, "spec": {}, "status": {"desiredNumberScheduled": 2}}
    assert replicas("DaemonSet", daemons) == (2, 0)
    assert is_ready({"status": {"phase": "Succeeded"}})
    assert not is_ready({"status": {"conditions": [{"type": "Ready", "status": "False"}]}})
