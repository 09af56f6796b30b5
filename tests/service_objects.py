"""Services and EndpointSlices for tests, by hand and at random."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from hypothesis import strategies as st

from podwire.datapath import Part
from podwire.kube import objects as kube
from podwire.kube.store import Store
from podwire.net import parse_address, parse_prefix
from podwire.services import (
    DetectLocal,
    Family,
    NodeFacts,
    NodePortScope,
    ProxyConfig,
    ServiceCompiler,
    ServicePort,
    ServiceTable,
    Settings,
)
from podwire.services.shared_map import SharedMap

CONFIG = ProxyConfig(
    detect_local=DetectLocal(prefixes=(parse_prefix("10.20.0.0/16"), parse_prefix("fd00:20::/32"))),
    service_cidrs=(parse_prefix("10.96.0.0/16"), parse_prefix("fd00:96::/112")),
)
NODE = NodeFacts("node-a", (parse_address("192.168.50.10"), parse_address("2001:db8:50::10")))


def service_table(
    ports: Iterable[ServicePort],
    node: NodeFacts,
    config: ProxyConfig = CONFIG,
    scopes: Mapping[Family, NodePortScope] | None = None,
) -> ServiceTable:
    """A table of these ports; node ports are at every address of the node, unless told."""
    scopes = scopes or {4: NodePortScope(), 6: NodePortScope()}
    settings = Settings(node, config, config.service_cidrs, scopes)
    return ServiceTable(settings, SharedMap().changed((port.name, port) for port in ports))


def service(name: str = "web", *, ip: str = "10.96.0.1", created: str = "", **spec: object):
    ports = spec.pop("ports", [kube.ServicePort(name="http", port=80)])
    return kube.Service(
        metadata=kube.Metadata(name=name, namespace="demo", creation_timestamp=created),
        spec=kube.ServiceSpec(cluster_ip=ip, cluster_ips=[ip], ports=ports, **spec),  # type: ignore[arg-type]
    )


def endpoint_slice(
    of: str = "web", addresses: Iterable[str] = ("10.20.1.11",), name: str = "", **conditions: bool
):
    return kube.EndpointSlice(
        metadata=kube.Metadata(
            name=name or f"{of}-1", namespace="demo", labels={"kubernetes.io/service-name": of}
        ),
        endpoints=[
            kube.Endpoint(addresses=[a], conditions=kube.EndpointConditions(**conditions))
            for a in addresses
        ],
        ports=[kube.EndpointPort(name="http", protocol="TCP", port=8080)],
    )


class Cluster:
    """Objects that come and go, compiled for a data path."""

    def __init__(self, part: Part[ServiceTable], config: ProxyConfig) -> None:
        self.part = part
        self.store = Store()
        self.compiler = ServiceCompiler(NODE, config)

    def put(self, *objects: kube.Resource) -> ServiceTable:
        """Take the objects in, and apply the table."""
        for obj in objects:
            self.store.put(obj)
        table = self.compiler.update(self.store.take())
        self.part.apply(table)
        return table

    def play(self, history: History) -> list[kube.Resource]:
        """One step after the other, each applied; what is left in the end."""
        for keep, obj in history:
            if keep:
                self.store.put(obj)
            else:
                self.store.remove(type(obj), obj.key)
            self.put()
        self.part.flush()
        kinds = (kube.Service, kube.EndpointSlice)
        return [obj for kind in kinds for obj in self.store.all(kind).values()]


History = list[tuple[bool, kube.Resource]]
"""Objects to be put (True) or removed, in order."""

_AFFINITY = kube.SessionAffinityConfig(client_ip=kube.ClientIPConfig(timeout_seconds=600))
_RANGES = ["10.20.1.0/25", "198.51.100.0/24", "0.0.0.0/0", "2001:db8:7::/48", "192.168.50.0/24"]
_ENDPOINTS = {
    "IPv4": ["10.20.1.11", "10.20.1.12", "10.20.2.21", "10.20.3.31", "192.168.50.10", "bad"],
    "IPv6": ["fd00:20:1::11", "fd00:20:1::12", "fd00:20:2::21"],
}


def histories(length: int) -> st.SearchStrategy[History]:
    """A seed decides: chosen piece by piece, Services that have endpoints would be rare."""
    return st.integers(0, 1 << 32).map(lambda seed: history(random.Random(seed), length))


def history(rng: random.Random, length: int) -> History:
    make = (random_service, random_slice, random_slice)
    return [(rng.random() < 0.85, rng.choice(make)(rng)) for _ in range(rng.randint(1, length))]


def random_service(rng: random.Random) -> kube.Service:
    """Of every policy, dual-stack or not; few enough addresses to be contested."""
    name = rng.choice("abcd")
    number = "abcd".index(name) + 1
    ips = [f"10.96.0.{number}", f"fd00:96::{number}"]
    affinity = rng.random() < 0.3
    return kube.Service(
        metadata=kube.Metadata(name=name, namespace="demo", creation_timestamp=rng.choice("12")),
        spec=kube.ServiceSpec(
            type="LoadBalancer",
            cluster_ip=ips[0],
            cluster_ips=rng.choice([*[ips] * 6, ips[:1], ["None"], ["10.96.0.1"]]),
            ports=[
                kube.ServicePort(name="http", port=80, node_port=rng.choice([0, 30001, 30002])),
                kube.ServicePort(name="dns", port=53, protocol="UDP"),
            ],
            external_ips=_some(rng, ["203.0.113.1", "203.0.113.2", "fd00:e::1", "10.96.0.1"]),
            load_balancer_source_ranges=_some(rng, _RANGES),
            session_affinity="ClientIP" if affinity else "None",
            session_affinity_config=_AFFINITY if affinity else None,
            internal_traffic_policy=rng.choice(["Cluster", "Cluster", "Local"]),
            external_traffic_policy=rng.choice(["Cluster", "Local"]),
        ),
        status=kube.ServiceStatus(
            load_balancer=kube.LoadBalancerStatus(
                ingress=[
                    kube.LoadBalancerIngress(ip=ip)
                    for ip in _some(rng, ["192.0.2.1", "192.0.2.2", "fd00:1b::1"])
                ]
            )
        ),
    )


def random_slice(rng: random.Random) -> kube.EndpointSlice:
    family = rng.choice(["IPv4", "IPv6"])
    of = rng.choice("abcd")
    ready, serving = rng.random() < 0.8, rng.random() < 0.7
    return kube.EndpointSlice(
        metadata=kube.Metadata(
            name=rng.choice("xy") + of + family[-1],
            namespace="demo",
            labels={"kubernetes.io/service-name": of},
        ),
        address_type=family,
        endpoints=[
            kube.Endpoint(
                addresses=[address],
                conditions=kube.EndpointConditions(
                    ready=ready, serving=serving, terminating=not ready
                ),
                node_name="node-a" if address.startswith(_HERE) else "node-b",
            )
            for address in _some(rng, _ENDPOINTS[family], 4)
        ],
        ports=[
            kube.EndpointPort(name="http", protocol="TCP", port=8080),
            kube.EndpointPort(name="dns", protocol="UDP", port=rng.choice([53, 5353])),
        ],
    )


_HERE = ("10.20.1.", "fd00:20:1:", "192.168.50.10")


def _some(rng: random.Random, values: Sequence[str], most: int = 2) -> list[str]:
    return rng.sample(values, rng.randint(0, most if most < len(values) else len(values)))
