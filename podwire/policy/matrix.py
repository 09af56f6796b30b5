"""Who reaches whom, and which of it new policies would change: from the evaluator alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from podwire.kube.objects import ClusterNetworkPolicy, NetworkPolicy
from podwire.net import Address, Protocol
from podwire.policy import clusternetworkpolicy, networkpolicy
from podwire.policy.hosts import PodFacts, pod_host
from podwire.policy.judge import Judgement, Packet
from podwire.policy.model import Key, NamedPort, Policy, PolicyRef, PortRange, Verdict
from podwire.policy.table import PolicyTable, subjects_of


class Change(NamedTuple):
    """A connection that would be judged otherwise."""

    source: Key
    destination: Key
    protocol: int
    port: int
    before: Judgement
    after: Judgement


def pods_of(table: PolicyTable, namespaces: Sequence[str] = ()) -> list[PodFacts]:
    """Pods that policies can speak about, in order; of all namespaces unless some are given."""
    return sorted(
        (
            facts
            for facts in table.pods.values()
            if facts.addresses
            and not facts.host_network
            and (not namespaces or facts.key[0] in namespaces)
        ),
        key=lambda facts: facts.key,
    )


def address_of(facts: PodFacts, bits: int) -> Address | None:
    """The pod's address of a family, 32 or 128 bits."""
    return next((one for one in facts.addresses if len(one) * 8 == bits), None)


def reach(
    table: PolicyTable, pods: Sequence[PodFacts], protocol: int, port: int, bits: int = 32
) -> list[list[Verdict | None]]:
    """One row per source, one column per destination; None where there is nothing to judge."""
    rows: list[list[Verdict | None]] = []
    for source in pods:
        row: list[Verdict | None] = []
        for destination in pods:
            from_, to = address_of(source, bits), address_of(destination, bits)
            if from_ is None or to is None or source is destination:
                row.append(None)
            else:
                row.append(table.judge(Packet(from_, to, protocol, port)).verdict)
        rows.append(row)
    return rows


def with_policies(
    table: PolicyTable,
    added: Iterable[NetworkPolicy | ClusterNetworkPolicy],
    removed: Iterable[PolicyRef] = (),
) -> PolicyTable:
    """The table as the evaluator would see it with these policies; not for data paths."""
    policies = dict(table.policies)
    for ref in removed:
        policies.pop(ref, None)
    for source in added:
        if isinstance(source, NetworkPolicy):
            policy = networkpolicy.translate(source)
        else:
            policy = clusternetworkpolicy.translate(source)
        policies[policy.ref] = policy
    return replace(table, policies=policies, subjects=subjects_of(policies.values()))


def changes(
    before: PolicyTable, after: PolicyTable, bits: int = 32
) -> tuple[list[Change], list[tuple[int, int]]]:
    """Pod pairs and ports that the other policies would judge otherwise, and the ports tried.

    Tried are all container ports, the ends of all port ranges in the policies that differ, and
    TCP and UDP port 1, which stand for any other.
    """
    differing = [
        policy
        for policies, others in (
            (before.policies, after.policies),
            (after.policies, before.policies),
        )
        for ref, policy in policies.items()
        if others.get(ref) is not policy
    ]
    pods = pods_of(before)
    points = _points(differing, pods)
    concerned = [pod for pod in pods if _selected(before, pod, differing)]
    keys = {pod.key for pod in concerned}
    pairs = [(a, b) for a in concerned for b in pods if a is not b]
    pairs += [(b, a) for a in concerned for b in pods if b.key not in keys]
    out: list[Change] = []
    for source, destination in pairs:
        from_, to = address_of(source, bits), address_of(destination, bits)
        if from_ is None or to is None:
            continue
        for protocol, port in points:
            packet = Packet(from_, to, protocol, port)
            was, would = before.judge(packet), after.judge(packet)
            if was.verdict is not would.verdict:
                out.append(Change(source.key, destination.key, protocol, port, was, would))
    return out, points


def _points(policies: Iterable[Policy], pods: Iterable[PodFacts]) -> list[tuple[int, int]]:
    points = {(int(Protocol.TCP), 1), (int(Protocol.UDP), 1)}
    for pod in pods:
        points.update((port.protocol, port.number) for port in pod.ports)
    for policy in policies:
        for rule in (*policy.ingress, *policy.egress):
            for port in rule.ports or ():
                if isinstance(port, PortRange):
                    points.update((port.protocol, max(end, 1)) for end in (port.first, port.last))
                else:
                    assert isinstance(port, NamedPort)
    return sorted(points)


def _selected(table: PolicyTable, facts: PodFacts, policies: Iterable[Policy]) -> bool:
    pod = pod_host(facts, table.namespaces)
    return any(
        policy.subject.matches(pod.namespace, pod.labels, pod.namespace_labels)
        for policy in policies
    )
