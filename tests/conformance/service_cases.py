"""The service-proxy cases: decoding, what they expect, and how it is compared.

Format: the README beside the cases (svc-cases/1).
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from podwire.kube.objects import EndpointSlice, Service
from podwire.kube.store import Store
from podwire.net import Protocol, parse_address, parse_prefix
from podwire.services import DetectLocal, NodeFacts, ProxyConfig, ServiceCompiler, ServiceTable

POD_SIDE = "cbr0"
UPLINK = "eth0"
MASQUERADED = {4: "198.18.255.1", 16: "fd00:ffff::1"}
"""Both interfaces' own address, which no case uses: what masqueraded packets come from."""

PROTOCOLS = {
    ("TCP", "IPv4"): Protocol.TCP,
    ("TCP", "IPv6"): Protocol.TCP,
    ("UDP", "IPv4"): Protocol.UDP,
    ("UDP", "IPv6"): Protocol.UDP,
    ("SCTP", "IPv4"): Protocol.SCTP,
    ("SCTP", "IPv6"): Protocol.SCTP,
    ("ICMP", "IPv4"): Protocol.ICMP,
    ("ICMP", "IPv6"): Protocol.ICMPV6,
}
_KINDS = {"Service": Service, "EndpointSlice": EndpointSlice}


@dataclass(frozen=True)
class Probe:
    """The first packet of one connection. `origin` is pod, external or host."""

    origin: str
    source: str
    source_port: int
    destination: str
    destination_port: int
    protocol: Protocol


@dataclass(frozen=True)
class Seen:
    """What became of a probe. `endpoint` and `source` are where it went and whom that saw."""

    verdict: str
    endpoint: str = ""
    source: str = ""


class Cluster:
    """The objects of a case, and the table that they make."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        self.node = NodeFacts(
            case["node"]["name"],
            tuple(map(parse_address, case["node"].get("ips", ()))),
            case["node"].get("zone")
            or case["node"].get("labels", {}).get("topology.kubernetes.io/zone")
            or "",
        )
        self.pod_cidr: str = case["node"].get("podCIDR", "")
        self.config = proxy_config(case.get("config", {}))
        self.store = Store()
        self.compiler = ServiceCompiler(self.node, self.config)

    def apply(self, objects: Iterable[Any], deleted: Iterable[Any] = ()) -> ServiceTable:
        for gone in deleted:
            self.store.remove(_KINDS[gone["kind"]], object_key(gone))
        for obj in objects:
            self.store.put(msgspec.convert(obj, _KINDS[obj["kind"]]))
        return self.compiler.update(self.store.take())


def object_key(obj: Mapping[str, Any]) -> tuple[str, str]:
    """Namespace and name of an object, or of a reference to one."""
    named = obj.get("metadata", obj)
    return (named["namespace"], named["name"])


def proxy_config(config: Mapping[str, Any]) -> ProxyConfig:
    detect = config.get("detectLocal", {"mode": "None"})
    local = DetectLocal()
    if detect["mode"] in ("ClusterCIDR", "NodeCIDR"):
        local = DetectLocal(prefixes=(parse_prefix(detect["cidr"]),))
    elif detect["mode"] == "BridgeInterface":
        local = DetectLocal(interface=detect["interface"])
    elif detect["mode"] == "InterfaceNamePrefix":
        local = DetectLocal(interface=detect["prefix"] + "*")
    return ProxyConfig(
        detect_local=local,
        masquerade_all=config.get("masqueradeAll", False),
        nodeport_addresses=tuple(config.get("nodePortAddresses", ())),
        localhost_nodeports=config.get("localhostNodePorts", False),
        service_cidrs=tuple(map(parse_prefix, config.get("serviceCIDRs", ()))),
    )


def probe(flow: Mapping[str, Any], family: str, source_port: int | None = None) -> Probe:
    return Probe(
        flow["from"]["kind"],
        flow["from"]["ip"],
        source_port or flow["from"]["port"],
        flow["to"]["ip"],
        flow["to"]["port"] or 0,
        PROTOCOLS[flow["protocol"], family],
    )


def expectation(flow: Mapping[str, Any], config: ProxyConfig) -> Mapping[str, Any]:
    """What podwire must do: the nftables column, but localhost node ports are served if asked."""
    to_loopback = flow["to"]["ip"].startswith("127.")
    if config.localhost_nodeports and to_loopback and not flow["portable"]:
        return flow["iptables"]
    return flow["expect"]


def mismatch(expect: Mapping[str, Any], client: str, seen: list[Seen]) -> str:
    """How what was seen over many connections of one client differs; empty if it does not."""
    verdicts = {one.verdict for one in seen}
    if verdicts != {expect["verdict"]}:
        return f"expected {expect['verdict']}, saw {', '.join(sorted(verdicts))}"
    if expect["verdict"] != "dnat":
        return ""
    endpoints = {one.endpoint for one in seen}
    if endpoints != set(expect["endpoints"]):
        return f"expected {sorted(expect['endpoints'])}, saw {sorted(endpoints)}"
    for one in seen:
        wrong = masquerade_mismatch(expect, client, one)
        if wrong:
            return wrong
    return ""


def masquerade_mismatch(expect: Mapping[str, Any], client: str, seen: Seen) -> str:
    wanted = expect.get("masquerade")
    if wanted == "per-endpoint":
        wanted = expect["masqueradeByEndpoint"][seen.endpoint]
    if wanted is None:
        return ""
    masqueraded = ipaddress.ip_address(seen.source) != ipaddress.ip_address(client)
    if masqueraded == wanted:
        return ""
    return f"{seen.endpoint} saw {seen.source}; masquerade should be {wanted}"


def load(folder: Path) -> Iterable[tuple[str, Mapping[str, Any] | str]]:
    """Every case file of a folder, by name; a sentence instead of a case that is none."""
    for path in sorted(folder.rglob("*.json")):
        try:
            case = json.loads(path.read_text())
        except ValueError as error:
            yield path.stem, f"not JSON: {error}"
            continue
        if not isinstance(case, dict) or case.get("schema") != "svc-cases/1":
            yield path.stem, "not a case of schema svc-cases/1"
        else:
            yield path.stem, case


_FLOW = frozenset({"verdict", "endpoints", "masquerade", "masqueradeByEndpoint", "note"})
_EXPECT_KEYS = {
    "flow": _FLOW,
    "open": _FLOW,
    "continue": _FLOW,
    "connect": _FLOW
    | {
        "endpointsPerClient", "rememberAs", "sameAs", "someClientDiffersFrom", "sameAsUnlessGone",
        "allEndpointsSeen",
    },
    "reply": frozenset({"seenByClientFrom", "deliveredTo", "note"}),
    "icmpError": frozenset({"deliveredTo", "quoted", "note"}),
    "endpoint-selection": frozenset(
        {"clusterEndpoints", "localEndpoints", "allEndpoints", "hasAnyEndpoints", "note"}
    ),
    "nodeport-addresses": frozenset({"IPv4", "IPv6", "note"}),
    "no-local-endpoints-metric": frozenset({"internal", "external", "note"}),
}  # fmt: skip


def unknown_keys(case: Mapping[str, Any]) -> Iterable[str]:
    """What is expected and would not be looked at."""
    said: list[tuple[str, Any]] = [
        ("flow", flow.get("expect"))
        for step in case.get("steps", ())
        for flow in step.get("flows", ())
    ]
    said += [(event["op"], event.get("expect")) for event in case.get("events", ())]
    said += [(case["kind"], each.get("expect")) for each in case.get("cases", ())]
    for where, expect in said:
        known = _EXPECT_KEYS.get(where)
        strange = expect.keys() - known if known and isinstance(expect, dict) else set[str]()
        if strange:
            yield f"the runner does not know {sorted(strange)} of what {where} expects"


def parse_end(text: str) -> tuple[str, int]:
    """``10.0.0.1:80`` or ``[fd00::1]:80`` taken apart."""
    address, _, port = text.rpartition(":")
    return address.strip("[]"), int(port)
