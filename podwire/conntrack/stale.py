"""Find and remove UDP entries that lead where nobody serves any more.

What is stale is `services.stale`'s to say. Here: read the table once by the fast path, delete what
is stale by a filter in the kernel, one per (frontend, dead backend), or entry by entry where the
kernel cannot or where the groups are many (each filter walks the whole table).

Entries that other programs made are left alone: a node port's are judged only if they were
translated, since an untranslated one belongs to a program that listens on that port; a Service
address is the Service's, so an untranslated entry there (from before the rules were) is stale.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from podwire.conntrack.names import Names
from podwire.kernel.ctnetlink import Entry, Filter, FlowKey, Match, Status, Table
from podwire.kernel.ctnetlink.counting import flow_key
from podwire.kernel.ctnetlink.filters import EVERYTHING, abilities
from podwire.net import Address, Protocol, format_endpoint
from podwire.services import ServiceTable
from podwire.services.stale import Flow, StaleFlows

FEW_ENTRIES = 5_000
MOST_FILTERS = 16  # a filter costs a walk of the table, about as much as 2,000 single deletes


class Group(NamedTuple):
    """A frontend and who answers for it."""

    destination: Address
    destination_port: int
    reply_source: Address
    reply_source_port: int

    @property
    def filter(self) -> Filter:
        udp = Protocol.UDP
        return Filter(
            original=Match(
                destination=self.destination, protocol=udp, destination_port=self.destination_port
            ),
            reply=Match(source=self.reply_source, protocol=udp, source_port=self.reply_source_port),
        )


class Removal(NamedTuple):
    """What one pass did."""

    groups: Mapping[Group, int]
    """Entries by group."""
    seconds: float

    def deleted(self, family: int) -> int:
        """Of one IP family, 4 or 6."""
        size = 4 if family == 4 else 16
        return sum(n for group, n in self.groups.items() if len(group.destination) == size)


def find(table: Table, judge: Callable[[FlowKey], bool]) -> dict[Group, int]:
    """Groups of UDP entries that `judge` calls stale, and how many entries each has."""
    found: dict[Group, int] = {}
    # what the kernel can filter is found out by going through its table: not worth it for a few
    few = table.usage().used <= FEW_ENTRIES
    wanted = EVERYTHING if few else Filter(original=Match(protocol=Protocol.UDP))
    for portion in table.flow_counts(wanted):
        for key, count in portion.items():
            if key.protocol == Protocol.UDP and judge(key):
                group = _group(key)
                found[group] = found.get(group, 0) + count
    return found


def remove(table: Table, judge: Callable[[FlowKey], bool]) -> Removal:
    """Delete what is stale. Raises KernelError."""
    began = time.perf_counter()
    groups = find(table, judge)
    for size, kind in ((4, "tuple4"), (16, "tuple6")):
        own = {group for group in groups if len(group.destination) == size}
        if not own:
            continue
        if len(own) <= MOST_FILTERS and kind in abilities().delete:
            for group in own:
                table.delete(group.filter)
        else:
            table.delete_entries(_entries(table, own, judge))
    return Removal(groups, time.perf_counter() - began)


def _entries(table: Table, groups: set[Group], judge: Callable[[FlowKey], bool]) -> list[Entry]:
    return [
        entry
        for entry in table.entries(Filter(original=Match(protocol=Protocol.UDP)))
        if (key := flow_key(entry)) and _group(key) in groups and judge(key)
    ]


def _group(key: FlowKey) -> Group:
    return Group(key.destination, key.destination_port, key.reply_source, key.reply_source_port)


def judge_changes(stale: StaleFlows) -> Callable[[FlowKey], bool]:
    """For changed Services."""

    def judge(key: FlowKey) -> bool:
        if Flow(*_group(key)) not in stale:
            return False
        translated = key.status & Status.DST_NAT
        return bool(translated) or (key.destination, key.destination_port) in stale.frontends

    return judge


def judge_all(services: ServiceTable) -> Callable[[FlowKey], bool]:
    """For a start: every Service, and those that went away meanwhile, whose translated entries are
    told by an address that only Services have.
    """
    changed = judge_changes(
        StaleFlows([(None, port) for port in services.ports.values()], services.settings)
    )
    ranges = services.settings.service_cidrs

    def judge(key: FlowKey) -> bool:
        if changed(key):
            return True
        frontend = (key.destination, Protocol.UDP, key.destination_port)
        return (
            bool(key.status & Status.DST_NAT)
            and frontend not in services.frontends
            and any(key.destination in prefix for prefix in ranges)
        )

    return judge


def group_rows(groups: Mapping[Group, int], names: Names) -> list[dict[str, object]]:
    """Groups as JSON, largest first."""
    ordered = sorted(groups.items(), key=lambda item: (-item[1], item[0]))
    return [
        {
            "frontend": format_endpoint(group.destination, group.destination_port),
            "service": str(names.service(Protocol.UDP, group.destination, group.destination_port)
                           or "gone"),
            "backend": format_endpoint(group.reply_source, group.reply_source_port),
            "entries": count,
        }
        for group, count in ordered
    ]  # fmt: skip
