"""What the kernel holds of all Services in one family, and how a change alters it. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from podwire.datapath.iptables.ruleset import ChainKey, Update, Wanted
from podwire.datapath.iptables.services_rules import (
    ROOTS,
    fixed_chains,
    fixed_sets,
    set_order,
)
from podwire.datapath.iptables.services_spelling import Spelling, settings_elements, spell
from podwire.kernel.iptables import Rules
from podwire.services import Family, ProxyConfig, ServicePort, Settings

_Change = tuple[ServicePort | None, ServicePort | None]


class FamilyRules:
    """Counts who needs the shared rules and elements, so that a change costs what it holds."""

    def __init__(self, family: Family, config: ProxyConfig) -> None:
        self._family: Family = family
        self._config = config
        self._links: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._elements: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._settings: Settings | None = None

    def wanted(self, ports: Iterable[ServicePort], settings: Settings) -> Wanted:
        """The whole; what `update` changes from now on."""
        self._links = defaultdict(Counter, {root: Counter[str]() for root in ROOTS})
        self._elements = defaultdict(Counter)
        self._settings = settings
        sets = fixed_sets(self._family)
        chains: dict[ChainKey, Rules] = fixed_chains(self._family, self._config)
        for name, element in settings_elements(settings, self._family):
            self._elements[name][element] += 1
        for port in ports:
            spelling = spell(port, self._config)
            sets |= spelling.sets
            chains |= {("nat", name): rules for name, rules in spelling.chains.items()}
            for chain, rule in spelling.links:
                self._links[chain][rule] += 1
            for name, element in spelling.elements:
                self._elements[name][element] += 1
        chains |= {("nat", name): self._shared(name) for name in self._links}
        return Wanted(chains, sets, self._elements)

    def update(self, changes: Iterable[_Change], settings: Settings) -> Update:
        """What the changed ports and settings change."""
        before, after = Spelling(), Spelling()
        for old, new in changes:
            for port, into in ((old, before), (new, after)):
                if port is not None:
                    _merge(into, spell(port, self._config))
        if settings != self._settings and self._settings is not None:
            before.elements += settings_elements(self._settings, self._family)
            after.elements += settings_elements(settings, self._family)
        self._settings = settings
        update = Update()
        update.sets = [each for name, each in after.sets.items() if name not in before.sets]
        update.late_sets = before.sets.keys() - after.sets.keys()
        for name, rules in after.chains.items():
            if before.chains.get(name) != rules:
                update.chains["nat", name] = rules
        for name in before.chains.keys() - after.chains.keys():
            update.late_chains.add(("nat", name))
        self._update_links(update, before, after)
        self._update_elements(update, before, after)
        return update

    def sizes(self) -> dict[str, int]:
        """Elements by set, those of sets that never change their contents on their own."""
        return {name: len(self._elements.get(name, ())) for name in fixed_sets(self._family)}

    def place(self, chain: str, rule: str) -> int:
        """Where a shared chain has the rule."""
        return self._shared(chain).index(rule)

    def _update_links(self, update: Update, before: Spelling, after: Spelling) -> None:
        step = Counter(after.links)
        step.subtract(before.links)
        touched: set[str] = set()
        for (chain, rule), count in step.items():
            if count and _count(self._links[chain], rule, count):
                touched.add(chain)
        for chain in touched:
            if self._links[chain] or chain in ROOTS:
                update.chains["nat", chain] = self._shared(chain)
            else:
                del self._links[chain]
                update.late_chains.add(("nat", chain))

    def _update_elements(self, update: Update, before: Spelling, after: Spelling) -> None:
        step = Counter(after.elements)
        step.subtract(before.elements)
        for (name, element), count in step.items():
            if count and _count(self._elements[name], element, count):
                there = element in self._elements[name]
                (update.adds if there else update.deletes).append((name, element))
        update.adds.sort(key=set_order)
        update.deletes.sort(key=set_order, reverse=True)

    def _shared(self, chain: str) -> Rules:
        return tuple(sorted(self._links[chain]))


def _count(counter: Counter[str], what: str, step: int) -> bool:
    """Whether `what` came or went."""
    had = counter[what]
    counter[what] = had + step
    if not had + step:
        del counter[what]
    return not had or not had + step


def _merge(into: Spelling, more: Spelling) -> None:
    into.chains |= more.chains
    into.links += more.links
    into.elements += more.elements
    into.sets |= more.sets
