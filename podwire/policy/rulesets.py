"""Rule sets: what one set of policies says, in one direction, about every identity.

Pods that the same policies select share a rule set. Its number is what a data path keys on; when
all pods of a rule set move on to another set of policies, the number moves with them, so that the
kernel sees the difference and not a new set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from podwire.policy.identities import PeerIndex
from podwire.policy.model import (
    Action,
    ContainerPort,
    Direction,
    NamedPort,
    NamedPortPeer,
    Peer,
    Policy,
    PolicyRef,
    Tier,
)
from podwire.policy.verdicts import DEFAULT_DENY, RuleUse, Verdicts, audited, paint

RuleSetKey: TypeAlias = tuple[Direction, tuple[PolicyRef, ...], tuple[ContainerPort, ...]]

CLOSED = 1
"""The number of the rule set of pods that nothing is known about: all is denied."""


@dataclass(frozen=True, slots=True, eq=False)
class RuleSet:
    """Outcomes by identity. `entries` has the identities that differ from `default`.

    `isolating` are the policies by which what no rule allows is denied.
    """

    number: int
    direction: Direction
    policies: tuple[PolicyRef, ...]
    isolating: tuple[PolicyRef, ...]
    default: Verdicts
    entries: Mapping[int, Verdicts]

    def verdicts(self, identity: int | None) -> Verdicts:
        """For an identity; None for addresses that have none."""
        if identity is None:
            return self.default
        return self.entries.get(identity, self.default)


CLOSED_RULE_SET = RuleSet(CLOSED, Direction.INGRESS, (), (), Verdicts(DEFAULT_DENY), {})


class Group:
    """A rule set in the making: changed in place, handed out as snapshots."""

    def __init__(self, key: RuleSetKey, number: int) -> None:
        self.key = key
        self.number = number
        self.users = 0
        self.direction, _, self.ports = key
        self.entries: dict[int, Verdicts] = {}
        self.by_peer: dict[Peer, list[RuleUse]] = {}
        self._any: list[RuleUse] = []
        self._policies: Sequence[Policy] = ()
        self._default = Verdicts(DEFAULT_DENY)
        self._memo: dict[object, Verdicts] = {}
        self._same: dict[Verdicts, Verdicts] = {}
        self._snapshot: RuleSet | None = None

    def set_policies(self, policies: Sequence[Policy]) -> tuple[set[Peer], set[Peer]]:
        """Take over the policies; returns the peers that are used now and those that were."""
        before = set(self.by_peer)
        self._policies = policies
        self._memo.clear()
        self._same = {verdicts: verdicts for verdicts in (*self.entries.values(), self._default)}
        self.by_peer = {}
        self._any = []
        for policy in policies:
            for rule in policy.rules(self.direction):
                self._index(RuleUse(policy, rule))
        return set(self.by_peer), before

    def _index(self, use: RuleUse) -> None:
        rule = use.rule
        if rule.peers is not None:
            for peer in set(rule.peers):
                self.by_peer.setdefault(peer, []).append(use)
            return
        self._any.append(use)
        if self.direction is Direction.EGRESS and rule.has_named_ports:
            # The numbers differ by destination: those that have the name are identities apart.
            for port in rule.ports or ():
                if isinstance(port, NamedPort):
                    peer = NamedPortPeer(port.name)
                    self.by_peer.setdefault(peer, []).append(use)

    def compute(self, index: PeerIndex) -> None:
        """All entries anew."""
        self._snapshot = None
        self._default = self._paint((), ())
        uses: dict[int, list[RuleUse]] = {}
        for peer, of_peer in self.by_peer.items():
            for number in index.members[peer]:
                uses.setdefault(number, []).extend(of_peer)
        entries: dict[int, Verdicts] = {}
        for number, some in uses.items():
            verdicts = self._paint(some, index.identities[number].ports)
            if verdicts != self._default:
                entries[number] = verdicts
        self.entries = entries

    def touch(self, number: int, index: PeerIndex) -> bool:
        """One identity's entry anew; True if it changed."""
        some: list[RuleUse] = []
        identity = index.identities.get(number)
        if identity is not None:
            for peer in index.matched[number]:
                some += self.by_peer.get(peer, ())
        verdicts = self._paint(some, identity.ports if identity else ()) if some else self._default
        if verdicts == self.entries.get(number, self._default):
            return False
        if self._snapshot is not None:
            self._snapshot = None
            self.entries = dict(self.entries)
        if verdicts == self._default:
            del self.entries[number]
        else:
            self.entries[number] = verdicts
        return True

    def _paint(self, some: Iterable[RuleUse], peer_ports: tuple[ContainerPort, ...]) -> Verdicts:
        uses = {id(use.rule): use for use in (*self._any, *some)}
        ports = self.ports
        if self.direction is Direction.EGRESS:
            named = any(use.rule.has_named_ports for use in uses.values())
            ports = peer_ports if named else ()
        memo = (frozenset(uses), ports)
        found = self._memo.get(memo)
        if found is None:
            found = self._painted(sorted(uses.values(), key=use_order), ports)
            # Equal verdicts are one object, for data paths that number them.
            found = self._memo[memo] = self._same.setdefault(found, found)
        return found

    def _painted(self, uses: list[RuleUse], ports: tuple[ContainerPort, ...]) -> Verdicts:
        isolated = any(self.direction in p.isolates for p in self._policies)
        everything = paint(uses, isolated, ports)
        if not any(policy.audit for policy in self._policies):
            return everything
        enforced = paint(
            [use for use in uses if not use.policy.audit],
            any(self.direction in p.isolates for p in self._policies if not p.audit),
            ports,
        )
        return audited(enforced, everything)

    def snapshot(self) -> RuleSet:
        if self._snapshot is None:
            self._snapshot = RuleSet(
                self.number,
                self.direction,
                tuple(policy.ref for policy in self._policies),
                tuple(p.ref for p in self._policies if self.direction in p.isolates),
                self._default,
                self.entries,
            )
        return self._snapshot


def use_order(use: RuleUse) -> tuple[object, ...]:
    """Evaluation order. Among namespaced policies a Deny comes before all that is allowed."""
    policy, rule = use
    deny_first = policy.tier is Tier.NAMESPACED and rule.action is not Action.DENY
    return (policy.tier, deny_first, policy.priority, policy.ref, rule.number)
