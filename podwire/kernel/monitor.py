"""What changes in a namespace, as it happens: links, addresses, routes, rules, neighbours.

Reconcilers listen instead of listing again and again.

Source: rtnetlink(7); include/uapi/linux/rtnetlink.h (RTNLGRP_*).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from enum import IntEnum
from typing import NamedTuple

from podwire.kernel import netlink, netns


class Group(IntEnum):
    """Multicast groups of rtnetlink."""

    LINK = 1
    NEIGHBOUR = 3
    IPV4_ADDRESS = 5
    IPV4_ROUTE = 7
    IPV4_RULE = 8
    IPV6_ADDRESS = 9
    IPV6_ROUTE = 11
    IPV6_RULE = 19


class Event(NamedTuple):
    """A notification: the message's type (RTM_…) and body, for the `parse` of its module."""

    type: int
    body: bytes


LOST = Event(0, b"")  # the kernel could not queue everything: look for yourself

_ADD_MEMBERSHIP = 1
_SOL_NETLINK = 270
_SO_RCVBUFFORCE = 33
_HEADER = struct.Struct("=IHHII")


class Monitor:
    """Wait for `fileno()` to become readable, then `drain()`."""

    def __init__(self, groups: list[Group], netns_fd: int | None = None) -> None:
        self._socket = netns.socket(netns_fd, socket.AF_NETLINK, socket.SOCK_RAW, netlink.ROUTE)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
        self._socket.bind((0, 0))
        for group in groups:
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def drain(self) -> list[Event]:
        """All notifications that are waiting; `LOST` among them where some were dropped."""
        events: list[Event] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    data = self._socket.recv(65536)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    events.append(LOST)
                    continue
                offset = 0
                while offset + 16 <= len(data):
                    length, kind, *_ = _HEADER.unpack_from(data, offset)
                    events.append(Event(kind, data[offset + 16 : offset + length]))
                    offset += (length + 3) & ~3
        return events
