"""Services on iptables and ipset, for machines and policies that ask for them.

One meaning with `podwire.datapath.nftables.services`; `services_rules` tells the way of a packet.
A change rewrites the chains of the Services that changed and one step of a tree.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from podwire.datapath import Requirement
from podwire.datapath.iptables.ruleset import Ruleset
from podwire.datapath.iptables.services_family import FamilyRules
from podwire.datapath.iptables.services_rules import CHAIN, hooks, names, serves_loopback
from podwire.errors import KernelError, Unsupported
from podwire.kernel.ipset import IpSets
from podwire.kernel.iptables import Flavour, Iptables, detect_flavour
from podwire.services import Family, ProxyConfig, ServiceTable

log = logging.getLogger("podwire.datapath.iptables.services")

_FAMILIES: tuple[Family, Family] = (4, 6)
_FORWARD = (
    Requirement("net.ipv4.ip_forward", "1", "backends are behind this node"),
    Requirement("net.ipv6.conf.all.forwarding", "1", "backends are behind this node"),
)
_LOCALNET = Requirement(
    "net.ipv4.conf.all.route_localnet", "1", "node ports are served on 127.0.0.1"
)
_WHOLE_CHECK = 10
"""Every so many checks compare everything, whatever the cheap look says."""


class ServicesPart:
    """A ServiceTable in the kernel. Thread-safe; see `podwire.datapath.Part`."""

    def __init__(
        self, config: ProxyConfig, netns_fd: int | None = None, flavour: Flavour | None = None
    ) -> None:
        loopback = (_LOCALNET,) if serves_loopback(config) else ()
        self.requirements: Sequence[Requirement] = (*_FORWARD, *loopback)
        self.flavour: Flavour = flavour or detect_flavour(netns_fd)
        sets = IpSets(netns_fd)
        self._iptables = {f: Iptables(f, self.flavour, netns_fd) for f in _FAMILIES}
        self._rules = {family: FamilyRules(family, config) for family in _FAMILIES}
        self._kernel = {
            family: Ruleset(self._iptables[family], sets, names(family), hooks())
            for family in _FAMILIES
        }
        self._table: ServiceTable | None = None
        self._trusted = False  # whether the kernel holds what we think it holds
        self._checks = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """Nothing is held open."""

    def start(self) -> None:
        """What an earlier process left stays in force until the first table is applied."""
        with self._lock:
            for iptables in self._iptables.values():
                if not iptables.exists():
                    raise Unsupported(f"{iptables} is missing: install the package iptables")
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
            for kernel in self._kernel.values():
                kernel.flush()

    def verify(self) -> list[str]:
        """Compare rules and sets with the table, repair, and name each repair."""
        with self._lock:
            if self._table is None:
                return []
            self._checks += 1
            if self._trusted and self._checks % _WHOLE_CHECK and self._looks_intact():
                return []
            repairs = self._apply_all(self._table)
            for kernel in self._kernel.values():
                kernel.flush()
            return repairs

    def cleanup(self) -> None:
        """Remove all of ours. Translated connections go on: conntrack keeps their addresses."""
        with self._lock:
            for kernel in self._kernel.values():
                kernel.remove()
            self._table, self._trusted = None, False

    def status(self) -> dict[str, object]:
        """By family: elements, what waits, and packets refused and dropped so far."""
        out: dict[str, object] = {"flavour": self.flavour}
        for family, iptables in self._iptables.items():
            out[str(iptables)] = {
                "elements": sum(self._rules[family].sizes().values()),
                "waiting_deletes": self._kernel[family].waiting,
                "packets_rejected": sum(iptables.counters("filter", f"{CHAIN}REFUSE")),
                "packets_dropped": sum(iptables.counters("filter", f"{CHAIN}DISCARD"))
                + sum(iptables.counters("mangle", f"{CHAIN}DISCARD")),
            }
        return out

    def _looks_intact(self) -> bool:
        return all(
            self._kernel[family].looks_intact(self._rules[family].sizes()) for family in _FAMILIES
        )

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
