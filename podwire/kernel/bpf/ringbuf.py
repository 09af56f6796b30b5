"""Reading a BPF ring buffer: two mappings, no system call per record."""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Iterator

from podwire.kernel.bpf.maps import Map

_BUSY, _DISCARD = 1 << 31, 1 << 30
_position = struct.Struct("=Q")


class RingBuffer:
    """Records in the order they were submitted. One reader at a time.

    `fileno` becomes readable when records wait (for asyncio's add_reader).
    """

    def __init__(self, map: Map) -> None:
        page = mmap.PAGESIZE
        self._size = map.info.max_entries
        self._consumer = mmap.mmap(map.fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(
            map.fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        # epoll forgets a file when its last descriptor closes: `map` may be closed before this is
        self._fd = os.dup(map.fd)
        self._epoll = select.epoll()
        self._epoll.register(self._fd, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def wait(self, timeout_s: float) -> bool:
        """Whether records wait, after at most `timeout_s`."""
        return bool(self._epoll.poll(timeout_s))

    def read(self) -> Iterator[bytes]:
        """The records that are there now; each is released when the next is asked for."""
        mask, page = self._size - 1, mmap.PAGESIZE
        at = _position.unpack_from(self._consumer)[0]
        while at < _position.unpack_from(self._producer)[0]:
            start = page + (at & mask)
            length = struct.unpack_from("=I", self._producer, start)[0]
            if length & _BUSY:
                return
            size = length & ~_DISCARD
            if not length & _DISCARD:
                yield self._producer[start + 8 : start + 8 + size]
            at += (size + 8 + 7) & ~7
            _position.pack_into(self._consumer, 0, at)

    def close(self) -> None:
        self._epoll.close()
        os.close(self._fd)
        self._consumer.close()
        self._producer.close()
