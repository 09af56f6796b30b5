"""One real request per kind of traffic, and what each side saw of it."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from podwire.kernel import netns
from podwire.lab import connect, topology
from podwire.lab.connect import Answer
from podwire.lab.dns.message import name_of, pack_name

if TYPE_CHECKING:
    from podwire.lab.cluster import Lab

Json: TypeAlias = dict[str, Any]

NAMESPACE = "shop"
TRIES = 12  # of a balanced Service: enough to see more than one backend, almost always


@dataclass(frozen=True)
class Proof:
    """One line: what was asked, who answered, which source it saw, whether that is right."""

    title: str
    asked: str
    answered: str
    source: str
    holds: bool
    latency_s: float = 0.0


class Shop:
    """The lab with the demo's manifest, as the proofs see it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.pods = lab.items(f"/api/v1/namespaces/{NAMESPACE}/pods")
        self._services = {
            s["metadata"]["name"]: s for s in lab.items(f"/api/v1/namespaces/{NAMESPACE}/services")
        }
        self._names: dict[str, str] = dict.fromkeys(topology.OUTSIDE, "outside")
        for node in lab.record.nodes.values():
            self._names |= dict.fromkeys(node.addresses, node.name)
        for pod in self.pods:
            if not pod["spec"].get("hostNetwork"):
                addresses = (entry["ip"] for entry in pod["status"].get("podIPs", ()))
                self._names |= dict.fromkeys(addresses, pod["metadata"]["name"])

    def of(self, app: str, node: str = "") -> list[Json]:
        """The pods of an application, those on a node first."""
        found = [p for p in self.pods if p["metadata"]["labels"].get("app") == app]
        return sorted(found, key=lambda pod: pod["spec"]["nodeName"] != node)

    def service(self, name: str, family: int = 0) -> str:
        """A Service's cluster address."""
        return self._services[name]["spec"]["clusterIPs"][family]

    def balancer(self, name: str) -> str:
        """A Service's load balancer address."""
        return self._services[name]["status"]["loadBalancer"]["ingress"][0]["ip"]

    def who(self, client: object) -> str:
        """The name behind an address and port that an echo server saw."""
        address = str(client).rpartition(":")[0].strip("[]")
        known = self._names.get(address)
        if known is None:
            known = self._gateway_of(address)
        return known or address

    def _gateway_of(self, address: str) -> str:
        """A node, when the address is its own within its pod range (the bridge's)."""
        from ipaddress import ip_address, ip_network

        for node in self.lab.record.nodes.values():
            for cidr in node.pod_cidrs:
                if ip_address(address) in ip_network(cidr):
                    return node.name
        return ""

    @contextlib.contextmanager
    def inside(self, where: str) -> Generator[int]:
        """A descriptor of the namespace of a pod, ``node/NAME`` or ``outside``."""
        fd = self.lab.netns_fd(where, NAMESPACE)
        try:
            yield fd
        finally:
            os.close(fd)

    def ask(
        self, where: str, address: str, port: int, protocol: str = "TCP", times: int = 1
    ) -> list[Answer]:
        """Requests from somewhere, one after the other."""
        with self.inside(where) as fd:
            return [connect.ask(fd, address, port, protocol) for _ in range(times)]


def _address(pod: Json, family: int = 0) -> str:
    return pod["status"]["podIPs"][family]["ip"]


def _name(pod: Json) -> str:
    return pod["metadata"]["name"]


def short(name: str) -> str:
    """A pod's name without the hash of its template: ``web-7d4b9c6f5-x2x4z`` is ``web-x2x4z``."""
    parts = name.split("-")
    return f"{'-'.join(parts[:-2])}-{parts[-1]}" if len(parts) > 2 else name


def _place(pod: str, node: str) -> str:
    return f"{short(pod)} on {node}" if pod != node else pod


def _proof(
    shop: Shop,
    title: str,
    asked: str,
    answers: Sequence[Answer],
    expected_source: Callable[[str], bool],
) -> Proof:
    """All answers must be good and have seen the expected source."""
    bad = next((a for a in answers if a.outcome != "ok" or not a.seen), None)
    if bad is not None:
        return Proof(title, asked, bad.outcome, "", False, bad.latency_s)
    pods = sorted({_place(a.seen["pod"], a.seen["node"]) for a in answers})
    answered = pods[0] if len(pods) == 1 else f"{len(pods)} pods in turn"
    sources = sorted({shop.who(a.seen["client"]) for a in answers})
    address = str(answers[0].seen["client"]).rpartition(":")[0].strip("[]")
    source = ", ".join(map(short, sources))
    source = f"{address} ({source})" if len(sources) == 1 else source
    holds = all(map(expected_source, sources))
    return Proof(title, asked, answered, source, holds, min(a.latency_s for a in answers))


def prove(shop: Shop) -> Iterator[Proof]:
    """Every kind of traffic, one after the other."""
    yield from pod_to_pod(shop)
    yield from to_services(shop)
    yield from across_the_border(shop)
    yield hairpin(shop)
    yield from names(shop)
    yield no_endpoints(shop)


def pod_to_pod(shop: Shop) -> Iterator[Proof]:
    """Same node, other node, and over IPv6 where the lab has it: never masqueraded."""
    web = shop.of("web", "node1")[0]
    near, far = shop.of("api", "node1")[0], shop.of("api", "node2")[0]
    rows = [("same node", near, 0), ("other node", far, 0)]
    if shop.lab.record.dual_stack:
        rows.append(("other node, IPv6", far, 1))
    for title, pod, family in rows:
        answers = shop.ask(_name(web), _address(pod, family), 9000)
        asked = f"{short(_name(web))} → {short(_name(pod))}"
        yield _proof(
            shop, f"pod → pod, {title}", asked, answers, lambda source: source == _name(web)
        )


def to_services(shop: Shop) -> Iterator[Proof]:
    """From a pod over TCP and UDP, and from a node."""
    web = _name(shop.of("web", "node1")[0])

    def asked(title: str, address: str, name: str, port: int, protocol: str = "TCP") -> Proof:
        answers = shop.ask(web, address, port, protocol, times=TRIES)
        request = f"{short(web)} → {name}:{port}"
        return _proof(shop, f"pod → Service, {title}", request, answers, lambda s: s == web)

    yield asked("TCP", shop.service("api"), "api", 80)
    if shop.lab.record.dual_stack:
        yield asked("IPv6", shop.service("api", 1), "api", 80)
    yield asked("UDP", shop.service("events"), "events", 8125, "UDP")
    answers = shop.ask("node/node1", shop.service("api"), 80, times=TRIES)
    yield _proof(shop, "node → Service", "node1 → api:80", answers, lambda s: s == "node1")


def across_the_border(shop: Shop) -> Iterator[Proof]:
    """In by a node port and by load balancers, out by masquerade."""
    nodes = shop.lab.record.nodes
    address = nodes["node1"].addresses[0]
    answers = shop.ask("outside", address, 30080, times=TRIES)
    asked = f"outside → {address}:30080"
    yield _proof(shop, "outside → NodePort", asked, answers, lambda s: s == "node1")
    address = shop.balancer("web")
    answers = shop.ask("outside", address, 80, times=TRIES)
    asked = f"outside → {address}:80"
    yield _proof(shop, "outside → LoadBalancer", asked, answers, lambda s: s in nodes)
    address = shop.balancer("web-local")
    answers = shop.ask("outside", address, 80, times=TRIES)
    asked = f"outside → {address}:80"
    yield _proof(shop, "outside → LB, Local policy", asked, answers, lambda s: s == "outside")
    pod = shop.of("api", "node2")[0]
    answers = shop.ask(_name(pod), topology.OUTSIDE[0], 80)
    asked = f"{short(_name(pod))} → {topology.OUTSIDE[0]}:80"
    yield _proof(shop, "pod → outside", asked, answers, lambda s: s == pod["spec"]["nodeName"])


def hairpin(shop: Shop) -> Proof:
    """A pod that asks a Service and is itself the only backend."""
    cache = shop.of("cache")[0]
    answers = shop.ask(_name(cache), shop.service("cache"), 6379)
    node = cache["spec"]["nodeName"]
    asked = f"{_name(cache)} → cache:6379"
    return _proof(shop, "pod → itself, by Service", asked, answers, lambda s: s == node)


def names(shop: Shop) -> Iterator[Proof]:
    """DNS over UDP (by libc, with the pod's own resolv.conf) and over TCP."""
    web = _name(shop.of("web", "node1")[0])
    for name, wanted in (
        ("api", shop.service("api")),
        ("cache-0.cache-nodes", _address(shop.of("cache")[0])),
    ):
        result = shop.lab.run(web, ["getent", "ahostsv4", name], namespace=NAMESPACE, timeout_s=10)
        found = result.stdout.split()[0] if result.stdout else "no answer"
        yield Proof("DNS, UDP", f"{short(web)}: {name}?", found, "", found == wanted)
    servers = shop.lab.api("GET", "/api/v1/namespaces/kube-system/services/kube-dns")
    with shop.inside(web) as fd:
        found = dns_over_tcp(fd, servers["spec"]["clusterIP"], "api.shop.svc.cluster.local")
    holds = found == shop.service("api")
    yield Proof("DNS, TCP", f"{short(web)}: api.shop.svc?", found, "", holds)


def dns_over_tcp(netns_fd: int, server: str, name: str) -> str:
    """The first A record of a name, or what went wrong. Source: RFC 1035, section 4.2.2."""
    number = random.getrandbits(16)
    query = struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0)
    query += pack_name(name_of(name)) + struct.pack("!HH", 1, 1)
    try:
        with netns.socket(netns_fd, socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(3)
            sock.connect((server, 53))
            sock.sendall(struct.pack("!H", len(query)) + query)
            with sock.makefile("rb") as stream:
                (size,) = struct.unpack("!H", stream.read(2))
                answer = stream.read(size)
    except (OSError, struct.error) as error:
        return str(error)
    count = struct.unpack_from("!H", answer, 6)[0]
    return socket.inet_ntoa(answer[-4:]) if count == 1 and answer[:2] == query[:2] else "no answer"


def no_endpoints(shop: Shop) -> Proof:
    """Refused at once."""
    web = _name(shop.of("web", "node1")[0])
    answer = shop.ask(web, shop.service("payments"), 443)[0]
    holds = answer.outcome == "refused" and answer.latency_s < 1
    asked = f"{short(web)} → payments:443"
    return Proof("Service without endpoints", asked, answer.outcome, "", holds, answer.latency_s)
