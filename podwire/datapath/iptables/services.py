"""Services on iptables and ipset, for machines and policies that ask for them.

One meaning with `podwire.datapath.nftables.services`; `services_rules` tells the way of a packet.
A change rewrites the chains of the Services that changed and one step of a tree.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence

from podwire.datapath import Requirement
from podwire.datapath.counts import ServiceCounts
from podwire.datapath.iptables.families import FAMILIES, Rulesets
from podwire.datapath.iptables.services_family import FamilyRules
from podwire.datapath.iptables.services_rules import CHAIN, hooks, names, set_name
from podwire.datapath.iptables.services_spelling import backend_rules, spell
from podwire.datapath.services import needs
from podwire.errors import KernelError
from podwire.kernel.iptables import Flavour
from podwire.services import (
    Backend,
    Family,
    Frontend,
    ProxyConfig,
    ServicePort,
    ServiceTable,
)

log = logging.getLogger("podwire.datapath.iptables.services")


class ServicesPart:
    """A ServiceTable in the kernel. Thread-safe; see `podwire.datapath.Part`."""

    def __init__(
        self, config: ProxyConfig, netns_fd: int | None = None, flavour: Flavour | None = None
    ) -> None:
        self.requirements: Sequence[Requirement] = needs(config)
        self._kernel = Rulesets(netns_fd, flavour, names, hooks())
        self._rules: dict[Family, FamilyRules] = {f: FamilyRules(f, config) for f in FAMILIES}
        self._config = config
        self._table: ServiceTable | None = None
        self._trusted = False  # whether the kernel holds what we think it holds
        self._lock = threading.Lock()

    def close(self) -> None:
        """Nothing is held open."""

    def start(self) -> None:
        """What an earlier process left stays in force until the first table is applied."""
        with self._lock:
            self._kernel.require_programs()
            self._table, self._trusted = None, False

    def apply(self, table: ServiceTable) -> None:
        """Make the kernel hold `table`; see `podwire.datapath.iptables.ruleset` for the order."""
        with self._lock:
            if table is self._table and self._trusted:
                return
            old = self._table
            if self._trusted and old is not None:
                try:
                    self._apply_changes(old, table)
                    return
                except KernelError as error:
                    # Somebody changed the tables behind our back.
                    log.warning("rules do not fit, reading them back: %s", error)
            self._apply_all(table)

    def flush(self) -> None:
        """Take away chains and sets that nothing uses any more."""
        with self._lock:
            self._kernel.flush()

    def verify(self) -> list[str]:
        """Compare rules and sets with the table, repair, and name each repair."""
        with self._lock:
            if self._table is None:
                return []
            if self._trusted and self._kernel.look_intact(
                {family: rules.sizes() for family, rules in self._rules.items()}
            ):
                return []
            repairs = self._apply_all(self._table)
            self._kernel.flush()
            return repairs

    def cleanup(self) -> None:
        """Remove all of ours. Translated connections go on: conntrack keeps their addresses."""
        with self._lock:
            self._kernel.remove()
            self._table, self._trusted = None, False

    def status(self) -> dict[str, object]:
        """By family: elements, what waits, and packets refused and dropped so far."""
        out: dict[str, object] = {"flavour": self._kernel.flavour}
        for family, iptables in self._kernel.iptables.items():
            out[str(iptables)] = {
                "elements": sum(self._rules[family].sizes().values()),
                "waiting_deletes": self._kernel[family].waiting,
                "packets_rejected": sum(iptables.counters("filter", f"{CHAIN}REFUSE")),
                "packets_dropped": sum(iptables.counters("filter", f"{CHAIN}DISCARD"))
                + sum(iptables.counters("mangle", f"{CHAIN}DISCARD")),
            }
        return out

    def counts(self, port: ServicePort) -> ServiceCounts:
        """First packets that the rules have seen since they were last written.

        That is when the Service changed, or for a frontend one beside it in the tree.
        """
        with self._lock:
            if self._table is None or self._table.ports.get(port.name) != port:
                return ServiceCounts()
            return self._counts(port, self._rules[port.name.family])

    def _counts(self, port: ServicePort, rules: FamilyRules) -> ServiceCounts:
        iptables = self._kernel.iptables[port.name.family]
        read: dict[str, list[int]] = {}

        def count(chain: str, place: int) -> int:
            if chain not in read:
                read[chain] = iptables.counters("nat", chain)
            return read[chain][place] if place < len(read[chain]) else 0

        spelling = spell(port, self._config)
        frontends: dict[Frontend, tuple[str, int | None]] = {}
        for frontend in port.frontends:
            if frontend in spelling.counted:
                chain, rule = spelling.counted[frontend]
                words = f"{iptables} nat {chain}"
                frontends[frontend] = (words, count(chain, rules.place(chain, rule)))
            else:
                frontends[frontend] = (f"ipset {set_name(port.name.family, 'rejected')}", None)
        backends: Counter[Backend] = Counter()
        for backend, chain, place in backend_rules(spelling, port):
            backends[backend] += count(chain, place)
        return ServiceCounts(frontends, backends)

    def _apply_changes(self, old: ServiceTable, new: ServiceTable) -> None:
        delta = new.delta(old)
        self._trusted = False
        for family, rules in self._rules.items():
            changes = [pair for name, pair in delta.ports.items() if name.family == family]
            if changes or delta.settings:
                self._kernel[family].write(rules.update(changes, new.settings))
        self._table, self._trusted = new, True

    def _apply_all(self, table: ServiceTable) -> list[str]:
        """Read back what the kernel holds and change the difference; what was repaired."""
        self._trusted = False
        repairs: list[str] = []
        for family, rules in self._rules.items():
            ports = [port for name, port in table.ports.items() if name.family == family]
            repairs += self._kernel[family].replace(rules.wanted(ports, table.settings))
        self._table, self._trusted = table, True
        return repairs
