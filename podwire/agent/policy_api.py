"""What `podwire policy` asks: pure functions from the table to something JSON can hold.

Ends of a connection are written as people do: a pod ``namespace/name``, an address, ``node:NAME``,
and as destination a Service ``namespace/name``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from podwire.datapath.ebpf.connections import Flow
from podwire.datapath.ebpf.events import Event
from podwire.datapath.ebpf.layout import Reason
from podwire.datapath.ebpf.rulings import Ruling
from podwire.errors import InvalidObject
from podwire.kernel.ctnetlink.entries import Entry
from podwire.kernel.nflog import Logged
from podwire.kube.objects import ClusterNetworkPolicy, EndpointSlice, NetworkPolicy, Service
from podwire.kube.store import Store
from podwire.net import Address, Protocol, format_address, parse_address, protocol_name
from podwire.policy import Decision, Direction, Judgement, Packet, PolicyTable, Verdict
from podwire.policy import lint as linting
from podwire.policy import matrix as matrices
from podwire.policy.explain import describe, explain
from podwire.policy.model import Host, Key, Policy, Rule

Query = Mapping[str, str]
_KINDS = {"NetworkPolicy": NetworkPolicy, "ClusterNetworkPolicy": ClusterNetworkPolicy}
_SERVICE_LABEL = "kubernetes.io/service-name"


class End(NamedTuple):
    """One end of a connection, of one family."""

    name: str
    address: Address
    pod: Key | None = None
    node: str | None = None
    port: int = 0
    via_service: bool = False


# --- why -----------------------------------------------------------------------------------------


def why(store: Store, table: PolicyTable, query: Query) -> list[dict[str, Any]]:
    """`src`, `dst`, `port`, `protocol`, and optionally `family` (IPv4, IPv6): one answer per
    destination address. Raises InvalidObject.
    """
    try:
        protocol = Protocol[query.get("protocol", "TCP").upper()]
        port = int(query.get("port", "0"))
    except (KeyError, ValueError):
        raise InvalidObject("needs a protocol and a port number") from None
    bits = {"IPv4": (32,), "IPv6": (128,)}.get(query.get("family", ""), (32, 128))
    sources = _ends(store, table, query.get("src", ""), port, protocol, source=True)
    destinations = _ends(store, table, query.get("dst", ""), port, protocol, source=False)
    answers = [
        _answer(table, source, destination, protocol)
        for destination in destinations
        for source in sources
        if len(source.address) == len(destination.address) and len(source.address) * 8 in bits
    ]
    if not answers:
        raise InvalidObject("the two ends have no address family in common")
    return answers


def _answer(
    table: PolicyTable, source: End, destination: End, protocol: Protocol
) -> dict[str, Any]:
    icmp_type = {Protocol.ICMP: 8, Protocol.ICMPV6: 128}.get(protocol)
    packet = Packet(
        source.address,
        destination.address,
        protocol,
        destination.port,
        icmp_type,
        destination.via_service,
        source.pod,
        destination.pod,
        source.node,
    )
    found = explain(table, packet)
    hints = dict(found.hints)
    return {
        "source": source.name,
        "source_address": format_address(source.address),
        "destination": destination.name,
        "destination_address": format_address(destination.address),
        "protocol": protocol.name,
        "port": destination.port,
        "verdict": found.judgement.verdict.value,
        "directions": [
            {**decision(each), "hints": list(hints[each.direction])}
            for each in (found.judgement.egress, found.judgement.ingress)
        ],
    }


def decision(each: Decision) -> dict[str, Any]:
    """One direction's verdict and reason."""
    return {
        "direction": each.direction.value,
        "verdict": each.verdict.value,
        "why": each.why.value,
        "policy": str(each.policy) if each.policy else None,
        "rule": each.rule,
        "field": each.field,
        "isolating": [str(ref) for ref in each.isolating],
        "text": str(each),
    }


def _ends(
    store: Store, table: PolicyTable, text: str, port: int, protocol: Protocol, *, source: bool
) -> list[End]:
    if text.startswith("node:"):
        name = text[5:]
        if name not in table.nodes:
            raise InvalidObject("no such Node", object=f"Node {name}")
        _, addresses = table.nodes[name]
        return [End(text, one, node=name if source else None, port=port) for one in addresses]
    namespace, slash, name = text.partition("/")
    if not slash:
        try:
            address = parse_address(text)
        except InvalidObject:
            what = "neither an address nor a pod's NAMESPACE/NAME nor node:NAME"
            raise InvalidObject(what, object=text) from None
        host = table.host(address)
        label = f"{text} ({_name(host)})" if host.kind != "world" else text
        node = host.name if source and host.kind == "node" else None
        return [End(label, address, node=node, port=port)]
    key = (namespace, name)
    facts = table.pods.get(key)
    if facts is not None:
        node = facts.node if source and facts.host_network else None
        addresses = table.pod_addresses(key)
        return [End(f"pod {text}", one, key, node, port) for one in addresses]
    service = store.get(Service, key)
    if source or service is None:
        raise InvalidObject("no such pod" + ("" if source else " and no such Service"), object=text)
    found = list(_backends(store, table, service, port, protocol))
    if not found:
        raise InvalidObject(
            f"no endpoint for port {port}/{protocol.name}", object=f"Service {text}"
        )
    return found


def _backends(
    store: Store, table: PolicyTable, service: Service, port: int, protocol: Protocol
) -> Iterator[End]:
    names = {p.name for p in service.spec.ports if p.port == port and p.protocol == protocol.name}
    namespace, name = service.key
    for piece in store.all(EndpointSlice).values():
        if piece.metadata.namespace != namespace:
            continue
        if piece.metadata.labels.get(_SERVICE_LABEL) != name:
            continue
        for one in piece.ports or ():
            if (one.name or "") not in names or one.port is None:
                continue
            for endpoint in piece.endpoints or ():
                for text in endpoint.addresses:
                    address = parse_address(text)
                    pod = _name(table.host(address))
                    label = f"Service {namespace}/{name} → {pod}"
                    yield End(label, address, port=one.port, via_service=True)


def _name(host: Host) -> str:
    if host.kind == "pod":
        return f"{host.namespace}/{host.name}"
    return f"node:{host.name}" if host.kind == "node" else "outside"


# --- lists ---------------------------------------------------------------------------------------


def listing(table: PolicyTable, query: Query) -> list[dict[str, Any]]:
    """One row per policy; `namespace` narrows it down."""
    namespace = query.get("namespace", "")
    return [
        {
            "policy": str(policy.ref),
            "tier": policy.tier.name.capitalize(),
            "priority": policy.priority,
            "selects": str(policy.subject.pods),
            "pods": len(_selected(table, policy)),
            "isolates": sorted(direction.value for direction in policy.isolates),
            "ingress_rules": len(policy.ingress),
            "egress_rules": len(policy.egress),
            "audit": policy.audit,
            "version": policy.version,
            "problems": len(policy.problems),
        }
        for policy in sorted(table.policies.values(), key=lambda policy: policy.order)
        if not namespace or policy.ref.namespace == namespace
    ]


def show(table: PolicyTable, query: Query) -> list[dict[str, Any]]:
    """All about the policies of a name (``namespace/name``, ``name``). Raises InvalidObject."""
    return [
        {
            "policy": str(policy.ref),
            "version": policy.version,
            "audit": policy.audit,
            "subject": describe(policy.subject),
            "pods": [f"{namespace}/{name}" for namespace, name in _selected(table, policy)],
            "isolates": sorted(direction.value for direction in policy.isolates),
            "rules": [
                _shown(direction, rule)
                for direction in Direction
                for rule in policy.rules(direction)
            ],
            "problems": dict(policy.problems),
        }
        for policy in named(table, query.get("name", ""))
    ]


def named(table: PolicyTable, text: str) -> list[Policy]:
    """Policies of all kinds called so. Raises InvalidObject when there is none."""
    namespace, slash, name = text.rpartition("/")
    found = [
        policy
        for ref, policy in table.policies.items()
        if ref.name == name and (not slash or ref.namespace == namespace)
    ]
    if not found:
        raise InvalidObject("no such policy is known here", object=text)
    return found


def _shown(direction: Direction, rule: Rule) -> dict[str, Any]:
    return {
        "direction": direction.value,
        "number": rule.number,
        "name": rule.name,
        "action": rule.action.value,
        "peers": None if rule.peers is None else [describe(peer) for peer in rule.peers],
        "ports": None if rule.ports is None else [str(port) for port in rule.ports],
    }


def _selected(table: PolicyTable, policy: Policy) -> list[Key]:
    out: list[Key] = []
    for facts in matrices.pods_of(table):
        host = table.pod_host(facts.key)
        if host and policy.subject.matches(host.namespace, host.labels, host.namespace_labels):
            out.append(facts.key)
    return out


def applied(table: PolicyTable, query: Query, enforced: bool) -> dict[str, Any]:
    """Which version of the policies of a name this node has, and whether the kernel has it."""
    name = query.get("name", "")
    try:
        versions = {str(policy.ref): policy.version for policy in named(table, name)}
    except InvalidObject:
        versions = {}
    return {"node": table.node_name, "versions": versions, "enforced": enforced}


def lint(table: PolicyTable, _: Query) -> list[dict[str, Any]]:
    """Every finding."""
    return [
        {"policy": str(finding.policy), "field": finding.field, "message": finding.message}
        for finding in linting.lint(table)
    ]


# --- matrix and diff -----------------------------------------------------------------------------


def matrix(table: PolicyTable, query: Query) -> dict[str, Any]:
    """Who reaches whom on `port`/`protocol`, `family`, among the pods of `namespaces` (a,b)."""
    wanted = [name for name in query.get("namespaces", "").split(",") if name]
    pods = matrices.pods_of(table, wanted)
    protocol = Protocol[query.get("protocol", "TCP").upper()]
    bits = 128 if query.get("family") == "IPv6" else 32
    rows = matrices.reach(table, pods, protocol, int(query.get("port", "80")), bits)
    return {
        "pods": [f"{pod.key[0]}/{pod.key[1]}" for pod in pods],
        "rows": [[verdict.value if verdict else None for verdict in row] for row in rows],
    }


def policies_in(documents: Iterable[Any]) -> list[NetworkPolicy | ClusterNetworkPolicy]:
    """The policies among manifests. Raises InvalidObject for one that does not decode."""
    out: list[NetworkPolicy | ClusterNetworkPolicy] = []
    for document in documents:
        kind = _KINDS.get(str(document.get("kind")))
        if kind is None:
            continue
        metadata = document.setdefault("metadata", {})
        if kind is NetworkPolicy:
            metadata.setdefault("namespace", "default")
        try:
            out.append(msgspec.convert(document, kind))
        except msgspec.ValidationError as error:
            raise InvalidObject(
                str(error), object=f"{document['kind']} {metadata.get('name')}"
            ) from None
    return out


def proposed(table: PolicyTable, query: Query) -> PolicyTable:
    """The table with the policies in `body` (a JSON list of manifests). Raises InvalidObject."""
    try:
        documents = json.loads(query.get("body", "[]"))
    except ValueError:
        raise InvalidObject("the body is no JSON list of policies") from None
    return matrices.with_policies(table, policies_in(documents))


def diff(before: PolicyTable, after: PolicyTable) -> dict[str, Any]:
    """What would be judged otherwise."""
    changes, points = matrices.changes(before, after)
    new = [ref for ref, policy in after.policies.items() if before.policies.get(ref) is not policy]
    return {
        "policies": [str(ref) for ref in new],
        "tried": [f"{Protocol(protocol).name}/{port}" for protocol, port in points],
        "changes": [
            {
                "source": "/".join(change.source),
                "destination": "/".join(change.destination),
                "protocol": Protocol(change.protocol).name,
                "port": change.port,
                "before": change.before.verdict.value,
                "after": change.after.verdict.value,
                "reason": str(change.after.deciding),
            }
            for change in changes
        ],
        "problems": {
            f"{ref} {field}": sentence
            for ref in new
            for field, sentence in after.policies[ref].problems
        },
    }


def flow(table: PolicyTable, entry: Entry) -> str:
    """A connection in words."""
    source, destination = entry.original.source, entry.reply.source
    return (
        f"{_name(table.host(source))} ({format_address(source)}) → "
        f"{_name(table.host(destination))} ({format_address(destination)}) "
        f"{protocol_name(entry.original.protocol)}/{entry.reply.source_port}"
    )


# --- drops ---------------------------------------------------------------------------------------


def logged(table: PolicyTable, packet: Logged, now_s: float) -> dict[str, Any]:
    """A packet that netfilter logged, with names and the policy that decides."""
    judgement = judge_logged(table, packet)
    deciding = judgement.deciding
    if judgement.verdict is Verdict.ALLOW:
        reason, policies = _CHANGED, []
    else:
        refs = [deciding.policy] if deciding.policy else list(deciding.isolating)
        reason, policies = str(deciding), [str(ref) for ref in refs]
    flow = Flow(*packet[1:3], packet.source_port, packet.port, packet.protocol)
    verdict = Verdict.AUDIT if "audited" in packet.prefix else Verdict.DENY
    return _drop(table, now_s, verdict, flow, deciding.direction, policies, reason)


def refused(table: PolicyTable, event: Event, ruling: Ruling | None) -> dict[str, Any]:
    """A packet that eBPF refused. The kernel says whose doing it is, the table by which rule."""
    flow = event.flow
    if flow.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        flow = flow._replace(source_port=0, destination_port=0)
    judged = table.judge(
        Packet(
            flow.source,
            flow.destination,
            flow.protocol,
            flow.destination_port,
            via_service=flow.source == flow.destination,
        )
    )
    decision = judged.egress if event.egress else judged.ingress
    verdict = Verdict.AUDIT if event.reason is Reason.POLICY_AUDIT else Verdict.DENY
    policies = ruling.policies if ruling is not None else ()
    refs = (decision.policy,) if decision.policy else decision.isolating
    same = ruling is not None and (decision.verdict, refs) == (verdict, policies)
    reason = str(decision) if same else _CHANGED
    names = [str(ref) for ref in policies]
    return _drop(table, event.time_s, verdict, flow, decision.direction, names, reason)


_CHANGED = "the policies have changed since"


def _drop(
    table: PolicyTable,
    time_s: float,
    verdict: Verdict,
    flow: Flow,
    direction: Direction,
    policies: list[str],
    reason: str,
) -> dict[str, Any]:
    return {
        "time": time_s,
        "verdict": verdict.value,
        "source": format_address(flow.source),
        "source_port": flow.source_port,
        "source_name": name_of(table, flow.source),
        "destination": format_address(flow.destination),
        "destination_name": name_of(table, flow.destination),
        "protocol": protocol_name(flow.protocol),
        "port": flow.destination_port,
        "direction": direction.value,
        "policies": policies,
        "reason": reason,
    }


def name_of(table: PolicyTable, address: Address) -> str:
    """``namespace/pod``, ``node:NAME`` or ``outside``."""
    return _name(table.host(address))


def judge_logged(table: PolicyTable, packet: Logged) -> Judgement:
    """The table's judgement of a packet seen on the wire, after destination NAT."""
    return table.judge(
        Packet(
            packet.source,
            packet.destination,
            packet.protocol,
            packet.port,
            packet.icmp_type,
            via_service=packet.source == packet.destination,
        )
    )
