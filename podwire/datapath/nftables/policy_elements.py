"""A PolicyTable as elements of the sets and maps in `policy_rules`. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple, TypeAlias

from podwire.datapath.nftables import policy_rules as rules
from podwire.kernel.nftables import RETURN, Data, Set, concat, goto
from podwire.policy import Direction, PolicyRef, PolicyTable, Verdict
from podwire.policy.rulesets import RuleSet
from podwire.policy.verdicts import Outcome, Verdicts

ElementKey: TypeAlias = tuple[bytes, bytes | None, int]
"""Key, last key of a concatenated range, flags: what tells elements of a set apart."""

Wanted: TypeAlias = dict[Set, dict[ElementKey, Data]]
Elements: TypeAlias = dict[tuple[Set, ElementKey], bytes]


Cases: TypeAlias = dict[int, tuple[Verdicts, bytes]]
"""Verdicts that occur in a rule set, by their id(), and the number they have in the kernel."""


class Gone(Enum):
    """In changes: the element is to go."""

    GONE = 0


GONE = Gone.GONE
Changes: TypeAlias = dict[Set, dict[ElementKey, Data | Gone]]


class Reason(NamedTuple):
    """What a code in the kernel stands for: the policy that decides, or a rule set's default."""

    verdict: Verdict
    direction: Direction
    policy: PolicyRef | None
    rule_set: int | None


class PolicyElements:
    """Spells tables, and keeps the numbers it has given out: codes of reasons, cases of verdicts.

    `bridge` is the pods' bridge, if they are on one.
    """

    def __init__(self, bridge: str | None) -> None:
        self._bridge = bridge
        self.codes: dict[Reason, int] = {}
        self._reasons: dict[int, Reason] = {}
        self._next_code = 1
        self._cases: dict[int, Cases] = {}  # by rule set
        self._next_case = 1

    @property
    def sets(self) -> tuple[Set, ...]:
        """All that hold elements."""
        return (*rules.INET_SETS, *(rules.BRIDGE_SETS if self._bridge else ()))

    def everything(self, table: PolicyTable) -> Wanted:
        wanted: Wanted = {target: {} for target in self.sets}
        for pod in table.endpoints:
            _merge(wanted, self._endpoint(table, pod))
        for address, identity in table.addresses.items():
            wanted[rules.PEERS[len(address)]][address, None, 0] = register(identity)
        _merge(wanted, _intervals(table))
        held, self._cases = self._cases, {}
        codes: set[bytes] = set()
        for rule_set in table.rule_sets.values():
            pairs = {0: rule_set.default, **rule_set.entries}
            cases = self._number_cases(held.get(rule_set.number, {}), pairs.values())
            self._cases[rule_set.number] = cases
            head = register(rule_set.number)
            numbered = wanted[rules.CASES]
            for identity, verdicts in pairs.items():
                numbered[head + register(identity), None, 0] = cases[id(verdicts)][1]
            for verdicts, number in cases.values():
                for (target, key), data in self._boxes(rule_set, verdicts, number).items():
                    wanted[target][key] = data
                    codes.add(data)
        for data in codes:
            verdict = self._reasons[_value(data)].verdict
            wanted[rules.VERDICTS][data, None, 0] = _VERDICTS[verdict]
        if self._bridge:
            wanted[rules.LINKS][_ifname(self._bridge), None, 0] = None
        return wanted

    def difference(self, old: PolicyTable, new: PolicyTable) -> Changes:
        """Elements to have (data, or None in sets) and not to have (GONE)."""
        delta = new.delta(old)
        changes: Changes = {}

        def drop(target: Set, key: ElementKey) -> None:
            changes.setdefault(target, {})[key] = GONE

        def have(target: Set, key: ElementKey, data: Data) -> None:
            changes.setdefault(target, {})[key] = data

        for address in delta.addresses:
            identity = new.addresses.get(address)
            target, key = rules.PEERS[len(address)], (address, None, 0)
            if identity is None:
                drop(target, key)
            else:
                have(target, key, register(identity))
        pairs = [(self._endpoint(old, pod), self._endpoint(new, pod)) for pod in delta.endpoints]
        if delta.intervals:
            pairs.append((_intervals(old), _intervals(new)))
        for before, _ in pairs:
            for target, elements in before.items():
                for key in elements:
                    drop(target, key)
        for _, after in pairs:
            for target, elements in after.items():
                for key, data in elements.items():
                    have(target, key, data)
        for number in delta.rule_sets:
            before, after = self._rule_set(old.rule_sets.get(number), new.rule_sets.get(number))
            for target, key in before:
                drop(target, key)
            for (target, key), data in after.items():
                have(target, key, data)
                if target is not rules.CASES:
                    verdict = self._reasons[_value(data)].verdict
                    have(rules.VERDICTS, (data, None, 0), _VERDICTS[verdict])
        return changes

    def _rule_set(self, old: RuleSet | None, new: RuleSet | None) -> tuple[Elements, Elements]:
        """Elements of a rule set that changed, before and after."""
        before: Elements = {}
        after: Elements = {}
        were = {0: old.default, **old.entries} if old else {}
        are = {0: new.default, **new.entries} if new else {}
        number = (old or new).number  # type: ignore[union-attr]
        head = register(number)
        held = self._cases.pop(number, {})
        cases = self._number_cases(held, are.values())
        for identity in were.keys() - are.keys():
            before[rules.CASES, (head + register(identity), None, 0)] = b""
        for identity, verdicts in are.items():
            if were.get(identity) is not verdicts:
                key = (head + register(identity), None, 0)
                after[rules.CASES, key] = cases[id(verdicts)][1]
        for mark, (verdicts, case) in held.items():
            if mark not in cases and old:
                before.update(self._boxes(old, verdicts, case))
        for mark, (verdicts, case) in cases.items():
            if mark not in held and new:
                after.update(self._boxes(new, verdicts, case))
        if cases:
            self._cases[number] = cases
        return before, after

    def _number_cases(self, held: Cases, some: Iterable[Verdicts]) -> Cases:
        """Cases for all of `some`: those held keep their numbers."""
        cases: Cases = {}
        for verdicts in some:
            mark = id(verdicts)
            if mark in cases:
                continue
            if mark in held:
                cases[mark] = held[mark]
            else:
                cases[mark] = (verdicts, register(self._next_case))
                self._next_case += 1
        return cases

    def _boxes(self, rule_set: RuleSet, verdicts: Verdicts, case: bytes) -> Elements:
        """The boxes of one case as elements of the four maps."""
        out: Elements = {}
        out[rules.ANY, (case, None, 0)] = self._code(rule_set, verdicts.other)
        for protocol, spans in verdicts.protocols:
            key = case + concat(bytes([protocol]))
            extent: dict[Outcome, int] = {}
            for first, last, outcome in spans:
                extent[outcome] = extent.get(outcome, 0) + last - first
            base = max(extent, key=lambda outcome: extent[outcome])
            if base != verdicts.other:
                out[rules.PROTOCOLS, (key, None, 0)] = self._code(rule_set, base)
            for first, last, outcome in spans:
                if outcome == base:
                    continue
                low, high = (key + concat(struct.pack(">H", port)) for port in (first, last))
                place = (rules.EXACT, (low, None, 0))
                if first != last:
                    place = (rules.RANGES, (low, high, 0))
                out[place] = self._code(rule_set, outcome)
        return out

    def _code(self, rule_set: RuleSet, outcome: Outcome) -> bytes:
        verdict, policy = outcome
        default = None if policy is not None else rule_set.number
        reason = Reason(verdict, rule_set.direction, policy, default)
        code = self.codes.get(reason)
        if code is None:
            code = self.codes[reason] = self._next_code
            self._reasons[code] = reason
            self._next_code += 1
        return register(code)

    def forget_codes(self, table: PolicyTable) -> Changes:
        """Codes of policies and rule sets that `table` has no more: nothing uses them."""
        gone = [
            reason
            for reason in self.codes
            if (reason.policy is not None and reason.policy not in table.policies)
            or (reason.rule_set is not None and reason.rule_set not in table.rule_sets)
        ]
        changes: dict[ElementKey, Data | Gone] = {}
        for reason in gone:
            code = self.codes.pop(reason)
            del self._reasons[code]
            changes[register(code), None, 0] = GONE
        return {rules.VERDICTS: changes}

    def _endpoint(self, table: PolicyTable, pod: tuple[str, str]) -> Wanted:
        """A pod's rule sets by address, and its place on the bridge."""
        out: Wanted = {}
        endpoint = table.endpoints.get(pod)
        if endpoint is None:
            return out
        for address in endpoint.addresses:
            for sets, number in (
                (rules.EGRESS, endpoint.egress),
                (rules.INGRESS, endpoint.ingress),
            ):
                if number is not None:
                    out.setdefault(sets[len(address)], {})[address, None, 0] = register(number)
        if not endpoint.link:
            return out
        link = _ifname(endpoint.link)
        if not self._bridge:
            out[rules.LINKS] = {(link, None, 0): None}
            return out
        out[rules.PORTS] = {(link, None, 0): None}
        if endpoint.ingress is not None:
            out[rules.CLOSED_PORTS] = {(link, None, 0): None}
        for address in endpoint.addresses:
            members = out.setdefault(rules.MEMBERS[len(address)], {})
            members[concat(link, address), None, 0] = None
        return out


_VERDICTS = {Verdict.ALLOW: RETURN, Verdict.DENY: goto("denied"), Verdict.AUDIT: goto("audited")}


def register(value: int) -> bytes:
    """A number as the kernel's registers hold it: host order."""
    return struct.pack("=I", value)


def _value(data: bytes) -> int:
    return struct.unpack("=I", data)[0]


def _ifname(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


def _intervals(table: PolicyTable) -> Wanted:
    out: Wanted = {}
    for first, last, identity in table.intervals:
        elements = out.setdefault(rules.BLOCKS[len(first)], {})
        elements[bytes(4) + first, bytes(4) + last, 0] = register(identity)
    return out


def _merge(into: Wanted, some: Mapping[Set, Mapping[ElementKey, Data]]) -> None:
    for target, elements in some.items():
        into[target].update(elements)
