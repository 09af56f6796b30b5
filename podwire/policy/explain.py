"""Why a packet passes or not, and what would change it: `judge`'s answer for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from podwire.policy.judge import (
    Decision,
    Judgement,
    Packet,
    Why,
    host_of,
    matching_peer,
    matching_port,
)
from podwire.policy.model import (
    Action,
    BlockPeer,
    Direction,
    NodePeer,
    Peer,
    PodPeer,
    Tier,
    Verdict,
)
from podwire.policy.table import PolicyTable


@dataclass(frozen=True)
class Explanation:
    """One judgement; `hints` by direction: what of the policies would have to be otherwise."""

    judgement: Judgement
    hints: tuple[tuple[Direction, tuple[str, ...]], ...]


def explain(table: PolicyTable, packet: Packet) -> Explanation:
    """The judgement with its hints."""
    judgement = table.judge(packet)
    hints = [
        (decision.direction, tuple(_hints(table, packet, decision)))
        for decision in (judgement.egress, judgement.ingress)
    ]
    return Explanation(judgement, tuple(hints))


def _hints(table: PolicyTable, packet: Packet, decision: Decision) -> Iterator[str]:
    if decision.why is Why.RULE and decision.verdict is not Verdict.ALLOW:
        yield f"{decision.policy} would have to lose {decision.field}, or be preceded by an Accept"
    elif decision.why is Why.ISOLATED:
        yield from _near_misses(table, packet, decision)
    elif decision.why is Why.RULE:
        others = [ref for ref in decision.isolating if ref != decision.policy]
        if decision.policy in decision.isolating:
            yield f"without this rule it would be denied, unless {_others(others)} allows it"


def _others(refs: Sequence[object]) -> str:
    return "another rule" if not refs else f"another rule, or {', '.join(map(str, refs))},"


def _near_misses(table: PolicyTable, packet: Packet, decision: Decision) -> Iterator[str]:
    direction = decision.direction
    source = host_of(table, packet.source_pod, packet.source)
    destination = host_of(table, packet.destination_pod, packet.destination)
    egress = direction is Direction.EGRESS
    subject, peer = (source, destination) if egress else (destination, source)
    address = packet.destination if egress else packet.source
    ports = destination.ports
    seen = False
    for policy in table.selecting(subject, direction):
        if policy.tier is not Tier.NAMESPACED:
            continue
        for rule in policy.rules(direction):
            if rule.action is not Action.ACCEPT:
                continue
            by_peer = matching_peer(rule, peer, address) is not None
            by_port = matching_port(rule, packet, ports) is not None
            if by_peer and not by_port:
                listed = ", ".join(map(str, rule.ports or ())) or "nothing that can be enforced"
                yield f"{policy.ref} {rule.field} matches the peer, but its ports are {listed}"
            elif by_port and not by_peer:
                listed = "; ".join(map(describe, rule.peers or ())) or "nobody"
                yield f"{policy.ref} {rule.field} matches the port, but its peers are {listed}"
            seen = seen or by_peer or by_port
    if not seen:
        yield f"no {direction.value} rule of the isolating policies comes near: add one"


def describe(peer: Peer) -> str:
    """A peer in a few words."""
    if isinstance(peer, PodPeer):
        if peer.namespace is not None:
            return f"pods {peer.pods} of namespace {peer.namespace}"
        return f"pods {peer.pods} of namespaces {peer.namespaces}"
    if isinstance(peer, BlockPeer):
        gaps = f" except {', '.join(map(str, peer.excepts))}" if peer.excepts else ""
        return f"{peer.cidr}{gaps}"
    if isinstance(peer, NodePeer):
        return f"nodes {peer.nodes}"
    return f"pods with a port named {peer.name}"
