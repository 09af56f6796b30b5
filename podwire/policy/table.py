"""The PolicyTable: what must hold, in the words of the field, and its evaluator."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias, TypeVar

from podwire.net import Address
from podwire.policy.hosts import (
    Attachment,
    Owner,
    PodFacts,
    attached_facts,
    namespace_labels,
    pod_host,
)
from podwire.policy.identities import Identity, Interval
from podwire.policy.judge import Judgement, Packet, judge
from podwire.policy.model import (
    WORLD,
    Direction,
    Host,
    Key,
    NamedPort,
    Policy,
    PolicyRef,
    pod_homes,
)
from podwire.policy.rulesets import RuleSet
from podwire.policy.selectors import Labels
from podwire.policy.verdicts import DEFAULT_ALLOW, Outcome

Home: TypeAlias = tuple[str, ...]
K = TypeVar("K")
V = TypeVar("V")


class Endpoint(NamedTuple):
    """A pod of this node at its link. `ingress`, `egress`: rule set numbers, None: all passes."""

    pod: Key
    link: str
    addresses: tuple[Address, ...]
    ingress: int | None
    egress: int | None


class PolicyDelta(NamedTuple):
    """What differs from an older table: keys whose value changed, came or went."""

    addresses: frozenset[Address]
    endpoints: frozenset[Key]
    rule_sets: frozenset[int]
    identities: frozenset[int]
    intervals: bool


class Changed(NamedTuple):
    """What one update changed, kept in the table so that `delta` need not look for it."""

    since: int
    addresses: frozenset[Address]
    endpoints: frozenset[Key]
    rule_sets: frozenset[int]
    identities: frozenset[int]


@dataclass(frozen=True, eq=False)
class PolicyTable:
    """Immutable; shares what did not change with the tables before it.

    For data paths: `endpoints` (by pod), `rule_sets` (by number), `addresses` and `intervals`
    (identity by address: exact ones first, then intervals, which are disjoint).
    For the evaluator: pods, namespaces, owners of addresses, policies by where an index keeps them.
    """

    revision: int
    node_name: str
    endpoints: Mapping[Key, Endpoint]
    rule_sets: Mapping[int, RuleSet]
    addresses: Mapping[Address, int]
    intervals: tuple[Interval, ...]
    identities: Mapping[int, Identity]
    policies: Mapping[PolicyRef, Policy]
    subjects: Mapping[Home, tuple[Policy, ...]]
    namespaces: Mapping[str, Labels]
    pods: Mapping[Key, PodFacts]
    owners: Mapping[Address, Owner]
    nodes: Mapping[str, tuple[Labels, tuple[Address, ...]]]
    attachments: Mapping[Key, Attachment]
    changed: Changed = field(
        default=Changed(-1, frozenset(), frozenset(), frozenset(), frozenset())
    )
    cluster: str = ""
    """The UID of the cluster's kube-system Namespace, which all nodes know alike."""

    def delta(self, old: PolicyTable | None) -> PolicyDelta:
        """What differs from `old`; from the table just before, without looking at the rest."""
        if old is None:
            return PolicyDelta(
                frozenset(self.addresses),
                frozenset(self.endpoints),
                frozenset(self.rule_sets),
                frozenset(self.identities),
                True,
            )
        intervals = old.intervals != self.intervals
        if old.revision == self.changed.since:
            changed = self.changed
            return PolicyDelta(
                changed.addresses,
                changed.endpoints,
                changed.rule_sets,
                changed.identities,
                intervals,
            )
        return PolicyDelta(
            _differing(old.addresses, self.addresses),
            _differing(old.endpoints, self.endpoints),
            _differing(old.rule_sets, self.rule_sets),
            _differing(old.identities, self.identities),
            intervals,
        )

    def judge(self, packet: Packet) -> Judgement:
        """Verdict and reason for the first packet of a connection, both directions."""
        return judge(self, packet)

    def host(self, address: Address) -> Host:
        """Who has the address: a pod or a node with its labels, or nobody of the cluster."""
        owner = self.owners.get(address)
        if owner is None:
            return WORLD
        if owner.kind == "node":
            return Host("node", "", owner.key[1], self.nodes[owner.key[1]][0])
        return self.pod_host(owner.key) or WORLD

    def pod_host(self, key: Key) -> Host | None:
        """None: no such pod, or another one of the same name."""
        facts = attached_facts(self.pods, self.attachments.get(key), key)
        return pod_host(facts, self.namespaces) if facts else None

    def pod_addresses(self, key: Key) -> tuple[Address, ...]:
        """Attached here, the addresses that it was given; otherwise those of its status."""
        attachment = self.attachments.get(key)
        if attachment is not None:
            return attachment.addresses
        facts = self.pods.get(key)
        return facts.addresses if facts else ()

    def node_labels(self, name: str) -> Labels:
        return self.nodes[name][0] if name in self.nodes else {}

    def identity(self, address: Address) -> int | None:
        """As data paths find it: the exact address, otherwise the interval around it."""
        found = self.addresses.get(address)
        if found is not None:
            return found
        keys = [(len(interval.first), interval.first) for interval in self.intervals]
        i = bisect_right(keys, (len(address), address)) - 1
        if i < 0:
            return None
        interval = self.intervals[i]
        inside = len(interval.last) == len(address) and address <= interval.last
        return interval.identity if inside else None

    def outcome(self, rule_set: int | None, peer: Address, protocol: int, port: int) -> Outcome:
        """What a data path does with a packet to or from `peer`, by the compiled rule set."""
        if rule_set is None:
            return DEFAULT_ALLOW
        verdicts = self.rule_sets[rule_set].verdicts(self.identity(peer))
        return verdicts.at(protocol, port)

    def selecting(self, host: Host, direction: Direction) -> list[Policy]:
        """The policies that have something to say about a pod, in evaluation order."""
        return selecting(self.subjects, host, direction)

    def namespace_labels(self, name: str) -> Labels:
        return namespace_labels(self.namespaces, name)

    @cached_property
    def problems(self) -> Mapping[str, str]:
        """By object and field: what is not enforced as written, and why."""
        pods = (facts for facts in self.pods.values() if not facts.finished)
        names = {port.name for facts in pods for port in facts.ports}
        out: dict[str, str] = {}
        for ref, policy in self.policies.items():
            for where, sentence in policy.problems:
                out[f"{ref} {where}"] = sentence
            for rule in (*policy.ingress, *policy.egress):
                for port, where in zip(rule.ports or (), rule.port_fields, strict=True):
                    if isinstance(port, NamedPort) and port.name not in names:
                        out[f"{ref} {where}.port"] = f"no pod has a port named {port.name!r}"
        return out


def subjects_of(policies: Iterable[Policy]) -> dict[Home, tuple[Policy, ...]]:
    """Policies by where an index keeps their subjects."""
    out: dict[Home, tuple[Policy, ...]] = {}
    for policy in policies:
        for home in policy.subject.homes():
            out[home] = (*out.get(home, ()), policy)
    return out


def selecting(
    subjects: Mapping[Home, tuple[Policy, ...]], host: Host, direction: Direction
) -> list[Policy]:
    found = {
        id(policy): policy
        for home in pod_homes(host.namespace, host.labels)
        for policy in subjects.get(home, ())
        if policy.applies(direction)
        and policy.subject.matches(host.namespace, host.labels, host.namespace_labels)
    }
    return sorted(found.values(), key=lambda policy: policy.order)


def _differing(old: Mapping[K, V], new: Mapping[K, V]) -> frozenset[K]:
    changed = [key for key, value in new.items() if old.get(key) is not value]
    return frozenset([*(old.keys() - new.keys()), *changed])
