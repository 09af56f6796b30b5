"""Services on nftables: tables `ip` and `ip6 podwire-services`, where only elements move.

`services_rules` holds the rules, `services_elements` spells a port. A change costs the elements of
the ports that changed: what the kernel should hold of a port follows from the port, so nothing is
listed but by `start` and `verify`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from podwire.datapath import Requirement
from podwire.datapath.counts import ServiceCounts
from podwire.datapath.nftables.services_affinity import MOST_LISTS
from podwire.datapath.nftables.services_elements import counting, target
from podwire.datapath.nftables.services_family import FamilyTable
from podwire.datapath.services import needs
from podwire.errors import KernelError
from podwire.kernel.nftables import NfTables, Set, Transaction
from podwire.services import Family, Frontend, ProxyConfig, ServicePort, ServiceTable

log = logging.getLogger("podwire.datapath.nftables.services")

_SHOWN = 5
_FAMILIES: tuple[Family, Family] = (4, 6)


class ServicesPart:
    """A ServiceTable in the kernel. Thread-safe; see `podwire.datapath.Part`."""

    def __init__(self, config: ProxyConfig, netns_fd: int | None = None) -> None:
        self.requirements: Sequence[Requirement] = needs(config)
        self._nft = NfTables(netns_fd)
        self._families = {family: FamilyTable(self._nft, family, config) for family in _FAMILIES}
        self._table: ServiceTable | None = None
        self._trusted = False  # whether the kernel holds what we think it holds
        self._strangers = 0  # see NfTables.strangers
        self._lock = threading.Lock()

    def close(self) -> None:
        self._nft.close()

    def start(self) -> None:
        """Make the rules anew in one transaction; elements of an earlier process stay."""
        with self._lock:
            for family in self._families.values():
                family.make()
            self._table, self._trusted = None, False

    def apply(self, table: ServiceTable) -> None:
        """Make the kernel hold `table`, in one transaction: no packet sees half of it.

        Only the slots that shrunken lists leave behind wait for `flush`.
        """
        with self._lock:
            if table is self._table and self._trusted:
                return
            if self._trusted and self._table is not None:
                try:
                    self._apply_changes(self._table, table)
                    return
                except KernelError as error:
                    # Somebody changed the table behind our back, or nf_tables ran out of memory.
                    log.warning("elements do not fit, reading them back: %s", error)
                    self._trusted = False
            self._apply_all(table)

    def flush(self) -> None:
        """Send the waiting deletes."""
        with self._lock:
            transaction = Transaction()
            for family in self._families.values():
                family.plan_flush(transaction)
            self._commit(transaction)
            for family in self._families.values():
                family.flushed()

    def verify(self) -> list[str]:
        """Read the tables back, repair what differs, and name each repair.

        Costs one question to the kernel where nobody but this process has committed anything since.
        """
        with self._lock:
            if self._table is None:
                return []
            if self._trusted and self._nft.strangers() == self._strangers:
                return []
            repairs = self._apply_all(self._table)
            for family in self._families.values():
                family.remove_unused_rules()
            return repairs

    def cleanup(self) -> None:
        """Remove both tables. Translated connections go on: conntrack keeps their addresses."""
        with self._lock:
            for family in self._families.values():
                family.remove()
            self._table, self._trusted = None, False

    def status(self) -> dict[str, object]:
        """Elements by family, waiting deletes, and packets refused and dropped so far."""
        return {str(family): family.status() for family in self._families.values()}

    def warnings(self) -> list[str]:
        """Services that are served otherwise than they ask for, and why."""
        return [
            f"{_words(names)} balanced without session affinity: {family} has numbers for "
            f"{MOST_LISTS - 1:,} lists of backends"
            for family in self._families.values()
            if (names := family.without_affinity())
        ]

    def counts(self, port: ServicePort) -> ServiceCounts:
        """For each frontend the set or map that decides, and how many connections it has seen.

        Backends are elements without counters: those would cost more than the elements.

        Lists those maps; for people who ask, not for every sync.
        """
        listed: dict[Set, dict[bytes, tuple[int, int]]] = {}
        found: dict[Frontend, tuple[str, int | None]] = {}
        for frontend in port.frontends:
            name, key = counting(port, frontend)
            place = target(port.name.family, name)
            if place not in listed:
                listed[place] = self._nft.element_counters(place)
            packets, _ = listed[place].get(key, (0, 0))
            word = "ip" if port.name.family == 4 else "ip6"
            found[frontend] = (f"{word} {place.table} {name}", packets)
        return ServiceCounts(found)

    def _apply_changes(self, old: ServiceTable, new: ServiceTable) -> None:
        delta = new.delta(old)
        transaction = Transaction()
        settings = new.settings if delta.settings else None
        for number, family in self._families.items():
            changes = [pair for name, pair in delta.ports.items() if name.family == number]
            family.plan(transaction, changes, settings)
        self._finish(transaction, new)

    def _apply_all(self, table: ServiceTable) -> list[str]:
        """Read back what the kernel holds and change the difference; what of it was amiss."""
        transaction = Transaction()
        repairs: list[str] = []
        for family in self._families.values():
            if not family.intact():
                family.make()
                repairs.append(f"made the rules of {family} again")
        self._strangers = self._nft.strangers()
        for number, family in self._families.items():
            ports = [port for name, port in table.ports.items() if name.family == number]
            repairs += family.plan_all(transaction, ports, table.settings)
        self._finish(transaction, table)
        return repairs

    def _finish(self, transaction: Transaction, table: ServiceTable) -> None:
        for family in self._families.values():
            family.make_missing_rules()
        self._commit(transaction)
        for family in self._families.values():
            family.done()
        self._table, self._trusted = table, True

    def _commit(self, transaction: Transaction) -> None:
        try:
            self._nft.commit(transaction)
        except KernelError:
            self._trusted = False
            raise


def _words(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    return f"{len(names)} Services ({shown})" if len(names) > 1 else f"Service {shown}"
