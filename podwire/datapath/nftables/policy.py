"""A PolicyTable in nftables: elements of maps, one transaction per table, nothing listed.

The rules are in `policy_rules`. Every change of a table, additions and deletions, is one
transaction: a packet meets the old policies or the new ones. Established connections are kept.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, TypeAlias

from podwire.datapath import Requirement
from podwire.datapath.counts import PolicyCount
from podwire.datapath.nftables import policy_rules as rules
from podwire.datapath.nftables.fixed import FixedTable
from podwire.errors import KernelError
from podwire.kernel.nftables import (
    BRIDGE,
    INET,
    RETURN,
    Data,
    Element,
    NfTables,
    Set,
    Transaction,
    concat,
    goto,
)
from podwire.policy import Direction, PolicyRef, PolicyTable, Verdict
from podwire.policy.rulesets import RuleSet
from podwire.policy.verdicts import Outcome, Verdicts

BRIDGE_REQUIREMENTS = tuple(
    Requirement(
        f"net.bridge.bridge-nf-call-{family}tables",
        "1",
        "without it policies between pods of one node are bypassed in silence",
        module="br_netfilter",
    )
    for family in ("ip", "ip6")
)

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


class PolicyPart:
    """Policies of one network namespace. `bridge`: the pods' bridge, if they are on one."""

    def __init__(self, netns_fd: int | None = None, bridge: str | None = None) -> None:
        self.requirements: Sequence[Requirement] = BRIDGE_REQUIREMENTS if bridge else ()
        self._bridge = bridge
        self._nft = NfTables(netns_fd)
        self._guard = FixedTable(self._nft, BRIDGE, rules.TABLE, rules.BRIDGE_SCRIPT)
        self._made: list[tuple[str, bytes]] = []
        self._held: Wanted = {}
        self._table: PolicyTable | None = None
        self._codes: dict[Reason, int] = {}
        self._reasons: dict[int, Reason] = {}
        self._next_code = 1
        self._cases: dict[int, Cases] = {}  # by rule set
        self._next_case = 1
        self._generation = _UNKNOWN  # of all of nf_tables, when it last held what we think

    def close(self) -> None:
        self._nft.close()

    # --- Part ---

    def start(self) -> None:
        """Make the rules, or adopt an earlier process's: its elements hold until `apply`."""
        self._make()
        self._held = self._read()

    def apply(self, table: PolicyTable) -> None:
        """Make the kernel hold `table`, in one transaction."""
        if table is self._table:
            return
        old, self._table = self._table, None  # should this fail, nothing is taken for granted
        try:
            if old is None:
                self._replace(self._everything(table))
            else:
                self._change(self._difference(old, table))
        except KernelError:  # somebody changed our tables
            self._make()
            self._held = self._read()
            self._replace(self._everything(table))
        self._table = table
        self._forget_codes(table)

    def flush(self) -> None:
        """Nothing waits: a policy that waits is a hole."""

    def verify(self) -> list[str]:
        """Repair what somebody changed in our tables, and say so."""
        repairs: list[str] = []
        if self._table is None or self._nft.generation() == self._generation:
            return repairs
        generation = self._nft.generation()
        if not self._intact():
            self._make()
            repairs.append(f"made the rules of table {rules.TABLE} again")
        held, expected = self._read(), self._everything(self._table)
        for target in self._sets:
            if held[target] != expected.get(target, {}):
                repairs.append(f"restored the set {rules.TABLE} {target.name}")
        self._held = held
        self._replace(expected)
        if not repairs:
            self._generation = generation
        return repairs

    def cleanup(self) -> None:
        """Remove our tables."""
        table = f"table inet {rules.TABLE}"
        self._nft.run(f"add {table}\ndelete {table}\n")
        self._guard.remove()
        self._table, self._held = None, {}

    def status(self) -> dict[str, object]:
        return {
            "revision": self._table.revision if self._table else 0,
            **{target.name: len(self._held.get(target, ())) for target in rules.INET_SETS},
        }

    def counts(self) -> list[PolicyCount]:
        """How often each reason decided since its rule set came, most packets first."""
        counters = self._nft.element_counters(rules.VERDICTS)
        out: list[PolicyCount] = []
        for reason, code in self._codes.items():
            packets, _ = counters.get(_number(code), (0, 0))
            out.append(PolicyCount(*reason[:2], self._policies(reason), packets))
        return sorted(out, key=lambda count: -count.packets)

    def _policies(self, reason: Reason) -> tuple[PolicyRef, ...]:
        if reason.policy is not None:
            return (reason.policy,)
        rule_set = self._table.rule_sets.get(reason.rule_set or 0) if self._table else None
        return rule_set.isolating if rule_set else ()

    # --- structure ---

    @property
    def _sets(self) -> tuple[Set, ...]:
        return (*rules.INET_SETS, *(rules.BRIDGE_SETS if self._bridge else ()))

    def _make(self) -> None:
        """The judging chains are made before what leads to them: closed stays closed."""
        try:
            self._nft.run(rules.STRUCTURE)
        except KernelError:  # another version's sets: nothing of them can be kept
            self._nft.run(f"delete table inet {rules.TABLE}\n{rules.STRUCTURE}")
        if not self._intact():
            self._nft.replace_rules(INET, rules.TABLE, rules.judging_chains())
            self._nft.run(rules.BASE)
            self._made = self._nft.rules(INET, rules.TABLE)
        if self._bridge:
            self._guard.make()

    def _intact(self) -> bool:
        if not self._made or self._nft.rules(INET, rules.TABLE) != self._made:
            return False
        return self._bridge is None or self._guard.intact()

    def _read(self) -> Wanted:
        return {
            target: {
                (element.key, element.end, element.flags): element.data
                for element in self._nft.elements(target)
            }
            for target in self._sets
        }

    # --- tables → elements ---

    def _everything(self, table: PolicyTable) -> Wanted:
        wanted: Wanted = {target: {} for target in self._sets}
        for pod in table.endpoints:
            _merge(wanted, self._endpoint(table, pod))
        for address, identity in table.addresses.items():
            wanted[rules.PEERS[len(address)]][address, None, 0] = _number(identity)
        _merge(wanted, _intervals(table))
        held, self._cases = self._cases, {}
        codes: set[bytes] = set()
        for rule_set in table.rule_sets.values():
            pairs = {0: rule_set.default, **rule_set.entries}
            cases = self._number_cases(held.get(rule_set.number, {}), pairs.values())
            self._cases[rule_set.number] = cases
            head = _number(rule_set.number)
            numbered = wanted[rules.CASES]
            for identity, verdicts in pairs.items():
                numbered[head + _number(identity), None, 0] = cases[id(verdicts)][1]
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

    def _difference(self, old: PolicyTable, new: PolicyTable) -> Changes:
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
                have(target, key, _number(identity))
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
                code = (data, None, 0)
                if target is not rules.CASES and code not in self._held[rules.VERDICTS]:
                    have(rules.VERDICTS, code, _VERDICTS[self._reasons[_value(data)].verdict])
        return changes

    def _rule_set(self, old: RuleSet | None, new: RuleSet | None) -> tuple[Elements, Elements]:
        """Elements of a rule set that changed, before and after."""
        before: Elements = {}
        after: Elements = {}
        were = {0: old.default, **old.entries} if old else {}
        are = {0: new.default, **new.entries} if new else {}
        number = (old or new).number  # type: ignore[union-attr]
        head = _number(number)
        held = self._cases.pop(number, {})
        cases = self._number_cases(held, are.values())
        for identity in were.keys() - are.keys():
            before[rules.CASES, (head + _number(identity), None, 0)] = b""
        for identity, verdicts in are.items():
            if were.get(identity) is not verdicts:
                key = (head + _number(identity), None, 0)
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
                cases[mark] = (verdicts, _number(self._next_case))
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
        code = self._codes.get(reason)
        if code is None:
            code = self._codes[reason] = self._next_code
            self._reasons[code] = reason
            self._next_code += 1
        return _number(code)

    def _forget_codes(self, table: PolicyTable) -> None:
        """Codes of policies and rule sets that are gone; nothing in the kernel uses them."""
        gone = [
            reason
            for reason in self._codes
            if (reason.policy is not None and reason.policy not in table.policies)
            or (reason.rule_set is not None and reason.rule_set not in table.rule_sets)
        ]
        changes: dict[ElementKey, Data | Gone] = {}
        for reason in gone:
            code = self._codes.pop(reason)
            del self._reasons[code]
            changes[_number(code), None, 0] = GONE
        self._change({rules.VERDICTS: changes})

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
                    out.setdefault(sets[len(address)], {})[address, None, 0] = _number(number)
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

    # --- elements → kernel ---

    def _replace(self, wanted: Wanted) -> None:
        """Make the sets hold exactly this."""
        changes: Changes = {}
        for target in self._sets:
            held = self._held.get(target, {})
            some: dict[ElementKey, Data | Gone] = dict.fromkeys(held, GONE)
            some.update(wanted.get(target, {}))
            changes[target] = some
        self._change(changes)

    def _change(self, changes: Mapping[Set, Mapping[ElementKey, Data | Gone]]) -> None:
        """One transaction: all that goes first, so that ranges may give way to others."""
        transaction = Transaction()
        added: dict[Set, list[Element]] = {}
        for target, some in changes.items():
            held = self._held[target]
            gone: list[Element] = []
            for (key, end, flags), data in some.items():
                place = (key, end, flags)
                if place in held and (data is GONE or held[place] != data):
                    gone.append(Element(key, None, end, 0, flags))
                if data is not GONE and (place not in held or held[place] != data):
                    added.setdefault(target, []).append(Element(key, data, end, 0, flags))
            transaction.delete(target, gone)
        for target, elements in added.items():
            transaction.add(target, elements)
        if not transaction:
            return
        before = self._nft.generation()
        self._nft.commit(transaction)
        alone = before == self._generation and self._nft.generation() == before + 1
        self._generation = before + 1 if alone else _UNKNOWN
        for change in transaction.changes:
            held = self._held[change.set]
            for element in change.elements:
                place = (element.key, element.end, element.flags)
                if change.verb == "delete":
                    del held[place]
                else:
                    held[place] = element.data


_UNKNOWN = -1

_VERDICTS = {Verdict.ALLOW: RETURN, Verdict.DENY: goto("denied"), Verdict.AUDIT: goto("audited")}


def _number(value: int) -> bytes:
    """As a mark in the kernel's registers: host order."""
    return struct.pack("=I", value)


def _value(data: bytes) -> int:
    return struct.unpack("=I", data)[0]


def _ifname(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


def _intervals(table: PolicyTable) -> Wanted:
    out: Wanted = {}
    for first, last, identity in table.intervals:
        elements = out.setdefault(rules.BLOCKS[len(first)], {})
        elements[bytes(4) + first, bytes(4) + last, 0] = _number(identity)
    return out


def _merge(into: Wanted, some: Mapping[Set, Mapping[ElementKey, Data]]) -> None:
    for target, elements in some.items():
        into[target].update(elements)
