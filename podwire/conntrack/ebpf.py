"""The eBPF data path's own connection map, read like the kernel's table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from podwire.datapath.ebpf.layout import CONNECTION, FLOW, mapped, unmapped
from podwire.datapath.ebpf.programs import Programs
from podwire.kernel.ctnetlink import Entry, Filter, FlowKey, Status, TcpState, Tuple, Usage
from podwire.kernel.ctnetlink.counting import MOST_KEYS, flow_key
from podwire.kernel.ctnetlink.filters import EVERYTHING
from podwire.net import Protocol

_REPLY, _DSR = 2, 16  # connection_flag of bpf/conntrack.h
_DATA, _FIN, _RST = 2, 4, 8  # connection_state


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
        unanswered = {
            key
            for key, value in self._items()
            if (fields := CONNECTION.unpack(value))[4] & _REPLY and not fields[3]
        }
        for key, value in self._items():
            to, _, _, state, flags = CONNECTION.unpack(value)
            if flags & _REPLY:
                continue
            # with DSR, answers go another way
            answered = bool(flags & _DSR) or _reversed(to) not in unanswered
            entry = _entry(key, to, state, answered=answered)
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
            gone += table.delete(_key(entry.original))
            table.delete(_key(entry.reply))
        return gone

    def _items(self) -> Iterator[tuple[bytes, bytes]]:
        return self._programs.growing["connections"].map.items()


def _entry(key: bytes, to: bytes, state: int, *, answered: bool) -> Entry:
    original, reply = _tuple(key), _tuple(_reversed(to))
    status = Status.CONFIRMED
    if answered:
        status |= Status.SEEN_REPLY | Status.ASSURED
    if (reply.source, reply.source_port) != (original.destination, original.destination_port):
        status |= Status.DST_NAT
    if (reply.destination, reply.destination_port) != (original.source, original.source_port):
        status |= Status.SRC_NAT
    tcp = original.protocol == Protocol.TCP
    return Entry(original, reply, status, state=_tcp_state(state, answered) if tcp else None)


def _tcp_state(state: int, answered: bool) -> TcpState:
    """The nearest of the kernel's states, from what the client's side has sent."""
    if state & _RST:
        return TcpState.CLOSE
    if state & _FIN:
        return TcpState.FIN_WAIT
    if state & _DATA:
        return TcpState.ESTABLISHED
    return TcpState.SYN_RECV if answered else TcpState.SYN_SENT


def _tuple(packed: bytes) -> Tuple:
    source, destination, source_port, destination_port, protocol = FLOW.unpack(packed)
    return Tuple(
        unmapped(source),
        unmapped(destination),
        protocol,
        int.from_bytes(source_port, "big"),
        int.from_bytes(destination_port, "big"),
    )


def _key(direction: Tuple) -> bytes:
    return FLOW.pack(
        mapped(direction.source),
        mapped(direction.destination),
        direction.source_port.to_bytes(2, "big"),
        direction.destination_port.to_bytes(2, "big"),
        direction.protocol,
    )


def _reversed(packed: bytes) -> bytes:
    source, destination, source_port, destination_port, protocol = FLOW.unpack(packed)
    return FLOW.pack(destination, source, destination_port, source_port, protocol)
