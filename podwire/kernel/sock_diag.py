"""The TCP sockets of a network namespace, as `ss` has them.

Sources: sock_diag(7); include/uapi/linux/inet_diag.h, tcp.h.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from podwire.kernel import netlink
from podwire.net import Address, Protocol

SOCK_DIAG = 4  # NETLINK_SOCK_DIAG
_BY_FAMILY = 20
_AF_INET, _AF_INET6 = 2, 10
_INFO = 2  # INET_DIAG_INFO
_ALL_STATES = 0xFFF
_ID = "2s2s16s16sI8s"  # ports, addresses, interface, cookie
_REQUEST = struct.Struct(f"=BBBxI{_ID}")  # family, protocol, extensions, states, id
_ANSWER = struct.Struct(f"=BBBB{_ID}IIIII")  # family, state, timer, retransmits, id, …
_TRAFFIC = struct.Struct("=QQII")  # bytes acknowledged and received, segments sent and received
_TRAFFIC_AT = 120  # in struct tcp_info
_MAPPED = bytes(10) + b"\xff\xff"


class State(IntEnum):
    """TCP_… of include/net/tcp_states.h."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
    NEW_SYN_RECV = 12


class Traffic(NamedTuple):
    """What a socket has sent that was acknowledged, and what it has received."""

    bytes_sent: int
    bytes_received: int
    segments_sent: int
    segments_received: int


class Socket(NamedTuple):
    """One end of a connection, or a listener. IPv4 in an IPv6 socket is IPv4."""

    state: State
    local: Address
    remote: Address
    local_port: int
    remote_port: int
    traffic: Traffic | None
    """None where the kernel keeps none (TIME_WAIT)."""


def tcp_sockets(netns_fd: int | None = None) -> list[Socket]:
    """All of the namespace (default: the caller's). Raises KernelError."""
    found: list[Socket] = []
    with netlink.NetlinkSocket(SOCK_DIAG, netns_fd) as sock:
        for family in (_AF_INET, _AF_INET6):
            blank = (b"", b"", b"", b"", 0, b"")
            extensions = 1 << (_INFO - 1)
            body = _REQUEST.pack(family, Protocol.TCP, extensions, _ALL_STATES << 1, *blank)
            found += map(_parse, sock.dump(_BY_FAMILY, body, "sockets"))
    return found


def _parse(body: bytes) -> Socket:
    family, state, _, _, *id_ = _ANSWER.unpack_from(body)[:10]
    local_port, remote_port = (int.from_bytes(port, "big") for port in id_[:2])
    local, remote = (_address(family, raw) for raw in id_[2:4])
    info = netlink.attributes(body, _ANSWER.size).get(_INFO, b"")
    traffic = None
    if len(info) >= _TRAFFIC_AT + _TRAFFIC.size:
        traffic = Traffic(*_TRAFFIC.unpack_from(info, _TRAFFIC_AT))
    return Socket(State(state), local, remote, local_port, remote_port, traffic)


def _address(family: int, raw: bytes) -> Address:
    if family == _AF_INET:
        return raw[:4]
    return raw[12:] if raw.startswith(_MAPPED) else raw
