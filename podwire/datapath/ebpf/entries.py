"""Connections as the kernel's table spells them, and as ours does: one entry there, two here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import NamedTuple

from podwire.datapath.ebpf.layout import (
    CONNECTION,
    FLOW,
    FRONTEND,
    FRONTEND_KEY,
    ConnectionFlag,
    ConnectionState,
    mapped,
    unmapped,
)
from podwire.kernel.ctnetlink import Entry, Status, TcpState, Tuple
from podwire.net import Address, Protocol

PROTOCOLS = frozenset({Protocol.TCP, Protocol.UDP, Protocol.SCTP})
"""Those whose connections are worth carrying over: an echo request is simply sent again."""
_HALF = ConnectionState.SEEN
_OPEN = ConnectionState.SEEN | ConnectionState.DATA
_DONE = _OPEN | ConnectionState.FIN
_STATES = {  # what the client's side and the server's have sent
    TcpState.SYN_SENT: (_HALF, ConnectionState(0)),
    TcpState.SYN_SENT2: (_HALF, _HALF),
    TcpState.SYN_RECV: (_HALF, _HALF),
    TcpState.ESTABLISHED: (_OPEN, _OPEN),
    TcpState.FIN_WAIT: (_DONE, _OPEN),
    TcpState.CLOSE_WAIT: (_DONE, _OPEN),
    TcpState.LAST_ACK: (_DONE, _DONE),
    TcpState.TIME_WAIT: (_DONE, _DONE),
    TcpState.CLOSE: (_OPEN | ConnectionState.RST, _OPEN),
}


class Node(NamedTuple):
    """What must be known of a node to tell whose a connection is."""

    own: frozenset[Address]
    """The addresses that its own processes have."""
    pods: frozenset[Address]
    """Those of its pods."""
    services: Mapping[bytes, int]
    """Numbers of Service ports by their frontends' keys."""


# --- from the kernel ------------------------------------------------------------------------------


def pairs(entry: Entry, node: Node, now_s: int) -> list[tuple[bytes, bytes]]:
    """Our two entries for one of the kernel's, the answers' first; none where we need none.

    Where a process of the node is one of the ends, netfilter goes on translating, between it and
    our programs: for them the connection is what it looks like outside, and they leave it alone.
    """
    original, reply = entry.original, entry.reply
    if original.protocol not in PROTOCOLS or entry.zone:
        return []
    client, server = original.source in node.own, reply.source in node.own
    translated = reply != original.reversed()
    there, back, flags = original, reply, ConnectionFlag.TRANSLATED
    if client or server:
        if client and server:
            return []  # on lo
        there = reply.reversed() if client else original
        back = there.reversed()
        flags = ConnectionFlag.STACK if translated else ConnectionFlag(0)
        if not translated and node.pods.isdisjoint((original.source, original.destination)):
            return []
    elif not translated:
        flags = ConnectionFlag(0)
    if original.protocol == Protocol.TCP and {original.source, reply.source} <= node.pods:
        flags |= ConnectionFlag.LOCAL
    number = service(original, node.services) if flags & ConnectionFlag.TRANSLATED else 0
    asked, answered = _states(entry)
    return [
        _ours(back, there.reversed(), now_s, number, answered, flags | ConnectionFlag.REPLY),
        _ours(there, back.reversed(), now_s, number, asked, flags),
    ]


def is_carried(entry: Entry, own: Set[Address]) -> bool:
    """Whether our programs alone carry the connection, so that netfilter sees nothing of it.

    `own` are the addresses that the node's own processes have.
    """
    ends = (entry.original.source, entry.reply.source)
    return entry.original.protocol in PROTOCOLS and own.isdisjoint(ends)


def is_over(entry: Entry) -> bool:
    """Whether both ends are done, so that the client may use its port for another connection."""
    ended = (TcpState.TIME_WAIT, TcpState.CLOSE)
    return entry.original.protocol == Protocol.TCP and entry.state in ended


def service(original: Tuple, services: Mapping[bytes, int]) -> int:
    """The Service port that a packet to this destination addresses, or 0."""
    port, protocol = original.destination_port.to_bytes(2, "big"), original.protocol
    any_node = bytes(len(original.destination))  # NodePorts
    for address in (original.destination, any_node):
        found = services.get(FRONTEND_KEY.pack(mapped(address), port, protocol))
        if found:
            return found
    return 0


def _states(entry: Entry) -> tuple[ConnectionState, ConnectionState]:
    if entry.original.protocol == Protocol.TCP:
        return _STATES.get(TcpState(entry.state or 0), (_OPEN, _OPEN))
    if not entry.status & Status.SEEN_REPLY:
        return _HALF, ConnectionState(0)
    return (_OPEN, _OPEN) if entry.original.protocol == Protocol.SCTP else (_HALF, _HALF)


def _ours(
    direction: Tuple,
    to: Tuple,
    now_s: int,
    service: int,
    state: ConnectionState,
    flags: ConnectionFlag,
) -> tuple[bytes, bytes]:
    flags |= ConnectionFlag.COPIED
    return flow(direction), CONNECTION.pack(flow(to), now_s, service, state, flags)


def services(frontends: Mapping[bytes, bytes]) -> dict[bytes, int]:
    """Numbers of Service ports by frontend, from the map of that name."""
    return {key: FRONTEND.unpack(value)[0] for key, value in frontends.items()}


# --- to the kernel --------------------------------------------------------------------------------


def kernel_entries(held: Mapping[bytes, bytes]) -> Iterator[tuple[Entry, ConnectionFlag]]:
    """The connections of our table, each by its original direction, with our flags.

    What has no answers' entry of its own is left out: a socket may have told of one end of a
    connection that is translated (bpf/adopt.bpf.c).
    """
    for key, value in held.items():
        to, _, _, state, flags = CONNECTION.unpack(value)
        led = bool(flags & ConnectionFlag.LED)
        pair = held.get(reversed_flow(key if led else to))
        if flags & ConnectionFlag.REPLY or pair is None:
            continue
        back, _, _, answered, _ = CONNECTION.unpack(pair)
        if led or back == reversed_flow(key):
            # with DSR, answers go another way
            seen = answered or (ConnectionState.SEEN if flags & ConnectionFlag.DSR else 0)
            entry = _entry(key, to, ConnectionState(state), ConnectionState(seen))
            yield entry, ConnectionFlag(flags)


def _entry(key: bytes, to: bytes, asked: ConnectionState, answered: ConnectionState) -> Entry:
    original, reply = _tuple(key), _tuple(reversed_flow(to))
    status = Status.CONFIRMED
    if answered:
        status |= Status.SEEN_REPLY | Status.ASSURED
    if (reply.source, reply.source_port) != (original.destination, original.destination_port):
        status |= Status.DST_NAT
    if (reply.destination, reply.destination_port) != (original.source, original.source_port):
        status |= Status.SRC_NAT
    tcp = original.protocol == Protocol.TCP
    return Entry(original, reply, status, state=_tcp_state(asked, answered) if tcp else None)


def _tcp_state(asked: ConnectionState, answered: ConnectionState) -> TcpState:
    """The nearest of the kernel's states, from what the client's side and the server's sent."""
    if (asked | answered) & ConnectionState.RST:
        return TcpState.CLOSE
    if asked & answered & ConnectionState.FIN:
        return TcpState.TIME_WAIT
    if (asked | answered) & ConnectionState.FIN:
        return TcpState.FIN_WAIT
    if asked & ConnectionState.DATA:
        return TcpState.ESTABLISHED
    return TcpState.SYN_RECV if answered else TcpState.SYN_SENT


# --- flows ----------------------------------------------------------------------------------------


def flow(direction: Tuple) -> bytes:
    """The key of one direction."""
    return FLOW.pack(
        mapped(direction.source),
        mapped(direction.destination),
        direction.source_port.to_bytes(2, "big"),
        direction.destination_port.to_bytes(2, "big"),
        direction.protocol,
    )


def reversed_flow(packed: bytes) -> bytes:
    source, destination, source_port, destination_port, protocol = FLOW.unpack(packed)
    return FLOW.pack(destination, source, destination_port, source_port, protocol)


def _tuple(packed: bytes) -> Tuple:
    source, destination, source_port, destination_port, protocol = FLOW.unpack(packed)
    return Tuple(
        unmapped(source),
        unmapped(destination),
        protocol,
        int.from_bytes(source_port, "big"),
        int.from_bytes(destination_port, "big"),
    )
