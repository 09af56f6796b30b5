"""Many connections at once, without waiting for any alone: who reaches whom, by real packets.

All sockets live in this process, each made inside its namespace. A connection has come about when
the server has seen it and the client has heard from the server (SCTP, of which this kernel has no
sockets: when an INIT made by hand has arrived). One that has not is called blocked a moment after
everything that must connect has connected, and after control connections from the servers' own
nodes, which policies never stop.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TypeAlias

from podwire.kernel import netns
from podwire.net import Protocol, format_address

PATIENCE_S = 20.0  # only what fails takes so long
SETTLE_S = 0.05
REPEAT_S = 0.5

Cell: TypeAlias = tuple[str, str]
_FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}


@dataclass(frozen=True)
class Attempt:
    """One connection to try. `arrivals`: namespaces and ports where it may come out."""

    cell: Cell
    protocol: Protocol
    fd: int
    source: bytes
    destination: bytes
    port: int
    arrivals: tuple[tuple[int, int], ...]
    expected: bool


class Prober:
    """Keeps servers open between probes; `forget` closes those of a namespace that goes."""

    def __init__(self) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._servers: dict[tuple[int, int, Protocol, int], list[socket.socket]] = {}
        self._raw: dict[tuple[int, int], socket.socket] = {}
        self._raw_clients: dict[tuple[int, bytes], socket.socket] = {}
        self._waiting: dict[tuple[int, bytes, int, int], Callable[[], None]] = {}
        self._last_port = 19999
        self._held: list[socket.socket] = []

    def close(self) -> None:
        for fd in {key[0] for key in (*self._servers, *self._raw, *self._raw_clients)}:
            self.forget(fd)
        self._poll.close()

    def forget(self, fd: int) -> None:
        """Close everything that lives in the namespace."""
        for key in [key for key in self._servers if key[0] == fd]:
            for one in self._servers.pop(key):
                self._drop(one)
        for key in [key for key in self._raw if key[0] == fd]:
            self._drop(self._raw.pop(key))
        for key in [key for key in self._raw_clients if key[0] == fd]:
            self._raw_clients.pop(key).close()

    def probe(self, attempts: Iterable[Attempt], controls: Iterable[Attempt]) -> set[Attempt]:
        """Those that got through; the controls must. Raises AssertionError if one does not."""
        attempts, controls = list(attempts), list(controls)
        connected: set[Attempt] = set()
        self._start((*attempts, *controls), connected)
        waited_for = {a for a in (*attempts, *controls) if a.expected}
        deadline = time.monotonic() + PATIENCE_S
        again = time.monotonic() + REPEAT_S
        while (late := waited_for - connected) and time.monotonic() < deadline:
            self._turn(0.05)
            if time.monotonic() > again:  # a busy machine loses datagrams; TCP repeats by itself
                again += REPEAT_S
                self._start((a for a in late if a.protocol is not Protocol.TCP), connected)
        quiet = time.monotonic() + SETTLE_S
        while (left := quiet - time.monotonic()) > 0:
            self._turn(left)
        for one in self._held:
            self._drop(one)
        self._held.clear()
        self._waiting.clear()
        missing = [control for control in controls if control not in connected]
        if missing:
            raise AssertionError(f"controls did not connect: {missing[0].cell}, {len(missing)}")
        return connected

    def _start(self, attempts: Iterable[Attempt], connected: set[Attempt]) -> None:
        """Namespace by namespace: entering one costs as much as all else."""
        start = {
            Protocol.TCP: self._connect,
            Protocol.UDP: self._send,
            Protocol.SCTP: self._initiate,
        }
        for fd, group in groupby(sorted(attempts, key=attrgetter("fd")), attrgetter("fd")):
            with netns.entered(fd):
                for attempt in group:
                    start[attempt.protocol](attempt, connected)
                    self._turn(0)

    # --- events ---

    def _watch(self, one: socket.socket, events: int, handler: Callable[[], None]) -> None:
        one.setblocking(False)
        self._handlers[one.fileno()] = handler
        self._poll.register(one.fileno(), events)

    def _drop(self, one: socket.socket) -> None:
        if self._handlers.pop(one.fileno(), None) is not None:
            with contextlib.suppress(FileNotFoundError):
                self._poll.unregister(one.fileno())
        one.close()

    def _turn(self, timeout_s: float) -> None:
        for fileno, _ in self._poll.poll(timeout_s, 512):
            handler = self._handlers.get(fileno)
            if handler is not None:
                handler()

    # --- servers ---

    def serve(self, fd: int, protocol: Protocol, port: int, size: int) -> None:
        """Listen in a namespace for a family (address size 4 or 16)."""
        if protocol is Protocol.SCTP:
            self._raw_socket(fd, size)
            return
        key = (fd, size, protocol, port)
        if key in self._servers:
            return
        kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
        one = netns.socket(fd, _FAMILY[size], kind)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if size == 16:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(("::" if size == 16 else "0.0.0.0", port))
        self._servers[key] = [one]
        if protocol is Protocol.TCP:
            one.listen(512)
            self._watch(one, select.EPOLLIN, lambda: self._accept(one))
        else:
            self._watch(one, select.EPOLLIN, lambda: self._answer(one))

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                one, _ = server.accept()
                one.send(b"!")
                self._held.append(one)

    def _answer(self, server: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                data, peer = server.recvfrom(64)
                server.sendto(data, peer)

    def _raw_socket(self, fd: int, size: int) -> socket.socket:
        key = (fd, size)
        if key not in self._raw:
            one = netns.socket(fd, _FAMILY[size], socket.SOCK_RAW, Protocol.SCTP)
            self._raw[key] = one
            self._watch(one, select.EPOLLIN, lambda: self._hear(fd, size, one))
        return self._raw[key]

    def _hear(self, fd: int, size: int, one: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, peer = one.recvfrom(256)
                if size == 4:
                    data = data[(data[0] & 15) * 4 :]
                source, port = struct.unpack(">HH", data[:4])
                packed = socket.inet_pton(_FAMILY[size], peer[0].partition("%")[0])
                arrived = self._waiting.get((fd, packed, source, port))
                if arrived is not None:
                    arrived()

    # --- clients ---

    def _port(self) -> int:
        """A source port that nobody has used for long: no connection of an earlier case's pod of
        the same address matches.
        """
        self._last_port = 20000 + (self._last_port + 1 - 20000) % 40000
        return self._last_port

    def _client(self, attempt: Attempt, kind: int) -> socket.socket:
        """Of the namespace that the thread is in, the attempt's."""
        one = socket.socket(_FAMILY[len(attempt.source)], kind)
        self._held.append(one)
        while True:
            try:
                one.bind((format_address(attempt.source), self._port()))
                return one
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise

    def _connect(self, attempt: Attempt, connected: set[Attempt]) -> None:
        one = self._client(attempt, socket.SOCK_STREAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        def heard() -> None:
            with contextlib.suppress(OSError):
                if one.recv(1):
                    connected.add(attempt)
            self._handlers.pop(one.fileno(), None)
            self._poll.unregister(one.fileno())

        self._watch(one, select.EPOLLIN | select.EPOLLERR, heard)
        with contextlib.suppress(BlockingIOError, OSError):
            one.connect((format_address(attempt.destination), attempt.port))

    def _send(self, attempt: Attempt, connected: set[Attempt]) -> None:
        one = self._client(attempt, socket.SOCK_DGRAM)

        def heard() -> None:
            with contextlib.suppress(OSError):
                if one.recv(64):
                    connected.add(attempt)

        self._watch(one, select.EPOLLIN, heard)
        with contextlib.suppress(OSError):
            one.sendto(b"?", (format_address(attempt.destination), attempt.port))

    def _raw_client(self, fd: int, source: bytes) -> socket.socket:
        if (fd, source) not in self._raw_clients:
            one = netns.socket(fd, _FAMILY[len(source)], socket.SOCK_RAW, Protocol.SCTP)
            one.bind((format_address(source), 0))
            self._raw_clients[fd, source] = one
        return self._raw_clients[fd, source]

    def _initiate(self, attempt: Attempt, connected: set[Attempt]) -> None:
        raw = self._raw_client(attempt.fd, attempt.source)
        port = self._port()
        packet = sctp_init(port, attempt.port)
        for fd, target in attempt.arrivals:
            place = (fd, attempt.source, port, target)
            self._waiting[place] = lambda: connected.add(attempt)
        with contextlib.suppress(OSError):
            raw.sendto(packet, (format_address(attempt.destination), 0))


def sctp_init(source: int, destination: int) -> bytes:
    """An INIT chunk (RFC 9260, section 3.3.2) with a right checksum: conntrack looks."""
    chunk = struct.pack(">BBHIIHHI", 1, 0, 20, 0x1234, 65536, 1, 1, 1)
    packet = struct.pack(">HHII", source, destination, 0, 0) + chunk
    return packet[:8] + struct.pack("<I", crc32c(packet)) + packet[12:]


def _crc_table() -> list[int]:
    table: list[int] = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """Castagnoli's (RFC 9260, appendix A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF
