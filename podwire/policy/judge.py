"""The reference evaluator: one packet against the objects, rule by rule, with the reason.

It reads policies as written and shares nothing with the compilation into boxes, so that each can
be held against the other. A packet here is the first of a connection, after destination NAT and
before source NAT; replies follow their connection and are not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from podwire.net import Address, Protocol
from podwire.policy.model import (
    Action,
    ContainerPort,
    Direction,
    Host,
    Key,
    Policy,
    PolicyRef,
    Rule,
    Tier,
    Verdict,
    peer_matches,
)
from podwire.policy.rulesets import use_order
from podwire.policy.verdicts import RuleUse

if TYPE_CHECKING:
    from podwire.policy.table import PolicyTable

_ICMP_ERRORS: dict[int, set[int]] = {Protocol.ICMP: {3, 4, 11, 12}, Protocol.ICMPV6: {1, 2, 3, 4}}
_NEIGHBOUR_DISCOVERY = {130, 131, 132, 133, 134, 135, 136, 137, 143}


@dataclass(frozen=True)
class Packet:
    """The first packet of a connection; `port` is the destination's, after Service DNAT.

    `source_pod`, `destination_pod`: whose link it comes from and goes to; unset, the owner of the
    address. `source_node`: sent by that node itself. `via_service`: it was sent to a Service.
    """

    source: Address
    destination: Address
    protocol: int
    port: int = 0
    icmp_type: int | None = None
    via_service: bool = False
    source_pod: Key | None = None
    destination_pod: Key | None = None
    source_node: str | None = None


class Why(StrEnum):
    """What decided a direction."""

    RULE = "rule"
    ISOLATED = "isolated"  # no rule of the isolating policies allows it
    NOT_ISOLATED = "not isolated"  # no policy decides
    NOT_A_POD = "not a pod"  # the subject is a node or outside the cluster
    OWN_NODE = "own node"
    SELF = "self"
    ICMP_ERROR = "ICMP error"
    NEIGHBOUR_DISCOVERY = "neighbour discovery"
    UNKNOWN_POD = "unknown pod"  # attached here, but the API does not know it (yet)


@dataclass(frozen=True)
class Decision:
    """One direction's verdict. `policy`, `rule` (from 0) and `field` name the deciding rule.

    `isolating`: the policies that isolate the pod. With AUDIT, policy and rule are those that
    would deny.
    """

    direction: Direction
    verdict: Verdict
    why: Why
    policy: PolicyRef | None = None
    rule: int | None = None
    field: str = ""
    isolating: tuple[PolicyRef, ...] = ()

    def __str__(self) -> str:
        words = {Verdict.ALLOW: "allowed", Verdict.DENY: "denied", Verdict.AUDIT: "audited"}
        head = f"{self.direction.value} {words[self.verdict]}"
        if self.why is Why.RULE:
            return f"{head} by {self.policy}, {self.field}"
        if self.why is Why.ISOLATED:
            return f"{head}: no rule of {', '.join(map(str, self.isolating))} allows it"
        return f"{head}: {_WORDS[self.why]}"


_WORDS = {
    Why.NOT_ISOLATED: "no policy isolates the pod in this direction",
    Why.NOT_A_POD: "policies do not apply to nodes and addresses outside the cluster",
    Why.OWN_NODE: "a pod's own node always reaches it",
    Why.SELF: "a pod always reaches itself",
    Why.ICMP_ERROR: "errors of allowed connections always pass",
    Why.NEIGHBOUR_DISCOVERY: "neighbour discovery always passes",
    Why.UNKNOWN_POD: "the pod is not known (yet), and what is not known is closed",
}


@dataclass(frozen=True)
class Judgement:
    """Both directions; the packet passes only if neither denies it."""

    egress: Decision
    ingress: Decision

    @property
    def verdict(self) -> Verdict:
        verdicts = (self.egress.verdict, self.ingress.verdict)
        for verdict in (Verdict.DENY, Verdict.AUDIT):
            if verdict in verdicts:
                return verdict
        return Verdict.ALLOW

    @property
    def allowed(self) -> bool:
        return self.verdict is not Verdict.DENY

    @property
    def deciding(self) -> Decision:
        """The direction that denies or audits; otherwise the ingress."""
        denies = self.verdict is not Verdict.ALLOW and self.egress.verdict is self.verdict
        return self.egress if denies else self.ingress


def judge(table: PolicyTable, packet: Packet) -> Judgement:
    """What the policies of `table` say about the packet."""
    exempt = _exempt(packet)
    if exempt is not None:
        return Judgement(
            Decision(Direction.EGRESS, Verdict.ALLOW, exempt),
            Decision(Direction.INGRESS, Verdict.ALLOW, exempt),
        )
    source = host_of(table, packet.source_pod, packet.source)
    destination = host_of(table, packet.destination_pod, packet.destination)
    if packet.source_node is not None:
        egress = Decision(Direction.EGRESS, Verdict.ALLOW, Why.NOT_A_POD)
    else:
        egress = _direction(
            table, Direction.EGRESS, source, destination, packet.destination, packet
        )
    if destination.kind == "pod" and _own_node(table, packet, source, destination):
        return Judgement(egress, Decision(Direction.INGRESS, Verdict.ALLOW, Why.OWN_NODE))
    ingress = _direction(table, Direction.INGRESS, destination, source, packet.source, packet)
    return Judgement(egress, ingress)


def _exempt(packet: Packet) -> Why | None:
    kind = packet.icmp_type
    if kind is not None and kind in _ICMP_ERRORS.get(packet.protocol, ()):
        return Why.ICMP_ERROR
    if packet.protocol == Protocol.ICMPV6 and kind in _NEIGHBOUR_DISCOVERY:
        return Why.NEIGHBOUR_DISCOVERY
    if packet.source_pod is not None and packet.source_pod == packet.destination_pod:
        return None if packet.via_service else Why.SELF
    if packet.source == packet.destination and not packet.via_service:
        return Why.SELF
    return None


def host_of(table: PolicyTable, pod: Key | None, address: Address) -> Host:
    """Who is at one end: the pod named, otherwise the owner of the address."""
    if pod is not None:
        facts = table.pods.get(pod)
        if facts is not None and facts.host_network and not facts.finished:
            return Host("node", "", facts.node, table.node_labels(facts.node))
        return table.pod_host(pod) or Host("unknown", *pod)
    owner = table.owners.get(address)
    if owner is not None and owner.kind == "pod" and owner.key in table.attachments:
        return table.pod_host(owner.key) or Host("unknown", *owner.key)
    return table.host(address)


def _own_node(table: PolicyTable, packet: Packet, source: Host, destination: Host) -> bool:
    key = (destination.namespace, destination.name)
    node = table.pods[key].node or (table.node_name if key in table.attachments else "")
    if packet.source_node is not None:
        return packet.source_node == node
    return source.kind == "node" and source.name == node


def _direction(
    table: PolicyTable,
    direction: Direction,
    subject: Host,
    peer: Host,
    peer_address: Address,
    packet: Packet,
) -> Decision:
    if subject.kind == "unknown":
        return Decision(direction, Verdict.DENY, Why.UNKNOWN_POD)
    if subject.kind != "pod":
        return Decision(direction, Verdict.ALLOW, Why.NOT_A_POD)
    policies = table.selecting(subject, direction)
    ports = subject.ports if direction is Direction.INGRESS else peer.ports
    enforced = [policy for policy in policies if not policy.audit]
    decision = _evaluate(enforced, direction, peer, peer_address, packet, ports)
    if len(enforced) < len(policies) and decision.verdict is Verdict.ALLOW:
        would = _evaluate(policies, direction, peer, peer_address, packet, ports)
        if would.verdict is Verdict.DENY:
            return Decision(
                direction, Verdict.AUDIT, would.why, would.policy, would.rule, would.field,
                would.isolating,
            )  # fmt: skip
    return decision


def _evaluate(
    policies: Sequence[Policy],
    direction: Direction,
    peer: Host,
    address: Address,
    packet: Packet,
    ports: tuple[ContainerPort, ...],
) -> Decision:
    """The first rule that decides, tier by tier; otherwise the default that applies."""
    isolating = tuple(policy.ref for policy in policies if direction in policy.isolates)
    uses = sorted(
        (RuleUse(policy, rule) for policy in policies for rule in policy.rules(direction)),
        key=use_order,
    )
    for tier in Tier:
        for policy, rule in uses:
            if policy.tier is not tier:
                continue
            field = _match(rule, peer, address, packet, ports)
            if field is None:
                continue
            if rule.action is Action.PASS:
                break
            verdict = Verdict.ALLOW if rule.action is Action.ACCEPT else Verdict.DENY
            return Decision(direction, verdict, Why.RULE, policy.ref, rule.number, field, isolating)
        if tier is Tier.NAMESPACED and isolating:
            return Decision(direction, Verdict.DENY, Why.ISOLATED, isolating=isolating)
    return Decision(direction, Verdict.ALLOW, Why.NOT_ISOLATED)


def _match(
    rule: Rule,
    peer: Host,
    address: Address,
    packet: Packet,
    ports: tuple[ContainerPort, ...],
) -> str | None:
    """The fields by which the rule matches, as one path; None if it does not."""
    peer_field = matching_peer(rule, peer, address)
    port_field = matching_port(rule, packet, ports)
    if peer_field is None or port_field is None:
        return None
    return " ".join(part for part in (peer_field, port_field) if part) or rule.field


def matching_peer(rule: Rule, peer: Host, address: Address) -> str | None:
    """The field of the first peer that matches; empty if any does."""
    if rule.peers is None:
        return ""
    for one, field in zip(rule.peers, rule.peer_fields, strict=True):
        if peer_matches(one, peer, address):
            return field
    return None


def matching_port(rule: Rule, packet: Packet, ports: tuple[ContainerPort, ...]) -> str | None:
    """The field of the first port that matches; empty if any does."""
    if rule.ports is None:
        return ""
    for one, field in zip(rule.ports, rule.port_fields, strict=True):
        if one.matches(packet.protocol, packet.port, ports):
            return field
    return None
