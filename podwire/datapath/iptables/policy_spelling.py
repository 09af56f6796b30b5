"""A PolicyTable as chains and sets of one family. Pure; keeps what a change does not concern.

A set is named by what it holds and never changes: another content is another set, and the rules
change over to it in one transaction. So a rule set is judged by the old table or by the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from podwire.datapath.iptables.policy_rules import (
    CHAIN,
    bridge_chain,
    fixed_chains,
    names,
    reason_chain,
)
from podwire.datapath.iptables.ruleset import ChainKey, Wanted, tag
from podwire.kernel.ipset import IpSet, net_elements
from podwire.kernel.iptables import Rules
from podwire.net import Prefix, Protocol, format_address, range_to_prefixes
from podwire.policy import Direction, PolicyRef, PolicyTable, Verdict
from podwire.policy.identities import Interval
from podwire.policy.rulesets import RuleSet
from podwire.policy.verdicts import Outcome, Verdicts
from podwire.services import Family

_PROTOCOLS = {
    Protocol.TCP: "tcp",
    Protocol.UDP: "udp",
    Protocol.SCTP: "sctp",
    Protocol.ICMP: "icmp",
    Protocol.ICMPV6: "ipv6-icmp",
}
_WITH_PORTS = (Protocol.TCP, Protocol.UDP, Protocol.SCTP)


class Reason(NamedTuple):
    """Why a packet is denied or audited: a policy's rule, or a rule set's default."""

    verdict: Verdict
    direction: Direction
    policy: PolicyRef | None
    isolating: tuple[PolicyRef, ...]

    @property
    def chain(self) -> str:
        letter = "D" if self.verdict is Verdict.DENY else "A"
        return f"{CHAIN}{letter}{tag(repr(self))}"


class _RuleSetSpelling(NamedTuple):
    chains: Mapping[str, Rules]
    sets: Mapping[str, tuple[IpSet, frozenset[str]]]
    reasons: frozenset[Reason]
    identities: frozenset[int]
    """Whose addresses the sets hold."""


class FamilyPolicies:
    """`wanted` follows the tables; what it holds between calls belongs to the last one."""

    def __init__(self, family: Family, bridge: str) -> None:
        self._family: Family = family
        self._size = 4 if family == 4 else 16
        self._bridge = bridge
        self._table: PolicyTable | None = None
        self._members: dict[int, set[str]] = {}
        self._blocks: dict[int, set[str]] = {}
        self._spelled: dict[int, _RuleSetSpelling] = {}

    def wanted(self, table: PolicyTable) -> Wanted:
        """All that the kernel should hold of `table`."""
        for number in self._stale(table):
            rule_set = table.rule_sets.get(number)
            if rule_set is None:
                self._spelled.pop(number, None)
            else:
                self._spelled[number] = self._rule_set(rule_set, table)
        self._table = table
        chains = {**fixed_chains(self._family, self._bridge, self._links(table))}
        chains |= self._dispatch(table)
        if self._bridge:
            chains[f"{CHAIN}BRIDGE"] = bridge_chain(self._family, table.endpoints.values())
        sets: dict[str, IpSet] = {}
        elements: dict[str, frozenset[str]] = {}
        for spelled in self._spelled.values():
            chains |= spelled.chains
            for name, (each, content) in spelled.sets.items():
                sets[name], elements[name] = each, content
        keyed: dict[ChainKey, Rules] = {("mangle", name): tuple(r) for name, r in chains.items()}
        return Wanted(keyed, sets, elements)

    @property
    def reasons(self) -> frozenset[Reason]:
        """Those that have a chain."""
        return frozenset[Reason]().union(*(each.reasons for each in self._spelled.values()))

    def _stale(self, table: PolicyTable) -> set[int]:
        """Rule sets to be spelled anew; brings members and blocks up to date."""
        old = self._table
        delta = table.delta(old)
        touched: set[int] = set()
        for address in delta.addresses:
            if len(address) != self._size:
                continue
            was = old.addresses.get(address) if old else None
            now = table.addresses.get(address)
            text = format_address(address)
            if was is not None:
                self._members[was].discard(text)
                touched.add(was)
            if now is not None:
                self._members.setdefault(now, set()).add(text)
                touched.add(now)
        if delta.intervals:
            touched |= self._blocks.keys()
            self._blocks = {}
            for interval in table.intervals:
                if len(interval.first) == self._size:
                    self._blocks.setdefault(interval.identity, set()).update(_cidrs(interval))
            touched |= self._blocks.keys()
        stale = set(delta.rule_sets)
        for number, spelled in self._spelled.items():
            if not spelled.identities.isdisjoint(touched):
                stale.add(number)
        for number in touched:
            if not self._members.get(number, True):
                del self._members[number]
        # A host in a block that no rule names has to be told from the block.
        news = {n for n in touched if n in table.identities and table.identities[n].blocks}
        if news:
            stale |= {number for number, each in self._spelled.items() if _has_blocks(each)}
        return stale

    def _links(self, table: PolicyTable) -> Iterable[str]:
        return (endpoint.link for endpoint in table.endpoints.values())

    def _dispatch(self, table: PolicyTable) -> dict[str, Rules]:
        """From pods and to pods of this node: which rule set judges."""
        lists: dict[str, list[str]] = {"FROM": [], "TO": []}
        for endpoint in sorted(table.endpoints.values()):
            for address in endpoint.addresses:
                if len(address) != self._size:
                    continue
                host = f"{format_address(address)}/{self._size * 8}"
                if endpoint.egress is not None:
                    lists["FROM"].append(f"-s {host} -g {CHAIN}R{endpoint.egress}")
                if endpoint.ingress is not None:
                    lists["TO"].append(f"-d {host} -g {CHAIN}R{endpoint.ingress}")
        return {CHAIN + name: rules for name, rules in lists.items()}

    # --- rule sets --------------------------------------------------------------------------------

    def _rule_set(self, rule_set: RuleSet, table: PolicyTable) -> _RuleSetSpelling:
        """Hosts of the cluster first, then what the blocks around addresses say, then default."""
        groups: dict[Verdicts, list[int]] = {}
        for identity, verdicts in rule_set.entries.items():
            groups.setdefault(verdicts, []).append(identity)
        hosts: list[tuple[frozenset[str], Verdicts]] = []
        blocks: list[tuple[frozenset[str], Verdicts]] = []
        for verdicts, identities in groups.items():
            hosts.append((_union(self._members, identities), verdicts))
            blocks.append((_union(self._blocks, identities), verdicts))
        identities = set(rule_set.entries)
        if any(addresses for addresses, _ in blocks):
            others = {
                number
                for number, identity in table.identities.items()
                if identity.blocks and number not in identities
            }
            hosts.append((_union(self._members, others), rule_set.default))
            identities |= others
        out = _Writer(self._family, rule_set)
        for addresses, verdicts in hosts:
            out.group("hash:ip", addresses, verdicts)
        for addresses, verdicts in blocks:
            out.group("hash:net", addresses, verdicts)
        out.default(rule_set.default)
        return _RuleSetSpelling(out.chains, out.sets, frozenset(out.reasons), frozenset(identities))


def _has_blocks(spelled: _RuleSetSpelling) -> bool:
    return any(each.type == "hash:net" for each, _ in spelled.sets.values())


class _Writer:
    """One rule set's chains and sets."""

    def __init__(self, family: Family, rule_set: RuleSet) -> None:
        self.chains: dict[str, Rules] = {}
        self.sets: dict[str, tuple[IpSet, frozenset[str]]] = {}
        self.reasons: set[Reason] = set()
        self._family: Family = family
        self._rule_set = rule_set
        self._peer = "src" if rule_set.direction is Direction.INGRESS else "dst"
        self._rules: list[str] = []

    def group(self, kind: str, addresses: frozenset[str], verdicts: Verdicts) -> None:
        """What holds for peers with these addresses."""
        if not addresses:
            return
        name = names(self._family).sets + tag(f"{kind} {' '.join(sorted(addresses))}")
        self.sets[name] = (IpSet(name, kind, self._family), addresses)
        match = f"-m set --match-set {name} {self._peer}"
        self._rules.append(f"{match} -g {self._verdicts(verdicts)}")

    def default(self, verdicts: Verdicts) -> None:
        """What holds for all others; completes the rule set's chain."""
        # In an order that follows from the rules: sets are disjoint, but for blocks after hosts.
        self.chains[f"{CHAIN}R{self._rule_set.number}"] = [
            *self._rules,
            f"-g {self._verdicts(verdicts)}",
        ]

    def _verdicts(self, verdicts: Verdicts) -> str:
        rules = list(self._outcomes(verdicts))
        name = f"{CHAIN}V{tag(chr(10).join(rules))}"
        self.chains[name] = rules
        return name

    def _outcomes(self, verdicts: Verdicts) -> Iterator[str]:
        for number, spans in verdicts.protocols:
            protocol = _PROTOCOLS.get(Protocol(number), str(number))
            extent: dict[Outcome, int] = {}
            for first, last, outcome in spans:
                extent[outcome] = extent.get(outcome, 0) + last - first
            base = max(extent, key=lambda outcome: extent[outcome])
            for first, last, outcome in spans:
                if outcome != base and number in _WITH_PORTS:
                    ports = str(first) if first == last else f"{first}:{last}"
                    match = f"-p {protocol} -m {protocol} --dport {ports}"
                    yield f"{match} {self._outcome(outcome)}"
            yield f"-p {protocol} {self._outcome(base)}"
        yield self._outcome(verdicts.other)

    def _outcome(self, outcome: Outcome) -> str:
        verdict, policy = outcome
        if verdict is Verdict.ALLOW:
            return "-j RETURN"
        rule_set = self._rule_set
        default = () if policy is not None else rule_set.isolating
        reason = Reason(verdict, rule_set.direction, policy, default)
        self.reasons.add(reason)
        self.chains[reason.chain] = reason_chain(verdict)
        return f"-g {reason.chain}"


def _union(members: Mapping[int, set[str]], identities: Iterable[int]) -> frozenset[str]:
    nothing: set[str] = set()
    return frozenset(nothing.union(*(members.get(number, nothing) for number in identities)))


def _cidrs(interval: Interval) -> Iterator[str]:
    bits = len(interval.first) * 8
    first, last = (int.from_bytes(edge, "big") for edge in (interval.first, interval.last))
    for value, length in range_to_prefixes(first, last, bits):
        yield from net_elements(Prefix(value.to_bytes(bits // 8, "big"), length))
