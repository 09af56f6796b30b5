"""The eBPF data path's own connection map, read like the kernel's table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from podwire.datapath.ebpf.entries import flow, kernel_entries
from podwire.datapath.ebpf.programs import Programs
from podwire.kernel.ctnetlink import Entry, Filter, FlowKey, Usage
from podwire.kernel.ctnetlink.counting import MOST_KEYS, flow_key
from podwire.kernel.ctnetlink.filters import EVERYTHING


class EbpfSource:
    """Each connection is two elements, one per direction: the map is half as large as it says."""

    name = "ebpf"

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def usage(self) -> Usage:
        """Walked in the kernel; the limit is what the table can grow to."""
        connections = self._programs.connections
        with self._programs.lock:
            connections.expire()
        return Usage(connections.held // 2, connections.limit // 2)

    def statistics(self) -> Mapping[str, int]:
        """Packets lost for want of room or ports."""
        outcomes = self._programs.outcomes()
        return {name: outcomes.get(name, 0) for name in ("connections_full", "ports_exhausted")}

    def entries(self, filter_: Filter = EVERYTHING) -> Iterator[Entry]:
        """The connections that fit, by their original direction."""
        for entry, _ in kernel_entries(dict(self._items())):
            if filter_.fits(entry):
                yield entry

    def flow_counts(self) -> Iterator[Mapping[FlowKey, int]]:
        counts: dict[FlowKey, int] = {}
        for entry in self.entries():
            key = flow_key(entry)
            counts[key] = counts.get(key, 0) + 1
            if len(counts) >= MOST_KEYS:
                yield counts
                counts = {}
        yield counts

    def delete(self, filter_: Filter) -> None:
        if not filter_:
            raise ValueError("a filter that fits everything")
        self.delete_entries(list(self.entries(filter_)))

    def delete_entries(self, entries: Iterable[Entry]) -> int:
        table = self._programs.growing["connections"].map
        gone = 0
        for entry in entries:
            gone += table.delete(flow(entry.original))
            table.delete(flow(entry.reply))
        return gone

    def _items(self) -> Iterator[tuple[bytes, bytes]]:
        return self._programs.growing["connections"].map.items()
