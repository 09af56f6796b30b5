"""A policy data path that also cuts established connections which the policies no longer allow.

Without it they are kept: a policy decides about connections when they begin. Cutting is to delete
the entry in the connection table; the next packet is then the first of a new connection and judged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

from podwire.agent.logs import event
from podwire.datapath import Part, Requirement
from podwire.errors import KernelError
from podwire.kernel import address
from podwire.kernel.ctnetlink import Table
from podwire.kernel.ctnetlink.entries import Entry, TcpState
from podwire.net import Address, Protocol
from podwire.policy import Packet, PolicyTable

log = logging.getLogger("podwire.agent.cutting")

_OVER = (TcpState.LAST_ACK, TcpState.TIME_WAIT, TcpState.CLOSE)


class CuttingPart:
    """Delegates to `path`; connections are judged after every change, by `flush`."""

    def __init__(self, path: Part[PolicyTable], netns_fd: int | None = None) -> None:
        self._path, self._netns = path, netns_fd
        self._connections: Table | None = None
        self._applied: PolicyTable | None = None
        self._judged: PolicyTable | None = None
        self._cut = 0

    @property
    def requirements(self) -> Sequence[Requirement]:
        return self._path.requirements

    def start(self) -> None:
        self._path.start()
        self._connections = Table(self._netns)

    def apply(self, table: PolicyTable) -> None:
        self._path.apply(table)
        self._applied = table

    def flush(self) -> None:
        self._path.flush()
        self._judge()

    def verify(self) -> list[str]:
        return self._path.verify()

    def cleanup(self) -> None:
        self._path.cleanup()

    def status(self) -> dict[str, object]:
        return {**self._path.status(), "connections cut": self._cut}

    def _judge(self) -> None:
        table, before = self._applied, self._judged
        if table is None or self._connections is None:
            return
        delta = table.delta(before)
        if not (delta.addresses or delta.endpoints or delta.rule_sets or delta.intervals):
            return
        try:
            own = address.own(self._netns)
            gone = list(denied(table, self._connections.entries(), own))
            self._connections.delete_entries(gone)
        except KernelError as error:
            event(log, logging.ERROR, "connections not judged", error=error)
            return
        self._judged = table
        self._cut += len(gone)
        if gone:
            event(log, logging.INFO, "connections cut", count=len(gone))


def denied(
    table: PolicyTable, entries: Iterable[Entry], own: frozenset[Address]
) -> Iterator[Entry]:
    """Connections of this node's pods that the table denies; `own`: the node's addresses."""
    ours = {one for endpoint in table.endpoints.values() for one in endpoint.addresses}
    for entry in entries:
        source, destination = entry.original.source, entry.reply.source
        if source in own or not (source in ours or destination in ours):
            continue
        if entry.original.protocol == Protocol.TCP and entry.state in _OVER:
            continue
        packet = Packet(
            source,
            destination,
            entry.original.protocol,
            entry.reply.source_port,
            via_service=entry.original.destination != destination,
        )
        if not table.judge(packet).allowed:
            yield entry


def open_and_denied(before: PolicyTable, after: PolicyTable) -> list[Entry]:
    """Connections of this node that `before` allows and `after` would deny."""
    with Table() as connections:
        found = list(denied(after, connections.entries(), address.own()))
    already = set(denied(before, found, frozenset()))
    return [entry for entry in found if entry not in already]
