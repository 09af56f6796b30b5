"""The eBPF data path's own connection map, read like the kernel's table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from podwire.datapath.ebpf.entries import flow, kernel_entries
from podwire.datapath.ebpf.programs import Programs
from podwire.errors import KernelError
from podwire.kernel import netns
from podwire.kernel.ctnetlink import (
    Counters,
    Entry,
    Filter,
    FlowKey,
    Status,
    TcpState,
    Tuple,
    Usage,
)
from podwire.kernel.ctnetlink.counting import MOST_KEYS, flow_key
from podwire.kernel.ctnetlink.filters import EVERYTHING
from podwire.kernel.sock_diag import Socket, State, tcp_sockets
from podwire.net import Protocol
from podwire.services.model import is_loopback

_STATES = {  # as netfilter would call them
    State.ESTABLISHED: TcpState.ESTABLISHED,
    State.SYN_SENT: TcpState.SYN_SENT,
    State.SYN_RECV: TcpState.SYN_RECV,
    State.NEW_SYN_RECV: TcpState.SYN_RECV,
    State.FIN_WAIT1: TcpState.FIN_WAIT,
    State.FIN_WAIT2: TcpState.FIN_WAIT,
    State.TIME_WAIT: TcpState.TIME_WAIT,
    State.CLOSE_WAIT: TcpState.CLOSE_WAIT,
    State.LAST_ACK: TcpState.LAST_ACK,
    State.CLOSING: TcpState.LAST_ACK,
}
_ANSWERED = _STATES.keys() - {State.SYN_SENT, State.SYN_RECV, State.NEW_SYN_RECV}


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
        """Packets lost for want of room or ports, connections forgotten early."""
        outcomes = self._programs.outcomes()
        names = {"evicted": "early_drop"}  # as netfilter calls it
        return {
            names.get(name, name): outcomes.get(name, 0)
            for name in ("connections_full", "ports_exhausted", "evicted")
        }

    def entries(self, filter_: Filter = EVERYTHING) -> Iterator[Entry]:
        """The connections that fit, by their original direction."""
        for entry, _ in kernel_entries(dict(self._items())):
            if filter_.fits(entry):
                yield entry

    def untracked(self) -> Iterator[Entry]:
        """Open TCP connections of the node's pods that need no entry here, from their sockets.

        Told from entries by their status, which is not CONFIRMED. Dumps every pod's sockets.
        """
        table = self._programs.growing["connections"].map
        seen: set[Tuple] = set()
        for path in dict(self._programs.namespaces).values():
            for entry in _open_in(path):
                keys = (flow(entry.original), flow(entry.reply))
                if entry.original in seen or any(map(table.lookup, keys)):
                    continue
                seen.add(entry.original)
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


def _open_in(path: str) -> Iterator[Entry]:
    """The TCP connections of a namespace; none when it is gone."""
    try:
        fd = netns.open_path(path)
    except KernelError:
        return
    try:
        sockets = tcp_sockets(fd)
    finally:
        os.close(fd)
    served = {each.local_port for each in sockets if each.state is State.LISTEN}
    for each in sockets:
        if each.state in _STATES and each.local != each.remote and not is_loopback(each.local):
            yield _entry(each, serves=each.local_port in served)


def _entry(socket: Socket, *, serves: bool) -> Entry:
    there = Tuple(socket.local, socket.remote, Protocol.TCP, socket.local_port, socket.remote_port)
    sent = received = None
    if socket.traffic is not None:
        sent = Counters(socket.traffic.segments_sent, socket.traffic.bytes_sent)
        received = Counters(socket.traffic.segments_received, socket.traffic.bytes_received)
    state = _STATES[socket.state]
    status = Status.SEEN_REPLY | Status.ASSURED if socket.state in _ANSWERED else Status(0)
    if serves:
        there, sent, received = there.reversed(), received, sent
    return Entry(there, there.reversed(), status, state=state, counters_original=sent,
                 counters_reply=received)  # fmt: skip
