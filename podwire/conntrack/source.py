"""Where entries are read from: the kernel's table, or the eBPF data path's own map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from podwire.kernel.ctnetlink import Entry, Filter, FlowKey, Usage
from podwire.kernel.ctnetlink.filters import EVERYTHING


class Source(Protocol):
    """A table of connections: `kernel.ctnetlink.Table`, `conntrack.ebpf.EbpfSource`.

    All calls but `usage` may take long on large tables: use a thread.
    """

    @property
    def name(self) -> str:
        """``kernel`` or ``ebpf``."""
        ...

    def usage(self) -> Usage: ...
    def statistics(self) -> Mapping[str, int]:
        """Counters since the start, by name."""
        ...

    def flow_counts(self) -> Iterator[Mapping[FlowKey, int]]: ...
    def entries(self, filter_: Filter = EVERYTHING) -> Iterator[Entry]: ...
    def delete(self, filter_: Filter) -> None: ...
    def delete_entries(self, entries: Iterable[Entry]) -> int:
        """How many were still there."""
        ...


@runtime_checkable
class SeesSockets(Protocol):
    """A source whose data path needs no entries of some connections."""

    def untracked(self) -> Iterator[Entry]:
        """Those that are open, from the pods' sockets. For people who ask: dumps them all."""
        ...
