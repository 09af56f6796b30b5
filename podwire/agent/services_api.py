"""What `podwire services` asks: pure functions from the table to something JSON can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from podwire.datapath.counts import ServiceCounts
from podwire.errors import InvalidObject
from podwire.kube.objects import Pod
from podwire.kube.store import Store
from podwire.net import (
    Address,
    Prefix,
    Protocol,
    format_address,
    format_endpoint,
    parse_address,
)
from podwire.services import (
    Frontend,
    FrontendKind,
    Packet,
    ServicePort,
    ServicePortName,
    ServiceTable,
    backend_address,
    format_backend,
)

UPLINK = "uplink"  # any interface behind which no pod lives
PODS = "pods"

_KINDS = {
    FrontendKind.CLUSTER_IP: "ClusterIP",
    FrontendKind.LOAD_BALANCER: "LoadBalancer",
    FrontendKind.EXTERNAL_IP: "ExternalIP",
    FrontendKind.NODE_PORT: "NodePort",
}


def listing(table: ServiceTable, query: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row per frontend; ``namespace`` in the query narrows it down."""
    namespace = query.get("namespace", "")
    rows = [
        _row(name, port, frontend)
        for name, port in table.ports.items()
        if not namespace or name.namespace == namespace
        for frontend in port.frontends
    ]
    return sorted(rows, key=lambda row: (row["service"], row["kind"], row["frontend"]))


def _row(name: ServicePortName, port: ServicePort, frontend: Frontend) -> dict[str, Any]:
    local = port.is_local(frontend.kind)
    address = (
        format_endpoint(frontend.address, frontend.port)
        if frontend.address
        else f"*:{frontend.port}"
    )
    return {
        "service": f"{name.namespace}/{name.name}",
        "port": name.port_name,
        "kind": _KINDS[frontend.kind],
        "frontend": address,
        "protocol": name.protocol.name,
        "family": name.family,
        "policy": "Local" if local else "Cluster",
        "backends": len(port.local if local else port.cluster),
        "affinity_timeout_s": port.affinity_timeout_s,
    }


Counts: TypeAlias = Callable[[ServicePort], ServiceCounts]


def show(
    table: ServiceTable,
    query: Mapping[str, str],
    counts: Counts | None = None,
    balancing: Callable[[ServicePort], str] | None = None,
) -> list[dict[str, Any]]:
    """All about one Service; `name` is ``namespace/name``. Raises InvalidObject.

    `balancing` says in words how external traffic of a port is balanced.
    """
    namespace, _, name = query.get("name", "").rpartition("/")
    found = [
        port
        for key, port in table.ports.items()
        if key.name == name and key.namespace == (namespace or "default")
    ]
    problems = {
        what: why
        for what, why in table.problems.items()
        if what.split(":")[0].endswith(f" {namespace or 'default'}/{name}")
    }
    if not found and not problems:
        raise InvalidObject("no such Service is programmed here", object=f"Service {query['name']}")
    return [
        {
            "service": f"{port.name.namespace}/{port.name.name}",
            "port": port.name.port_name,
            "protocol": port.name.protocol.name,
            "family": port.name.family,
            **_counted(port, counts(port) if counts is not None else ServiceCounts()),
            "cluster": [format_backend(each) for each in port.cluster],
            "local": [format_backend(each) for each in port.local],
            "has_endpoints": port.has_endpoints,
            "internal_traffic_policy": "Local" if port.internal_local else "Cluster",
            "external_traffic_policy": "Local" if port.external_local else "Cluster",
            "affinity_timeout_s": port.affinity_timeout_s,
            "balancing": balancing(port) if balancing is not None else "",
            "source_ranges": _texts(port.source_ranges),
            "problems": problems,
        }
        for port in sorted(found, key=lambda each: str(each.name))
    ] or [{"service": query["name"], "problems": problems}]


def _counted(port: ServicePort, counts: ServiceCounts) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for frontend in port.frontends:
        row = _row(port.name, port, frontend)
        if frontend in counts.frontends:
            row["element"], row["connections"] = counts.frontends[frontend]
        rows.append(row)
    backends = {format_backend(each): count for each, count in counts.backends.items()}
    return {"frontends": rows, "connections": backends}


def _texts(prefixes: Iterable[Prefix] | None) -> list[str] | None:
    return None if prefixes is None else [str(each) for each in prefixes]


def resolve(store: Store, table: ServiceTable, query: Mapping[str, str]) -> dict[str, Any]:
    """What becomes here of a new connection ``src`` → ``dst``:``port``/``protocol``.

    `src` is a pod (``namespace/name``), an address, or ``node``; `dst` an address or a Service
    (``namespace/name``). ``decided_on`` names the node that such a connection meets first: what
    another one answers is no more than what it would do. Raises InvalidObject.
    """
    try:
        protocol = Protocol[query.get("protocol", "TCP").upper()]
        port = int(query.get("port", "0"))
    except (KeyError, ValueError):
        raise InvalidObject("the destination is ADDRESS:PORT[/TCP|UDP|SCTP]") from None
    destination = _destination(table, query.get("dst", ""), protocol, port)
    source, interface = _source(store, table, query.get("src", ""), len(destination))
    packet = Packet(source, destination, protocol, port, interface)
    answer = table.resolve(packet)
    pod = _pod_with(store.all(Pod).values(), source) if interface else None
    node = table.settings.node.name
    origin = {"": "the node itself", UPLINK: "outside"}.get(interface, "a pod")
    return {
        "source": format_address(source),
        "from": f"a pod of {pod.spec.node_name}" if pod else origin,
        "node": node,
        "decided_on": pod.spec.node_name if pod else node,
        "destination": format_endpoint(destination, port),
        "protocol": protocol.name,
        "verdict": answer.verdict,
        "reason": answer.reason,
        "service": str(answer.service) if answer.service else None,
        "kind": _KINDS[answer.frontend.kind] if answer.frontend else None,
        "backends": [
            {
                "endpoint": format_backend(each),
                "pod": _name(_pod_with(store.all(Pod).values(), backend_address(each))),
                "masquerade": answer.masquerades(each),
            }
            for each in answer.backends
        ],
        "affinity_timeout_s": answer.affinity_timeout_s,
    }


def _destination(table: ServiceTable, text: str, protocol: Protocol, port: int) -> Address:
    if "/" not in text:
        try:
            return parse_address(text)
        except InvalidObject:
            what = "neither an address nor a Service's NAMESPACE/NAME"
            raise InvalidObject(what, object=text) from None
    namespace, name = text.split("/", 1)
    for key, found in table.ports.items():
        if (key.namespace, key.name, key.protocol) == (namespace, name, protocol):
            for frontend in found.frontends:
                if frontend.kind == FrontendKind.CLUSTER_IP and frontend.port == port:
                    return frontend.address
    raise InvalidObject(f"has no {protocol.name} port {port}", object=f"Service {text}")


def _source(store: Store, table: ServiceTable, text: str, size: int) -> tuple[Address, str]:
    node = table.settings.node
    detect = table.settings.config.detect_local
    pods = detect.interface.rstrip("*") or PODS
    if text == "node":
        own = node.internal_ip(4 if size == 4 else 6)
        if own is None:
            raise InvalidObject("has no address of this family", object=f"Node {node.name}")
        return own, ""
    if "/" in text:
        namespace, name = text.split("/", 1)
        pod = store.get(Pod, (namespace, name))
        texts = [ip.ip for ip in pod.status.pod_ips] if pod else []
        address = next((a for a in map(parse_address, texts) if len(a) == size), None)
        if pod is None or address is None:
            raise InvalidObject("no such pod, or no address of this family", object=f"Pod {text}")
        return address, pods if pod.spec.node_name == node.name else UPLINK
    try:
        address = parse_address(text)
    except InvalidObject:
        what = "neither an address nor a pod's NAMESPACE/NAME nor `node`"
        raise InvalidObject(what, object=text) from None
    if address in node.addresses:
        return address, ""
    return address, pods if any(address in prefix for prefix in detect.prefixes) else UPLINK


def _pod_with(pods: Iterable[Pod], address: Address) -> Pod | None:
    text = format_address(address)
    return next((pod for pod in pods if any(ip.ip == text for ip in pod.status.pod_ips)), None)


def _name(pod: Pod | None) -> str | None:
    return "/".join(pod.key) if pod else None
