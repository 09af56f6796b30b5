"""One family's table `podwire-services`: what it holds, and the way to what it should hold.

A change is planned into a transaction, committed by the caller, and only then taken for done: a
refused transaction leaves the picture of the kernel as it was.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from podwire.datapath.nftables.fixed import FixedTable
from podwire.datapath.nftables.services_affinity import AffinityIds
from podwire.datapath.nftables.services_elements import (
    LATE,
    SHARED,
    Spelling,
    affinity_keys,
    element_sets,
    from_element,
    settings_ranges,
    spell,
    target,
    to_element,
)
from podwire.datapath.nftables.services_rules import (
    ID_MASK,
    LIST_MASK,
    TABLE,
    Rule,
    parse_chain,
    ready_made,
    removal_script,
    rules_script,
    structure,
)
from podwire.kernel.nftables import (
    IP,
    IP6,
    Data,
    Element,
    NfTables,
    Transaction,
    interval,
    intervals,
)
from podwire.services import Family, ProxyConfig, ServicePort, ServicePortName, Settings

_UNUSED_RULES = 64
"""So many chains may lie unused before `remove_unused_rules` takes them away."""

Ranges = frozenset[tuple[bytes, bytes]]


_MISSING = object()


@dataclass
class _Plan:
    """What becomes true when the transaction is committed."""

    deletes: dict[str, list[Element]] = field(default_factory=dict[str, list[Element]])
    adds: dict[str, list[Element]] = field(default_factory=dict[str, list[Element]])
    shared: Counter[tuple[str, bytes]] = field(default_factory=Counter[tuple[str, bytes]])
    kept: dict[ServicePortName, _Kept | None] = field(
        default_factory=dict[ServicePortName, "_Kept | None"]
    )
    waiting: Spelling = field(default_factory=dict[str, dict[bytes, Data]])
    ranges: Mapping[str, Ranges] = field(default_factory=dict[str, Ranges])

    def delete(self, name: str, key: bytes) -> None:
        self.deletes.setdefault(name, []).append(to_element(name, key, None))

    def add(self, name: str, key: bytes, data: Data) -> None:
        self.adds.setdefault(name, []).append(to_element(name, key, data))


class _Kept(NamedTuple):
    """A port with affinity as it was spelled: its numbers do not follow from the port alone."""

    port: ServicePort
    spelling: Spelling
    rules: frozenset[Rule]


class FamilyTable:
    """The table of one family. Not thread-safe."""

    def __init__(self, nft: NfTables, family: Family, config: ProxyConfig) -> None:
        self._nft = nft
        self._family: Family = family
        self._config = config
        self._number = IP if family == 4 else IP6
        self._fixed = self._fixed_table([])
        self._rules: set[Rule] = set()
        self._needed: set[Rule] = set()
        self._ids: AffinityIds | None = None
        self._shared: Counter[tuple[str, bytes]] = Counter()
        self._kept: dict[ServicePortName, _Kept] = {}
        self._waiting: Spelling = {}
        self._ranges: Mapping[str, Ranges] = {}
        self._plan = _Plan()

    def __str__(self) -> str:
        return f"{'ip' if self._family == 4 else 'ip6'} {TABLE}"

    # --- rules ------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make the table, or its rules anew with the elements left alone."""
        found = map(parse_chain, self._nft.chains(self._number, TABLE))
        rules = sorted({*ready_made(), *(rule for rule in found if rule)})
        self._fixed = self._fixed_table(rules)
        self._fixed.make()
        self._rules = set(rules)

    def make_missing_rules(self) -> None:
        """Add the chains that the plan needs and the table lacks."""
        missing = sorted(self._needed - self._rules)
        if missing:
            self._fixed.extend(rules_script(self._family, missing))
            self._rules.update(missing)

    def remove_unused_rules(self) -> None:
        """Take away the chains for numbers of backends that nobody has any more, if many."""
        unused = sorted(self._rules - self._needed.union(ready_made()))
        if len(unused) > _UNUSED_RULES:
            self._fixed.extend(removal_script(self._family, unused))
            self._rules.difference_update(unused)

    def intact(self) -> bool:
        """Whether the rules are as they were made."""
        return self._fixed.intact()

    def remove(self) -> None:
        self._fixed.remove()
        self._rules = set()

    def _fixed_table(self, rules: list[Rule]) -> FixedTable:
        script = structure(self._family, self._config) + rules_script(self._family, rules)
        return FixedTable(self._nft, self._number, TABLE, script)

    # --- elements ---------------------------------------------------------------------------------

    def plan(
        self,
        transaction: Transaction,
        changes: Iterable[tuple[ServicePort | None, ServicePort | None]],
        settings: Settings | None,
    ) -> None:
        """The elements of the changed ports, and of the settings if these changed."""
        plan = self._plan = _Plan(ranges=self._ranges)
        before: Spelling = {}
        after: Spelling = {}
        for old, new in changes:
            if old is not None:
                _merge(before, plan.shared, self._spelling(old), -1)
                if old.affinity_timeout_s:
                    plan.kept[old.name] = None
            if new is not None:
                _merge(after, plan.shared, self._spelling(new), 1)
        for name in sorted(before.keys() | after.keys()):
            self._plan_difference(name, before.get(name, {}), after.get(name, {}))
        for (name, key), step in plan.shared.items():
            count = self._shared[name, key]
            if not count and step:
                plan.add(name, key, None)
            elif count and not count + step:
                plan.delete(name, key)
        if settings is not None:
            plan.ranges = _ranges(settings, self._family)
        self._write(transaction)

    def plan_all(
        self, transaction: Transaction, ports: Iterable[ServicePort], settings: Settings
    ) -> list[str]:
        """The difference between the kernel and all of `ports`; a line for each set with one."""
        plan = self._plan = _Plan(ranges=_ranges(settings, self._family))
        held = self._read()
        ports = list(ports)
        if self._ids is None:
            self._ids = _adopted_ids(held, ports)
        self._needed = set()
        wanted: Spelling = {}
        for port in ports:
            _merge(wanted, plan.shared, self._spelling(port), 1)
        for name, key in plan.shared:
            wanted.setdefault(name, {})[key] = None
        for name, left in self._waiting.items():  # known, and no news
            for key, data in left.items():
                if held[name].get(key) == data and key not in wanted.get(name, {}):
                    del held[name][key]
                    plan.delete(name, key)
        self._waiting, self._shared, self._kept = {}, Counter(), {}
        repairs: list[str] = []
        for name, there in held.items():
            repairs += _difference_text(self, name, there, wanted.get(name, {}))
            self._plan_difference(name, there, wanted.get(name, {}), late=False)
        self._ranges = {name: self._read_ranges(name) for name in plan.ranges}
        repairs += [
            f"restored {self} set {name}"
            for name, ranges in plan.ranges.items()
            if ranges != self._ranges[name]
        ]
        self._write(transaction)
        return repairs

    def done(self) -> None:
        """The plan has been committed."""
        plan, self._plan = self._plan, _Plan()
        self._shared.update(plan.shared)
        for name in [key for key, step in plan.shared.items() if step and not self._shared[key]]:
            del self._shared[name]
        for name, kept in plan.kept.items():
            if kept is not None:
                self._kept[name] = kept
            elif self._kept.pop(name, None) and self._ids is not None:
                self._ids.forget(((name, "cluster"), (name, "local")))
        self._waiting.update(plan.waiting)
        self._ranges = plan.ranges

    def plan_flush(self, transaction: Transaction) -> None:
        """The deletes that wait."""
        for name, left in self._waiting.items():
            transaction.delete(
                target(self._family, name), [to_element(name, key, None) for key in left]
            )

    def flushed(self) -> None:
        self._waiting = {}

    def status(self) -> dict[str, object]:
        counters = self._nft.counters(self._number, TABLE)
        return {
            "rules": len(self._rules),
            "shared_elements": len(self._shared),
            "waiting_deletes": sum(map(len, self._waiting.values())),
            "packets_rejected": counters.get("rejected", (0, 0))[0],
            "packets_dropped": counters.get("dropped", (0, 0))[0],
        }

    def without_affinity(self) -> list[str]:
        """Services that ask for session affinity and cannot have it: too many do."""
        lists = self._ids.without if self._ids is not None else ()
        return sorted({f"{name.namespace}/{name.name}" for name, _ in lists})

    def _spelling(self, port: ServicePort) -> Spelling:
        """The port's elements; one with affinity stays as it was spelled before."""
        kept = self._kept.get(port.name)
        if kept is None or kept.port is not port:
            if self._ids is None:
                self._ids = AffinityIds()
            rules: set[Rule] = set()
            kept = _Kept(port, spell(port, self._ids, rules), frozenset(rules))
        if port.affinity_timeout_s:
            self._plan.kept[port.name] = kept
        self._needed |= kept.rules
        return kept.spelling

    def _plan_difference(
        self,
        name: str,
        before: Mapping[bytes, Data],
        after: Mapping[bytes, Data],
        *,
        late: bool = True,
    ) -> None:
        plan = self._plan
        left: dict[bytes, Data] = {}
        if late and name in LATE:
            left = plan.waiting[name] = dict(self._waiting.get(name, {}))
        if not before and not left:  # a cold start
            plan.adds[name] = [to_element(name, key, data) for key, data in after.items()]
            return
        for key, data in after.items():
            there = before.get(key, _MISSING)
            if there is _MISSING:
                there = left.pop(key, _MISSING)
            if there != data:
                if there is not _MISSING:
                    plan.delete(name, key)
                plan.add(name, key, data)
        for key in before.keys() - after.keys():
            if late and name in LATE:
                left[key] = before[key]
            else:
                plan.delete(name, key)

    def _write(self, transaction: Transaction) -> None:
        """Deletes first: a key may move from one port to another."""
        plan = self._plan
        for name, ranges in plan.ranges.items():
            held = self._ranges.get(name, frozenset())
            transaction.delete(target(self._family, name), _intervals(held - ranges))
        for name, elements in plan.deletes.items():
            transaction.delete(target(self._family, name), elements)
        for name, elements in plan.adds.items():
            transaction.add(target(self._family, name), elements)
        for name, ranges in plan.ranges.items():
            held = self._ranges.get(name, frozenset())
            transaction.add(target(self._family, name), _intervals(ranges - held))

    def _read(self) -> Spelling:
        """What the kernel holds."""
        return {
            name: dict(map(from_element, self._nft.elements(target(self._family, name))))
            for name in element_sets()
        }

    def _read_ranges(self, name: str) -> Ranges:
        return intervals(self._nft.elements(target(self._family, name)))


def _merge(
    into: Spelling, shared: Counter[tuple[str, bytes]], spelled: Spelling, step: int
) -> None:
    for name, elements in spelled.items():
        if name in SHARED:
            for key in elements:
                shared[name, key] += step
        elif name in into:
            into[name].update(elements)
        else:
            into[name] = dict(elements)


def _ranges(settings: Settings, family: Family) -> Mapping[str, Ranges]:
    return {name: frozenset(some) for name, some in settings_ranges(settings, family).items()}


def _intervals(ranges: Ranges) -> list[Element]:
    return [element for first, last in sorted(ranges) for element in interval(first, last)]


def _difference_text(
    where: FamilyTable, name: str, there: Mapping[bytes, Data], wanted: Mapping[bytes, Data]
) -> list[str]:
    if not there:
        return [f"restored all of {where} {name}"] if wanted else []
    if there == wanted:
        return []
    foreign = len(there.keys() - wanted.keys())
    lost = sum(there.get(key, _MISSING) != data for key, data in wanted.items())
    out = [f"restored {lost} elements of {where} {name}"] if lost else []
    return [*out, f"removed {foreign} foreign elements of {where} {name}"] if foreign else out


def _adopted_ids(held: Spelling, ports: Iterable[ServicePort]) -> AffinityIds:
    """The affinity numbers that an earlier process gave out."""
    ids = AffinityIds()
    numbers: dict[int, dict[bytes, int]] = {}
    for key, data in held["affinity-backends"].items():
        if isinstance(data, bytes):
            number = int.from_bytes(key, sys.byteorder)
            numbers.setdefault(number & LIST_MASK, {})[data[:-2]] = number & ID_MASK
    for port in ports:
        if port.affinity_timeout_s:
            for scope, name, key in affinity_keys(port):
                data = held[name].get(key)
                if isinstance(data, bytes):
                    list_id = int.from_bytes(data, sys.byteorder)
                    ids.adopt((port.name, scope), list_id, numbers.get(list_id, {}))
    return ids
