"""Policies that do not do what somebody probably meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from podwire.policy.hosts import pod_host
from podwire.policy.model import (
    BlockPeer,
    Direction,
    Host,
    NamedPort,
    NodePeer,
    Peer,
    PodPeer,
    Policy,
    PolicyRef,
    Rule,
    peer_matches,
)
from podwire.policy.table import PolicyTable


class Finding(NamedTuple):
    """`field` is the path inside the policy."""

    policy: PolicyRef
    field: str
    message: str


def lint(table: PolicyTable) -> list[Finding]:
    """Everything worth telling, by policy; what `problems` has is in it."""
    pods = [
        pod_host(facts, table.namespaces) for facts in table.pods.values() if not facts.host_network
    ]
    out: list[Finding] = []
    for policy in sorted(table.policies.values(), key=lambda policy: policy.ref):
        out += [Finding(policy.ref, field, message) for field, message in policy.problems]
        out += _subject(policy, pods)
        for direction in Direction:
            for rule in policy.rules(direction):
                out += _rule(table, policy, direction, rule, pods)
    return out


def _subject(policy: Policy, pods: list[Host]) -> Iterator[Finding]:
    subject = policy.subject
    if not any(subject.matches(pod.namespace, pod.labels, pod.namespace_labels) for pod in pods):
        yield Finding(policy.ref, "spec", "selects no pod")
    elif not policy.isolates and not policy.ingress and not policy.egress:
        yield Finding(policy.ref, "spec", "has neither rules nor a direction that it isolates")


def _rule(
    table: PolicyTable, policy: Policy, direction: Direction, rule: Rule, pods: list[Host]
) -> Iterator[Finding]:
    where = policy.ref
    if rule.peers is not None and not rule.peers:
        yield Finding(where, rule.field, "no peer of it can be enforced: it matches nobody")
    if rule.ports is not None and not rule.ports:
        yield Finding(where, rule.field, "no port of it can be enforced: it matches nothing")
    for peer, field in zip(rule.peers or (), rule.peer_fields, strict=True):
        message = _peer(table, peer, pods)
        if message:
            yield Finding(where, field, message)
    names = {port.name for pod in pods for port in pod.ports}
    for port, field in zip(rule.ports or (), rule.port_fields, strict=True):
        if isinstance(port, NamedPort) and port.name not in names:
            yield Finding(where, f"{field}.port", f"no pod has a port named {port.name!r}")
    yield from _excepts(policy, direction, rule)


def _peer(table: PolicyTable, peer: Peer, pods: list[Host]) -> str:
    if isinstance(peer, PodPeer) and not any(peer_matches(peer, pod, b"") for pod in pods):
        return "matches no pod"
    if isinstance(peer, NodePeer) and not any(
        peer.nodes.matches(labels) for labels, _ in table.nodes.values()
    ):
        return "matches no node"
    if isinstance(peer, BlockPeer) and any(gap.covers(peer.cidr) for gap in peer.excepts):
        return "except leaves nothing of the block"
    return ""


def _excepts(policy: Policy, direction: Direction, rule: Rule) -> Iterator[Finding]:
    """`except` narrows its own block only; another peer may still let the addresses in."""
    for peer, field in zip(rule.peers or (), rule.peer_fields, strict=True):
        if not isinstance(peer, BlockPeer):
            continue
        for gap in peer.excepts:
            for other in policy.rules(direction):
                again = other.peers is None or any(
                    isinstance(one, BlockPeer)
                    and one is not peer
                    and (one.cidr.covers(gap) or gap.covers(one.cidr))
                    and gap not in one.excepts
                    for one in other.peers
                )
                if again:
                    yield Finding(
                        policy.ref,
                        f"{field}.ipBlock.except",
                        f"{gap} is no deny: {other.field} allows addresses of it again",
                    )
                    break
