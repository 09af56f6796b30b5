"""Objects and attachments → PolicyTable, at the cost of what changed.

Only policies that select a pod attached to this node are compiled into rule sets; the others are
kept by an index, for the evaluator and for the pods to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from podwire.kube.objects import (
    ClusterNetworkPolicy,
    Namespace,
    NetworkPolicy,
    Node,
    Pod,
    Resource,
)
from podwire.kube.store import Change, ChangeSet
from podwire.policy import clusternetworkpolicy, networkpolicy
from podwire.policy.hosts import (
    Attachment,
    Hosts,
    PodFacts,
    namespace_labels,
    pod_facts,
    pod_host,
)
from podwire.policy.identities import PeerIndex
from podwire.policy.model import Direction, Host, Key, Peer, Policy, PolicyRef
from podwire.policy.rulesets import CLOSED, CLOSED_RULE_SET, Group, RuleSet, RuleSetKey
from podwire.policy.selectors import Labels
from podwire.policy.table import Changed, Endpoint, Home, PolicyTable, selecting

P = TypeVar("P", bound=Resource)
_SYSTEM = "kube-system"
_MANY_POLICIES = 50
"""From here on it is cheaper to look at all attached pods than at each policy's."""


class PolicyCompiler:
    """Feed it change sets and this node's attachments; each `update` returns the new table.

    With `attach_own_pods` it takes the node's pods from their objects instead: for nodes whose pods
    are wired by somebody else. Such a pod is enforced from when its status names its address. With
    `overlay`, nodes are known by their addresses inside the tunnel too.
    """

    def __init__(
        self, node_name: str, *, attach_own_pods: bool = False, overlay: bool = False
    ) -> None:
        self._node_name = node_name
        self._attach_own_pods = attach_own_pods
        self._revision = 0
        self._hosts = Hosts(overlay=overlay)
        self._policies: dict[PolicyRef, Policy] = {}
        self._subjects: dict[Home, tuple[Policy, ...]] = {}
        self._index = PeerIndex(self._peer_touched)
        self._groups: dict[RuleSetKey, Group] = {}
        self._next_number = CLOSED + 1
        self._endpoints: dict[Key, Endpoint] = {}
        self._group_of: dict[tuple[Key, Direction], Group] = {}
        self._peer_groups: dict[Peer, set[Group]] = {}
        self._touched: set[tuple[Group, int]] = set()
        self._rule_sets: dict[int, RuleSet] = {}
        self._dirty: set[Key] = set()
        self._stale: set[PolicyRef] = set()
        self._renamed: set[str] = set()
        self._table: PolicyTable | None = None
        self._cluster = ""
        self._changed = True

    def attach(self, attachment: Attachment) -> None:
        """A pod's link is there (or about to be): its policies matter from the next `update` on."""
        self._hosts.attach(attachment)
        self._dirty.add(attachment.pod)
        self._changed = True

    def detach(self, pod: Key) -> None:
        """The link is gone. An unknown pod is no error."""
        if self._hosts.detach(pod) is not None:
            self._dirty.add(pod)
            self._changed = True

    def update(self, changes: ChangeSet) -> PolicyTable:
        """Take in what changed; the same table again when nothing of it counts.

        The first table has revision 1.
        """
        self._take_namespaces(changes)
        self._take_nodes(changes)
        self._take_pods(changes)
        self._take_policies(changes)
        if self._table is not None and not self._changed:
            return self._table
        self._revision += 1
        changed_addresses = self._hosts.settle()
        regrouped, endpoints = self._regroup()
        for name in self._renamed:
            self._index.namespace_changed(name, self._namespace_labels)
        moved = self._index.assign(changed_addresses, self._hosts.host, self._namespace_labels)
        rule_sets = self._recompute(regrouped)
        self._dirty, self._stale, self._renamed, self._changed = set(), set(), set(), False
        self._table = self._snapshot(
            Changed(
                self._revision - 1,
                frozenset(moved),
                frozenset(endpoints),
                frozenset(rule_sets),
                self._index.take_renumbered(),
            )
        )
        return self._table

    # --- objects ---

    def _take_namespaces(self, changes: ChangeSet) -> None:
        for (_, name), change in changes.of(Namespace).items():
            if name == _SYSTEM and change.new and change.new.metadata.uid != self._cluster:
                self._cluster = change.new.metadata.uid
                self._changed = True
            labels = change.new.metadata.labels if change.new else None
            if change.old and change.new and change.old.metadata.labels == labels:
                continue
            self._hosts.set_namespace(name, labels)
            self._renamed.add(name)
            self._changed = True
        if self._renamed:
            self._dirty.update(key for key in self._hosts.attachments if key[0] in self._renamed)

    def _take_nodes(self, changes: ChangeSet) -> None:
        for (_, name), change in changes.of(Node).items():
            self._changed |= self._hosts.set_node(name, change.new)

    def _take_pods(self, changes: ChangeSet) -> None:
        for key, change in changes.of(Pod).items():
            facts = pod_facts(change.new) if change.new else None
            if facts == self._hosts.pods.get(key):
                continue
            self._hosts.set_pod(key, facts)
            self._changed = True
            if self._attach_own_pods:
                self._attach_own(key, facts)
            if key in self._hosts.attachments:
                self._dirty.add(key)

    def _attach_own(self, key: Key, facts: PodFacts | None) -> None:
        if facts is None or not facts.addresses or facts.host_network:
            self.detach(key)
        elif facts.node == self._node_name:
            self.attach(Attachment(key, "", facts.addresses, facts.uid))

    def _take_policies(self, changes: ChangeSet) -> None:
        steps = [
            *_steps(changes.of(NetworkPolicy), "NetworkPolicy", networkpolicy.translate),
            *_steps(
                changes.of(ClusterNetworkPolicy),
                "ClusterNetworkPolicy",
                clusternetworkpolicy.translate,
            ),
        ]
        if not steps:
            return
        self._changed = True
        self._policies = dict(self._policies)
        self._subjects = dict(self._subjects)
        if len(steps) > _MANY_POLICIES:
            self._dirty.update(self._hosts.attachments)
        subjects: dict[Home, list[Policy]] = {}
        for ref, new in steps:
            old = self._policies.pop(ref, None)
            if old is not None:
                for home in old.subject.homes():
                    self._subjects_at(subjects, home).remove(old)
            if new is not None:
                self._policies[ref] = new
                for home in new.subject.homes():
                    self._subjects_at(subjects, home).append(new)
            self._stale.add(ref)
            if len(steps) <= _MANY_POLICIES:
                self._mark_selected(old, new)
        for home, policies in subjects.items():
            if policies:
                self._subjects[home] = tuple(policies)
            else:
                self._subjects.pop(home, None)

    def _subjects_at(self, subjects: dict[Home, list[Policy]], home: Home) -> list[Policy]:
        found = subjects.get(home)
        if found is None:
            found = subjects[home] = list(self._subjects.get(home, ()))
        return found

    def _mark_selected(self, *policies: Policy | None) -> None:
        for key in self._hosts.attachments:
            host = self._attached_host(key)
            if host is not None and any(
                p is not None
                and p.subject.matches(host.namespace, host.labels, host.namespace_labels)
                for p in policies
            ):
                self._dirty.add(key)

    def _attached_host(self, key: Key) -> Host | None:
        facts = self._hosts.facts(key)
        return pod_host(facts, self._hosts.namespaces) if facts and not facts.finished else None

    def _namespace_labels(self, name: str) -> Labels:
        return namespace_labels(self._hosts.namespaces, name)

    # --- rule sets ---

    def _regroup(self) -> tuple[set[Group], set[Key]]:
        """Find the rule sets of the pods marked; returns the groups to compute and those pods."""
        wanted: dict[tuple[Key, Direction], tuple[RuleSetKey, list[Policy]] | None] = {}
        for pod in self._dirty:
            host = self._attached_host(pod) if pod in self._hosts.attachments else None
            for direction in Direction:
                policies = selecting(self._subjects, host, direction) if host else []
                key = _key(direction, policies, host) if host and policies else None
                wanted[pod, direction] = (key, policies) if key else None
        fresh: dict[RuleSetKey, Group] = {}
        moved_from: dict[RuleSetKey, Group] = {}
        policies_of: dict[Group, list[Policy]] = {}
        for slot, target in wanted.items():
            before = self._group_of.pop(slot, None)
            if before is not None:
                before.users -= 1
            if target is None:
                continue
            key, policies = target
            group = self._groups.get(key)
            if group is None:
                group = self._groups[key] = fresh[key] = Group(key, 0)
            group.users += 1
            self._group_of[slot] = group
            policies_of[group] = policies
            if before is not None:
                moved_from.setdefault(key, before)
        self._number(fresh, moved_from)
        compute = {
            group
            for group in policies_of
            if group.key in fresh or self._stale.intersection(group.key[1])
        }
        self._set_policies(compute, policies_of)
        self._set_endpoints()
        return compute, set(self._dirty)

    def _number(
        self, fresh: Mapping[RuleSetKey, Group], moved_from: Mapping[RuleSetKey, Group]
    ) -> None:
        """New rule sets take over the numbers of those that all pods have left, or get new ones."""
        taken: set[int] = set()
        for key, group in fresh.items():
            before = moved_from.get(key)
            if before is not None and not before.users and before.number not in taken:
                group.number = before.number
                taken.add(before.number)
            else:
                group.number = self._next_number
                self._next_number += 1

    def _set_policies(self, compute: set[Group], policies_of: Mapping[Group, list[Policy]]) -> None:
        """Peers of new rules are used before those of old ones are dropped, see PeerIndex.drop."""
        dropped: list[tuple[Group, set[Peer]]] = []
        for group in compute:
            now, before = group.set_policies(policies_of[group])
            for peer in now - before:
                self._peer_groups.setdefault(peer, set()).add(group)
                self._index.use(peer, self._namespace_labels)
            dropped.append((group, before - now))
        for key in [key for key, group in self._groups.items() if not group.users]:
            group = self._groups.pop(key)
            dropped.append((group, set(group.by_peer)))
        for group, peers in dropped:
            for peer in peers:
                self._peer_groups[peer].discard(group)
                if not self._peer_groups[peer]:
                    del self._peer_groups[peer]
                self._index.drop(peer)

    def _set_endpoints(self) -> None:
        if not self._dirty:
            return
        self._endpoints = dict(self._endpoints)
        for pod in self._dirty:
            attachment = self._hosts.attachments.get(pod)
            if attachment is None:
                self._endpoints.pop(pod, None)
                continue
            known = self._hosts.facts(pod) is not None
            numbers = [
                group.number if (group := self._group_of.get((pod, direction))) else None
                for direction in (Direction.INGRESS, Direction.EGRESS)
            ]
            ingress, egress = numbers if known else (CLOSED, CLOSED)
            self._endpoints[pod] = Endpoint(
                pod, attachment.link, attachment.addresses, ingress, egress
            )

    def _peer_touched(self, peer: Peer, number: int) -> None:
        for group in self._peer_groups.get(peer, ()):
            self._touched.add((group, number))

    def _recompute(self, compute: Iterable[Group]) -> set[int]:
        """Entries of the groups given, and of the identities touched; returns changed numbers."""
        whole = set(compute)
        changed: set[int] = set()
        for group in whole:
            group.compute(self._index)
            changed.add(group.number)
        for group, number in self._touched:
            if group not in whole and group.users and group.touch(number, self._index):
                changed.add(group.number)
        self._touched.clear()
        live = {group.number: group for group in self._groups.values()}
        gone = self._rule_sets.keys() - live.keys()
        if changed or gone:
            self._rule_sets = {number: group.snapshot() for number, group in live.items()}
        return changed | gone

    def _snapshot(self, changed: Changed) -> PolicyTable:
        namespaces, pods, owners = self._hosts.share()
        return PolicyTable(
            self._revision,
            self._node_name,
            self._endpoints,
            {CLOSED: CLOSED_RULE_SET, **self._rule_sets},
            dict(self._index.addresses),
            self._index.intervals,
            dict(self._index.identities),
            self._policies,
            self._subjects,
            namespaces,
            pods,
            owners,
            dict(self._hosts.nodes),
            dict(self._hosts.attachments),
            changed,
            self._cluster,
        )


def _key(direction: Direction, policies: list[Policy], host: Host) -> RuleSetKey:
    """Named ports of ingress rules are the pod's own, so pods share only where these agree."""
    named = direction is Direction.INGRESS and any(
        rule.has_named_ports for policy in policies for rule in policy.ingress
    )
    return (direction, tuple(policy.ref for policy in policies), host.ports if named else ())


def _steps(
    changes: Mapping[Key, Change[P]], kind: str, translate: Callable[[P], Policy]
) -> list[tuple[PolicyRef, Policy | None]]:
    return [
        (PolicyRef(kind, *key), translate(change.new) if change.new else None)
        for key, change in changes.items()
    ]
