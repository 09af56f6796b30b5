"""What `podwire services` answers, from objects to JSON."""

from typing import Any

import msgspec
import pytest

from podwire.agent import services_api
from podwire.errors import InvalidObject
from podwire.kube.objects import EndpointSlice, Pod, Service
from podwire.kube.store import Store
from podwire.net import parse_address, parse_prefix
from podwire.services import DetectLocal, NodeFacts, ProxyConfig, ServiceCompiler, ServiceTable

SERVICE = {
    "metadata": {"namespace": "shop", "name": "web"},
    "spec": {
        "type": "NodePort",
        "clusterIP": "10.96.0.10",
        "clusterIPs": ["10.96.0.10"],
        "ports": [{"port": 80, "nodePort": 30080}],
    },
}
SLICE = {
    "metadata": {
        "namespace": "shop",
        "name": "web-1",
        "labels": {"kubernetes.io/service-name": "web"},
    },
    "addressType": "IPv4",
    "endpoints": [{"addresses": ["10.244.1.5"], "nodeName": "n1"}],
    "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
}
POD = {
    "metadata": {"namespace": "shop", "name": "web-0"},
    "spec": {"nodeName": "n1"},
    "status": {"podIP": "10.244.1.5", "podIPs": [{"ip": "10.244.1.5"}]},
}


@pytest.fixture
def world() -> tuple[Store, ServiceTable]:
    store = Store()
    for kind, document in ((Service, SERVICE), (EndpointSlice, SLICE), (Pod, POD)):
        store.put(msgspec.convert(document, kind))
    node = NodeFacts("n1", (parse_address("192.0.2.11"),))
    config = ProxyConfig(DetectLocal((parse_prefix("10.244.1.0/24"),)))
    return store, ServiceCompiler(node, config).update(store.take())


def ask(world: tuple[Store, ServiceTable], src: str, dst: str, port: int) -> dict[str, Any]:
    query = {"src": src, "dst": dst, "port": str(port), "protocol": "tcp"}
    return services_api.resolve(*world, query)


def test_listing_has_a_row_per_frontend(world: tuple[Store, ServiceTable]) -> None:
    rows = services_api.listing(world[1], {})
    assert [(r["kind"], r["frontend"], r["backends"]) for r in rows] == [
        ("ClusterIP", "10.96.0.10:80", 1),
        ("NodePort", "*:30080", 1),
    ]
    assert services_api.listing(world[1], {"namespace": "other"}) == []


def test_a_pod_reaching_itself_is_masqueraded(world: tuple[Store, ServiceTable]) -> None:
    answer = ask(world, "shop/web-0", "shop/web", 80)
    assert answer["verdict"] == "dnat"
    assert answer["backends"] == [
        {"endpoint": "10.244.1.5:8080", "pod": "shop/web-0", "masquerade": True}
    ]


def test_outside_and_node_are_told_apart(world: tuple[Store, ServiceTable]) -> None:
    assert ask(world, "203.0.113.1", "192.0.2.11", 30080)["from"] == "outside"
    assert ask(world, "node", "10.96.0.10", 80)["from"] == "the node itself"
    assert ask(world, "10.244.1.9", "10.96.0.10", 81)["verdict"] == "reject"


def test_the_node_that_decides_is_that_of_the_pod(world: tuple[Store, ServiceTable]) -> None:
    store, _ = world
    other = {
        "metadata": {"namespace": "shop", "name": "there"},
        "spec": {"nodeName": "n2"},
        "status": {"podIP": "10.244.2.5", "podIPs": [{"ip": "10.244.2.5"}]},
    }
    store.put(msgspec.convert(other, Pod))
    for source in ("shop/there", "10.244.2.5"):
        answer = ask(world, source, "shop/web", 80)
        assert (answer["from"], answer["node"], answer["decided_on"]) == ("a pod of n2", "n1", "n2")
    for source, where in (("shop/web-0", "a pod of n1"), ("node", "the node itself")):
        answer = ask(world, source, "shop/web", 80)
        assert (answer["from"], answer["decided_on"]) == (where, "n1")


@pytest.mark.parametrize(
    ("src", "dst"), [("shop/none", "10.96.0.10"), ("node", "shop/none"), ("node", "nonsense")]
)
def test_bad_names_are_one_clear_error(
    world: tuple[Store, ServiceTable], src: str, dst: str
) -> None:
    with pytest.raises(InvalidObject):
        ask(world, src, dst, 80)


def test_show_names_the_service_or_says_there_is_none(world: tuple[Store, ServiceTable]) -> None:
    (port,) = services_api.show(world[1], {"name": "shop/web"})
    assert port["cluster"] == ["10.244.1.5:8080"]
    with pytest.raises(InvalidObject, match="Service shop/none"):
        services_api.show(world[1], {"name": "shop/none"})
