"""Entries that come, change and go, as it happens.

The kernel builds events only for entries made while somebody listens (nf_conntrack_events=2).
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
from collections.abc import Iterator
from enum import Enum
from types import TracebackType
from typing import NamedTuple

from podwire.kernel import netlink, netns
from podwire.kernel.ctnetlink.entries import Entry, Message, parse

_ADD_MEMBERSHIP = 1
_SOL_NETLINK = 270
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 32 << 20
_HEADER = struct.Struct("=IHHII")


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
        self._socket = netns.socket(netns_fd, socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETFILTER)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)
        self._socket.bind((0, 0))
        for kind in kinds:
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUPS[kind])

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        receive = self._socket.recv
        with contextlib.suppress(BlockingIOError):
            for _ in range(most):
                try:
                    data = receive(8192)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    out.append(LOST)
                    continue
                out.extend(_events(data))
        return out


def _events(data: bytes) -> Iterator[Event]:
    offset = 0
    while offset + 16 <= len(data):
        length, message, flags, _, _ = _HEADER.unpack_from(data, offset)
        if message == Message.DELETE:
            kind = EventKind.DESTROY
        elif flags & netlink.NLM_F_CREATE:
            kind = EventKind.NEW
        else:
            kind = EventKind.UPDATE
        yield Event(kind, data[offset + 16 : offset + length])
        offset += (length + 3) & ~3
