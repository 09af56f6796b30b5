"""Chains and sets of one part in one family: all that start with our prefixes, and nothing else.

A `Wanted` is the whole; an `Update` is a change to it. Every write goes in an order in which no
packet meets half of it: what rules need is added first, the rules of a table change in one
transaction, and what they need no more goes last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from podwire.kernel.ipset import IpSet, IpSets
from podwire.kernel.iptables import Hook, Iptables, Rules, TableChange

ChainKey = tuple[str, str]
"""Table and chain."""


class Names(NamedTuple):
    """How ours are told from those of others. Upper-case for chains, lower-case for sets."""

    chains: str
    sets: str


@dataclass
class Update:
    """A change. Sets are made and elements added before the rules, and taken away after them."""

    sets: list[IpSet] = field(default_factory=list[IpSet])
    adds: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Set and element, in the order in which they must come; deletes are made in reverse."""
    deletes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    chains: dict[ChainKey, Rules] = field(default_factory=dict[ChainKey, Rules])
    late_chains: set[ChainKey] = field(default_factory=set[ChainKey])
    """Chains that nothing leads to any more."""
    late_sets: set[str] = field(default_factory=set[str])
    """Sets that nothing but these chains uses."""


@dataclass
class Wanted:
    """All that the kernel should hold. Sets with a timeout are filled by packets."""

    chains: Mapping[ChainKey, Rules]
    sets: Mapping[str, IpSet]
    elements: Mapping[str, Iterable[str]]


class Ruleset:
    """See the module. Not thread-safe."""

    def __init__(
        self,
        iptables: Iptables,
        sets: IpSets,
        names: Names,
        hooks: Mapping[str, Sequence[Hook]],
    ) -> None:
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
        self._late_chains -= update.chains.keys()
        self._late_sets -= {each.name for each in update.sets}
        self._sets.restore(
            [
                *(each.creation for each in update.sets),
                *(f"add {name} {element}" for name, element in update.adds),
            ]
        )
        self._iptables.restore(_by_table(update.chains))
        self._sets.restore(f"del {name} {element}" for name, element in reversed(update.deletes))
        self._late_chains |= update.late_chains
        self._late_sets |= update.late_sets
        self._print = None

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
        self._sets.restore(
            [
                *(each.creation for each in update.sets),
                *(f"add {name} {element}" for name, element in update.adds),
            ]
        )
        chains = _by_table(update.chains)
        for table, missing in hooks.items():
            change = chains.get(table, TableChange({}))
            chains[table] = change._replace(hooks=missing)
        self._iptables.restore(chains)
        self._sets.restore(f"del {name} {element}" for name, element in reversed(update.deletes))
        self._late_chains, self._late_sets = update.late_chains, update.late_sets
        self._print = None
        self._note_printing({key: wanted.chains[key] for key in update.chains})
        return repairs

    def remove(self) -> None:
        """Remove our chains, the rules that lead to them, and our sets."""
        for iptables in self._flavours():
            changes: dict[str, TableChange] = {}
            for table in self._hooks:
                there = iptables.save(table)
                ours = [name for name in there if name.startswith(self._names.chains)]
                unhook = [h for h in self._hooks[table] if h.rule in there.get(h.chain, ())]
                if ours:
                    changes[table] = TableChange({}, ours, (), unhook)
            iptables.restore(changes)
        self._sets.restore(f"destroy {name}" for name in self._sets.sizes(self._names.sets))
        self._print, self._late_chains, self._late_sets = None, set(), set()

    def _flavours(self) -> list[Iptables]:
        """Ours, and the other flavour if somebody uses it: we may have run with it before."""
        return [self._iptables, *self._iptables.others()]

    def _fingerprint(self) -> tuple[int, ...]:
        return tuple(self._iptables.fingerprint(table) for table in self._hooks)

    def _difference(self, wanted: Wanted) -> tuple[list[str], Update, dict[str, list[Hook]]]:
        repairs: list[str] = []
        update = Update()
        hooks: dict[str, list[Hook]] = {}
        for table, wanted_hooks in self._hooks.items():
            there = self._iptables.save(table)
            missing = [h for h in wanted_hooks if h.rule not in there.get(h.chain, ())]
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
        tables = {table: self._iptables.save(table) for table in self._hooks}
        for (table, name), rules in chains.items():
            there = tables[table].get(name, ())
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
        update.late_sets |= there.keys() - wanted.sets.keys()


def _by_table(chains: Mapping[ChainKey, Rules]) -> dict[str, TableChange]:
    tables: dict[str, dict[str, Rules]] = {}
    for (table, name), rules in chains.items():
        tables.setdefault(table, {})[name] = rules
    return {table: TableChange(some) for table, some in tables.items()}


def _removal(chains: Iterable[ChainKey]) -> dict[str, TableChange]:
    tables: dict[str, list[str]] = {}
    for table, name in sorted(chains):
        tables.setdefault(table, []).append(name)
    return {table: TableChange({}, names) for table, names in tables.items()}
