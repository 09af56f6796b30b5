"""What changes in a namespace, as it happens: links, addresses, routes, rules, neighbours.

Reconcilers listen instead of listing again and again.

Source: rtnetlink(7); include/uapi/linux/rtnetlink.h (RTNLGRP_*).
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from podwire.kernel import netlink


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

_BUFFER_BYTES = 8 << 20


class Monitor:
    """Wait for `fileno()` to become readable, then `drain()`."""

    def __init__(self, groups: list[Group], netns_fd: int | None = None) -> None:
        self._socket = netlink.subscribe(netlink.ROUTE, groups, netns_fd, _BUFFER_BYTES)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def drain(self) -> list[Event]:
        """All notifications that are waiting; `LOST` among them where some were dropped."""
        events: list[Event] = []
        for datagram in netlink.drain(self._socket):
            events += [Event(kind, body) for kind, _, _, body in netlink.messages(datagram)]
            if not datagram:
                events.append(LOST)
        return events
