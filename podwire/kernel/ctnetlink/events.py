"""Entries that come, change and go, as it happens.

The kernel builds events only for entries made while somebody listens (nf_conntrack_events=2).
"""

from __future__ import annotations

import select
from enum import Enum
from typing import NamedTuple

from podwire.kernel import netlink
from podwire.kernel.ctnetlink.entries import Entry, Message, parse

_BUFFER_BYTES = 32 << 20


class EventKind(Enum):
    """`LOST`: the kernel dropped events; what is in the table must be read anew."""

    NEW = "NEW"
    UPDATE = "UPDATE"
    DESTROY = "DESTROY"
    LOST = "LOST"


_GROUPS = {EventKind.NEW: 1, EventKind.UPDATE: 2, EventKind.DESTROY: 3}


class Event(NamedTuple):
    """One event; the entry is parsed when it is asked for, since counting needs none."""

    kind: EventKind
    body: bytes

    @property
    def entry(self) -> Entry | None:
        return parse(self.body)


LOST = Event(EventKind.LOST, b"")


class Events:
    """Wait for `fileno()` to become readable, then `drain()`; or `wait()` for both."""

    def __init__(
        self,
        kinds: frozenset[EventKind] = frozenset(_GROUPS),
        netns_fd: int | None = None,
        buffer_bytes: int = _BUFFER_BYTES,
    ) -> None:
        groups = [_GROUPS[kind] for kind in kinds]
        self._socket = netlink.subscribe(netlink.NETFILTER, groups, netns_fd, buffer_bytes)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def wait(self, timeout_s: float) -> bool:
        """Whether something is there within the time."""
        return bool(select.select([self._socket], [], [], timeout_s)[0])

    def drain(self, most: int = 4096) -> list[Event]:
        """What is waiting, at most so many datagrams; `LOST` among them where some were dropped."""
        out: list[Event] = []
        for datagram in netlink.drain(self._socket, most):
            for message, flags, _, body in netlink.messages(datagram):
                out.append(Event(_kind(message, flags), body))
            if not datagram:
                out.append(LOST)
        return out


def _kind(message: int, flags: int) -> EventKind:
    if message == Message.DELETE:
        return EventKind.DESTROY
    return EventKind.NEW if flags & netlink.NLM_F_CREATE else EventKind.UPDATE
