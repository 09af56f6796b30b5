"""Objects in, table out: what the given conformance cases do not say."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.errors import ConfigError
from podwire.kube import objects as kube
from podwire.kube.store import Store
from podwire.net import Protocol, parse_address, parse_prefix
from podwire.services import (
    FrontendKind,
    NodeFacts,
    Packet,
    ProxyConfig,
    ServiceCompiler,
    ServiceTable,
    format_backend,
)
from tests.service_objects import NODE, endpoint_slice, histories, service


def compiled(*objects: kube.Resource, config: ProxyConfig | None = None) -> ServiceTable:
    store = Store()
    for obj in objects:
        store.put(obj)
    return ServiceCompiler(NODE, config or ProxyConfig()).update(store.take())


def ask(table: ServiceTable, to: str, port: int = 80, source: str = "10.20.1.5"):
    return table.resolve(
        Packet(parse_address(source), parse_address(to), Protocol.TCP, port, "eth0")
    )


def test_the_older_service_keeps_a_contested_address_and_the_other_is_named() -> None:
    old = service("old", created="2024-01-01T00:00:00Z")
    new = service("new", created="2025-01-01T00:00:00Z")
    for order in ([old, new], [new, old]):
        table = compiled(*order, endpoint_slice("old"), endpoint_slice("new", ["10.20.1.12"]))
        said = ask(table, "10.96.0.1")
        assert [format_backend(b) for b in said.backends] == ["10.20.1.11:8080"]
        assert "demo/old" in table.problems["Service demo/new claims"]


def test_the_loser_takes_over_when_the_winner_goes() -> None:
    store = Store()
    compiler = ServiceCompiler(NODE, ProxyConfig())
    old, new = service("old", created="1"), service("new", created="2")
    for obj in (old, new, endpoint_slice("old"), endpoint_slice("new", ["10.20.1.12"])):
        store.put(obj)
    compiler.update(store.take())
    store.remove(kube.Service, old.key)
    table = compiler.update(store.take())
    assert [format_backend(b) for b in ask(table, "10.96.0.1").backends] == ["10.20.1.12:8080"]
    assert table.problems == {}


def test_an_external_ip_cannot_take_the_cluster_ip_of_a_younger_service() -> None:
    thief = service("thief", ip="10.96.0.9", created="1", external_ips=["10.96.0.1"])
    table = compiled(thief, service(created="2"), endpoint_slice("thief"), endpoint_slice("web"))
    said = ask(table, "10.96.0.1")
    assert said.service is not None
    assert said.service.name == "web"


@pytest.mark.parametrize(
    ("allowed", "verdict"),
    [(None, "dnat"), ((), "accept"), ((parse_prefix("203.0.113.0/24"),), "dnat")],
)
def test_external_ips_can_be_switched_off_or_limited(allowed, verdict: str) -> None:
    table = compiled(
        service(external_ips=["203.0.113.7"]),
        endpoint_slice(),
        config=ProxyConfig(external_ips=allowed),
    )
    assert ask(table, "203.0.113.7").verdict == verdict
    assert ask(table, "10.96.0.1").verdict == "dnat"
    assert bool(table.problems) == (verdict == "accept")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"ports": [kube.ServicePort(name="http", port=0)]}, "0 is not a port number"),
        ({"ports": [kube.ServicePort(name="http", port=80, protocol="GRE")]}, "GRE"),
        ({"ip": "10.96.0"}, "not an address"),
        ({"ip": "127.0.0.1"}, "not an address to serve on"),
        ({"external_ips": ["nonsense"]}, "externalIP 'nonsense'"),
        ({"ports": [kube.ServicePort(name="http", port=80, node_port=99999)]}, "node port 99999"),
        (
            {
                "session_affinity": "ClientIP",
                "session_affinity_config": kube.SessionAffinityConfig(
                    client_ip=kube.ClientIPConfig(timeout_seconds=0)
                ),
            },
            "session affinity of 0 s",
        ),
    ],
)
def test_what_makes_no_sense_is_named_and_stops_nothing_else(spec, problem: str) -> None:
    good = service("good", ip="10.96.0.2")
    table = compiled(service(**spec), good, endpoint_slice(), endpoint_slice("good"))
    assert problem in table.problems["Service demo/web"]
    assert ask(table, "10.96.0.2").verdict == "dnat"


@pytest.mark.parametrize(
    ("said", "meant", "problem"), [("maglev", "maglev", ""), ("least", "", "neither random nor")]
)
def test_a_service_may_ask_for_an_algorithm(said: str, meant: str, problem: str) -> None:
    asking = service()
    asking.metadata.annotations["service.podwire.io/lb-algorithm"] = said
    table = compiled(asking, endpoint_slice())
    assert [port.algorithm for port in table.ports.values()] == [meant]
    assert problem in table.problems.get("Service demo/web", "")


def test_endpoints_that_no_traffic_may_reach_are_left_out() -> None:
    addresses = ["127.0.0.1", "0.0.0.0", "239.1.1.1", "not-an-address", "10.20.1.11"]
    table = compiled(service(), endpoint_slice(addresses=addresses))
    assert [format_backend(b) for b in ask(table, "10.96.0.1").backends] == ["10.20.1.11:8080"]
    assert "127.0.0.1" in table.problems["EndpointSlice demo/web-1"]


def test_source_ranges_that_cannot_be_read_admit_nobody() -> None:
    table = compiled(
        kube.Service(
            metadata=kube.Metadata(name="web", namespace="demo"),
            spec=kube.ServiceSpec(
                type="LoadBalancer",
                cluster_ip="10.96.0.1",
                ports=[kube.ServicePort(name="http", port=80)],
                load_balancer_source_ranges=["10.0.0.0/99"],
            ),
            status=kube.ServiceStatus(
                load_balancer=kube.LoadBalancerStatus(
                    ingress=[kube.LoadBalancerIngress(ip="192.0.2.1")]
                )
            ),
        ),
        endpoint_slice(),
    )
    assert ask(table, "192.0.2.1").verdict == "drop"
    assert "10.0.0.0/99" in table.problems["Service demo/web"]


def test_of_an_endpoint_in_two_slices_the_one_that_is_not_terminating_counts() -> None:
    leaving = endpoint_slice(name="a", ready=False, serving=True, terminating=True)
    staying = endpoint_slice(name="b", ready=True)
    for order in ([leaving, staying], [staying, leaving]):
        table = compiled(service(), *order)
        (port,) = table.ports.values()
        assert [format_backend(b) for b in port.cluster] == ["10.20.1.11:8080"]


def test_a_change_of_the_nodes_zone_and_address_reaches_the_table() -> None:
    store = Store()
    compiler = ServiceCompiler(NODE, ProxyConfig())
    zone = {"topology.kubernetes.io/zone": "b"}
    store.put(kube.Node(metadata=kube.Metadata(name="node-a", labels=zone)))
    assert compiler.update(store.take()).settings.node.zone == "b"
    moved = NodeFacts("node-a", (parse_address("192.168.50.99"),), "b")
    ports = [kube.ServicePort(name="http", port=80, node_port=30080)]
    store.put(service(type="NodePort", ports=ports))
    store.put(endpoint_slice())
    table = compiler.update(store.take(), moved)
    assert ask(table, "192.168.50.99", 30080).verdict == "dnat"
    assert ask(table, "192.168.50.10", 30080).verdict == "accept"


def test_an_unknown_word_among_nodeport_addresses_is_refused() -> None:
    with pytest.raises(ConfigError, match="everywhere"):
        compiled(config=ProxyConfig(nodeport_addresses=("everywhere",)))


def test_a_service_of_100000_endpoints() -> None:
    addresses = [f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}" for i in range(100_000)]
    slices = [
        endpoint_slice(addresses=addresses[i : i + 1000], name=f"web-{i}")
        for i in range(0, 100_000, 1000)
    ]
    table = compiled(service(), *slices)
    (port,) = table.ports.values()
    assert len(port.cluster) == 100_000


def test_a_table_shares_what_did_not_change_and_a_repeat_changes_nothing() -> None:
    store = Store()
    compiler = ServiceCompiler(NODE, ProxyConfig())
    for number in range(50):
        store.put(service(f"s{number}", ip=f"10.96.0.{number + 1}"))
        store.put(endpoint_slice(f"s{number}"))
    first = compiler.update(store.take())
    store.put(endpoint_slice("s7", ["10.20.1.99"]))
    second = compiler.update(store.take())
    assert [name.name for name in second.delta(first).ports] == ["s7"]
    assert not second.delta(second).ports
    store.put(endpoint_slice("s7", ["10.20.1.99"], ready=True))  # says the same in other words
    assert not compiler.update(store.take()).delta(second).ports


def test_a_nodes_heartbeat_leads_to_the_same_table() -> None:
    store, compiler = Store(), ServiceCompiler(NODE, ProxyConfig())
    store.put(service())
    before = compiler.update(store.take())
    store.put(kube.Node(metadata=kube.Metadata(name="node-a", annotations={"beat": "1"})))
    assert compiler.update(store.take()) is before


# --- law: changes applied one by one lead to the same table as all at once ------------------------


@given(histories(25), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_incremental_and_cold_tables_are_equal(history, order: random.Random) -> None:
    store, compiler = Store(), ServiceCompiler(NODE, ProxyConfig())
    for keep, obj in history:
        if keep:
            store.put(obj)
        else:
            store.remove(type(obj), obj.key)
        if order.random() < 0.7:
            compiler.update(store.take())
    warm = compiler.update(store.take())
    left = [*store.all(kube.Service).values(), *store.all(kube.EndpointSlice).values()]
    order.shuffle(left)
    cold = compiled(*left)
    assert dict(warm.ports) == dict(cold.ports)
    assert warm.problems == cold.problems
    assert {k: v for k, v in warm.without_local.items() if v} == {
        k: v for k, v in cold.without_local.items() if v
    }


def test_kinds_of_frontends() -> None:
    table = compiled(service(external_ips=["203.0.113.7", "203.0.113.7"]), endpoint_slice())
    (port,) = table.ports.values()
    kinds = [frontend.kind for frontend in port.frontends]
    assert kinds == [FrontendKind.CLUSTER_IP, FrontendKind.EXTERNAL_IP]
