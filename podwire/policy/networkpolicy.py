"""NetworkPolicy (networking.k8s.io/v1) → `Policy`.

Defaulting is done here again, for objects that no API server has defaulted. What has no meaning is
reported by field and fails closed: a bad peer or port matches nothing, a bad subject still
isolates the pods that the sound part of it selects, and allows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from podwire.errors import InvalidObject
from podwire.kube.objects import (
    IPBlock,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
)
from podwire.net import Prefix, Protocol, parse_prefix
from podwire.policy.model import (
    AUDIT_ANNOTATION,
    Action,
    BlockPeer,
    Direction,
    NamedPort,
    Peer,
    PodPeer,
    Policy,
    PolicyRef,
    PortMatch,
    PortRange,
    Rule,
    Tier,
)
from podwire.policy.selectors import EVERYTHING, Report, compile_selector

PROTOCOLS = {"TCP": Protocol.TCP, "UDP": Protocol.UDP, "SCTP": Protocol.SCTP}
_TYPES = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)


def translate(source: NetworkPolicy) -> Policy:
    """The policy; what could not be enforced as written is in its `problems`."""
    problems: list[tuple[str, str]] = []

    def report(field: str, message: str) -> None:
        problems.append((field, message))

    spec = source.spec
    namespace = source.metadata.namespace
    subject = compile_selector(spec.pod_selector, "spec.podSelector", report)
    ingress = tuple(
        _rule("ingress", "from", i, namespace, rule.from_, rule.ports, report)
        for i, rule in enumerate(spec.ingress or ())
    )
    egress = tuple(
        _rule("egress", "to", i, namespace, rule.to, rule.ports, report)
        for i, rule in enumerate(spec.egress or ())
    )
    isolates = _directions(spec.policy_types, spec.egress, report)
    if subject is None:
        subject = _sound_part(spec.pod_selector)
        ingress = egress = ()
    return Policy(
        PolicyRef("NetworkPolicy", namespace, source.metadata.name),
        Tier.NAMESPACED,
        PodPeer(subject, namespace),
        isolates=isolates,
        ingress=ingress if Direction.INGRESS in isolates else (),
        egress=egress if Direction.EGRESS in isolates else (),
        audit=source.metadata.annotations.get(AUDIT_ANNOTATION) == "true",
        problems=tuple(problems),
        version=source.metadata.resource_version,
    )


def _sound_part(source: LabelSelector):
    """What a selector selects without the requirements that make no sense: never too little."""
    sound = [
        requirement
        for requirement in source.match_expressions or []
        if compile_selector(LabelSelector(match_expressions=[requirement]), "", _ignore)
    ]
    labels = LabelSelector(match_labels=source.match_labels, match_expressions=sound)
    return compile_selector(labels, "", _ignore) or EVERYTHING


def _ignore(field: str, message: str) -> None:
    pass


def _directions(
    types: Sequence[str] | None, egress: Sequence[NetworkPolicyEgressRule] | None, report: Report
) -> frozenset[Direction]:
    for i, name in enumerate(types or ()):
        if name not in _TYPES:
            report(f"spec.policyTypes[{i}]", f"unknown policy type {name!r}")
    directions = frozenset(_TYPES[name] for name in types or () if name in _TYPES)
    if directions:
        return directions
    return frozenset(Direction) if egress else frozenset({Direction.INGRESS})


def _rule(
    direction: str,
    peers_name: str,
    number: int,
    namespace: str,
    peers: Sequence[NetworkPolicyPeer] | None,
    ports: Sequence[NetworkPolicyPort] | None,
    report: Report,
) -> Rule:
    field = f"spec.{direction}[{number}]"
    good_peers: list[Peer] = []
    peer_fields: list[str] = []
    for i, source in enumerate(peers or ()):
        where = f"{field}.{peers_name}[{i}]"
        peer = _peer(source, namespace, where, report)
        if peer is not None:
            good_peers.append(peer)
            peer_fields.append(where)
    good_ports: list[PortMatch] = []
    port_fields: list[str] = []
    for i, source in enumerate(ports or ()):
        where = f"{field}.ports[{i}]"
        port = _port(source, where, report)
        if port is not None:
            good_ports.append(port)
            port_fields.append(where)
    return Rule(
        Action.ACCEPT,
        number,
        field,
        tuple(good_peers) if peers else None,
        tuple(good_ports) if ports else None,
        tuple(peer_fields),
        tuple(port_fields),
    )


def _peer(source: NetworkPolicyPeer, namespace: str, field: str, report: Report) -> Peer | None:
    selects = source.pod_selector is not None or source.namespace_selector is not None
    if source.ip_block is not None:
        if selects:
            report(field, "ipBlock and selectors exclude each other in one peer")
            return None
        return _block(source.ip_block, f"{field}.ipBlock", report)
    if not selects:
        report(field, "a peer needs podSelector, namespaceSelector or ipBlock")
        return None
    pods = EVERYTHING
    if source.pod_selector is not None:
        compiled = compile_selector(source.pod_selector, f"{field}.podSelector", report)
        if compiled is None:
            return None
        pods = compiled
    if source.namespace_selector is None:
        return PodPeer(pods, namespace)
    where = f"{field}.namespaceSelector"
    namespaces = compile_selector(source.namespace_selector, where, report)
    return None if namespaces is None else PodPeer(pods, None, namespaces)


def _block(source: IPBlock, field: str, report: Report) -> BlockPeer | None:
    cidr = read_prefix(source.cidr, f"{field}.cidr", report)
    if cidr is None:
        return None
    excepts: list[Prefix] = []
    for i, text in enumerate(source.except_ or ()):
        where = f"{field}.except[{i}]"
        gap = read_prefix(text, where, report)
        if gap is None:
            return None  # what was to be left out is unknown
        if not cidr.covers(gap):
            report(where, f"{text} is not inside {source.cidr}: it excludes nothing more")
        if len(gap.address) == len(cidr.address):
            excepts.append(gap)
    return BlockPeer(cidr, tuple(sorted(excepts)))


def read_prefix(text: str, field: str, report: Report) -> Prefix | None:
    """A CIDR as the API stores them, also with host bits; None, and a report, if it is none."""
    try:
        if "/" not in text:
            raise InvalidObject(f"not a CIDR: {text!r}")
        return parse_prefix(text)
    except InvalidObject as error:
        report(field, str(error))
        return None


def _port(source: NetworkPolicyPort, field: str, report: Report) -> PortMatch | None:
    protocol = PROTOCOLS.get(source.protocol if source.protocol is not None else "TCP")
    if protocol is None:
        report(f"{field}.protocol", f"unknown protocol {source.protocol!r}")
        return None
    port, last = source.port, source.end_port
    if port is None or isinstance(port, str):
        if last is not None:
            report(f"{field}.endPort", "endPort needs a numeric port")
            return None
        if port is None:
            return PortRange(protocol)
        if not _PORT_NAME.fullmatch(port):
            report(f"{field}.port", f"not a port name: {port!r}")
            return None
        return NamedPort(port, protocol)
    if not 1 <= port <= 65535:
        report(f"{field}.port", f"not a port: {port}")
        return None
    if last is None:
        return PortRange(protocol, port, port)
    if not port <= last <= 65535:
        report(f"{field}.endPort", f"{last} is not between port {port} and 65535")
        return None
    return PortRange(protocol, port, last)
