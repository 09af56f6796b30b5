"""Chains and sets of one part in one family: all that start with our prefixes, and nothing else.

A `Wanted` is the whole; an `Update` is a change to it. Every write goes in an order in which no
packet meets half of it: what rules need is added first, the rules of a table change in one
transaction, and what they need no more goes last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from podwire.kernel.ipset import IpSet, IpSets
from podwire.kernel.iptables import Hook, Iptables, Rules, TableChange, targets

ChainKey = tuple[str, str]
"""Table and chain."""
Member = tuple[str, str]
"""Set and element."""


class Names(NamedTuple):
    """How ours are told from those of others. Upper-case for chains, lower-case for sets."""

    chains: str
    sets: str


def tag(text: str) -> str:
    """15 characters that stand for `text` in names, which the kernel keeps short."""
    return hashlib.sha256(text.encode()).hexdigest()[:15]


@dataclass
class Update:
    """A change, in the order of its fields."""

    sets: list[IpSet] = field(default_factory=list[IpSet])
    """To be made."""
    adds: list[Member] = field(default_factory=list[Member])
    chains: dict[ChainKey, Rules] = field(default_factory=dict[ChainKey, Rules])
    deletes: list[Member] = field(default_factory=list[Member])
    late_chains: set[ChainKey] = field(default_factory=set[ChainKey])
    """Chains that nothing leads to any more."""
    late_sets: set[str] = field(default_factory=set[str])
    """Sets that nothing but these chains uses."""


@dataclass(frozen=True)
class Wanted:
    """All that the kernel should hold. Sets with a timeout are filled by packets."""

    chains: Mapping[ChainKey, Rules]
    sets: Mapping[str, IpSet]
    elements: Mapping[str, Collection[str]]

    def sizes(self) -> dict[str, int]:
        """Elements by set."""
        return {name: len(elements) for name, elements in self.elements.items()}

    def since(self, old: Wanted) -> Update:
        """What leads from `old` to this, where the elements of a set never change."""
        new_sets = [each for name, each in self.sets.items() if name not in old.sets]
        return Update(
            new_sets,
            [(each.name, element) for each in new_sets for element in self.elements[each.name]],
            {key: rules for key, rules in self.chains.items() if old.chains.get(key) != rules},
            late_chains=set(old.chains.keys() - self.chains.keys()),
            late_sets=set(old.sets.keys() - self.sets.keys()),
        )


class Ruleset:
    """See the module. Not thread-safe."""

    def __init__(
        self,
        iptables: Iptables,
        sets: IpSets,
        names: Names,
        hooks: Mapping[str, Sequence[Hook]],
    ) -> None:
        """`hooks` by table, in the order in which the tables are written; they go the other way."""
        self._iptables = iptables
        self._sets = sets
        self._names = names
        self._hooks = hooks
        self._print: tuple[int, ...] | None = None
        self._late_chains: set[ChainKey] = set()
        self._late_sets: set[str] = set()
        # Chains that this version of iptables prints otherwise than we write them: ours, its.
        self._printed: dict[ChainKey, tuple[Rules, Rules]] = {}
        self._reread = False

    def __str__(self) -> str:
        return str(self._iptables)

    # --- changes ----------------------------------------------------------------------------------

    def write(self, update: Update) -> None:
        """Carry the update out; what is late waits for `flush`."""
        self._write(update, {})
        self._late_chains = (self._late_chains | update.late_chains) - update.chains.keys()
        self._late_sets |= update.late_sets
        self._late_sets -= {each.name for each in update.sets}

    def flush(self) -> None:
        """Take away chains and sets that are out of use, and note how the tables look now."""
        if self._late_chains:
            self._iptables.restore(_removal(self._late_chains))
            self._late_chains = set()
        self._sets.restore(f"destroy {name}" for name in sorted(self._late_sets))
        self._late_sets = set()
        if self._print is None:
            self._print = self._fingerprint()

    @property
    def waiting(self) -> int:
        """Chains and sets that wait for `flush`."""
        return len(self._late_chains) + len(self._late_sets)

    # --- the whole --------------------------------------------------------------------------------

    def looks_intact(self, sizes: Mapping[str, int]) -> bool:
        """A cheap look: as many rules as after our last write, and sets of these sizes."""
        if self._print is None or self._fingerprint() != self._print:
            return False
        there = self._sets.sizes(self._names.sets)
        return all(there.get(name) == size for name, size in sizes.items())

    def replace(self, wanted: Wanted) -> list[str]:
        """Compare the kernel with `wanted`, write what differs, and name each difference."""
        repairs, update, hooks = self._difference(wanted)
        self._write(update, hooks)
        self._late_chains, self._late_sets = update.late_chains, update.late_sets
        self._note_printing({key: wanted.chains[key] for key in update.chains})
        return repairs

    def _write(self, update: Update, hooks: Mapping[str, Sequence[Hook]]) -> None:
        self._print = None
        self._sets.restore(
            [
                *(each.creation for each in update.sets),
                # one that still waited to be taken away may hold something
                *(f"flush {each.name}" for each in update.sets if each.timeout_s is None),
                *(f"add {name} {element}" for name, element in update.adds),
            ]
        )
        tables: dict[str, dict[str, Rules]] = {table: {} for table in hooks}
        for (table, name), rules in update.chains.items():
            tables.setdefault(table, {})[name] = rules
        self._iptables.restore(
            {table: TableChange(some, (), hooks.get(table, ())) for table, some in tables.items()}
        )
        self._sets.restore(f"del {name} {element}" for name, element in update.deletes)

    def remove(self) -> None:
        """Remove our chains, the rules that lead to them, and our sets."""
        for iptables in self._iptables.in_use():  # we may have run with the other flavour before
            changes: dict[str, TableChange] = {}
            tables = iptables.save_all()
            for table in reversed(list(self._hooks)):
                there = tables.get(table, {})
                ours = [name for name in there if name.startswith(self._names.chains)]
                unhook = [
                    Hook(hook.chain, rule)
                    for hook in self._hooks[table]
                    for rule in _leading(there, hook)
                ]
                if ours:
                    changes[table] = TableChange({}, ours, (), unhook)
            iptables.restore(changes)
        if self._sets.exist():
            self._sets.restore(f"destroy {name}" for name in self._sets.sizes(self._names.sets))
        self._print, self._late_chains, self._late_sets = None, set(), set()

    def _fingerprint(self) -> tuple[int, ...]:
        return tuple(self._iptables.fingerprint(table) for table in self._hooks)

    def _difference(self, wanted: Wanted) -> tuple[list[str], Update, dict[str, list[Hook]]]:
        repairs: list[str] = []
        update = Update()
        hooks: dict[str, list[Hook]] = {}
        tables = self._iptables.save_all()
        for table, wanted_hooks in self._hooks.items():
            there = tables.get(table, {})
            missing = [hook for hook in wanted_hooks if not _leading(there, hook)]
            if missing:
                hooks[table] = missing[::-1]  # each is put in front
                repairs += [f"hooked into {self} {table} {hook.chain} again" for hook in missing]
            mine = {name: rules for (t, name), rules in wanted.chains.items() if t == table}
            changed = {
                (table, name): rules
                for name, rules in mine.items()
                if not self._same(there.get(name), (table, name), rules)
            }
            update.chains |= changed
            self._reread |= any(name in there for _, name in changed)
            if changed:
                repairs.append(f"restored {len(changed)} chains of {self} {table}")
            update.late_chains |= {
                (table, name)
                for name in there
                if name.startswith(self._names.chains) and name not in mine
            }
        self._compare_sets(wanted, update, repairs)
        return repairs, update, hooks

    def _same(self, there: Rules | None, key: ChainKey, rules: Rules) -> bool:
        return there == tuple(rules) or (
            there is not None and self._printed.get(key) == (rules, there)
        )

    def _note_printing(self, chains: Mapping[ChainKey, Rules]) -> None:
        """Read back what was just written over other text, to learn how it is printed."""
        if not self._reread:
            return
        self._reread = False
        tables = self._iptables.save_all()
        for (table, name), rules in chains.items():
            there = tables.get(table, {}).get(name, ())
            if there != tuple(rules):
                self._printed[table, name] = (rules, there)

    def _compare_sets(self, wanted: Wanted, update: Update, repairs: list[str]) -> None:
        there = self._sets.elements(self._names.sets)
        for name, each in wanted.sets.items():
            if name not in there:
                update.sets.append(each)
            if each.timeout_s is not None:
                continue  # packets fill it
            held, should = there.get(name, set[str]()), set(wanted.elements.get(name, ()))
            update.adds += [(name, element) for element in sorted(should - held)]
            update.deletes += [(name, element) for element in sorted(held - should)]
            if held != should:
                repairs.append(f"restored the set {name}")
        update.deletes.reverse()
        update.late_sets |= there.keys() - wanted.sets.keys()


def _leading(there: Mapping[str, Rules], hook: Hook) -> list[str]:
    """The rules, as they are printed, that lead from the hook's chain to where it leads."""
    return [
        rule
        for rule in there.get(hook.chain, ())
        if list(targets([rule])) == list(targets([hook.rule]))
    ]


def _removal(chains: Iterable[ChainKey]) -> dict[str, TableChange]:
    tables: dict[str, list[str]] = {}
    for table, name in sorted(chains):
        tables.setdefault(table, []).append(name)
    return {table: TableChange({}, names) for table, names in tables.items()}
