"""The netlink wire: attributes, batched requests, extended acks, dumps that are whole.

This is the hot path of podwire: one pod must cost a handful of system calls. So requests are plain
bytes, many of them go out in one `sendmsg`, and only the last one asks for an acknowledgement:
the kernel works a datagram off in order before `sendmsg` returns, and reports errors unasked.

Messages live in their own modules (`link`, `address`, `route`, `rule`, `neighbour`, `tc`):
functions that return a `Request`, and NamedTuples for what the kernel reports.

Sources: RFC 3549; Documentation/userspace-api/netlink/intro.rst; include/uapi/linux/netlink.h.
"""

from __future__ import annotations

import errno as errnos
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from podwire.errors import KernelError
from podwire.kernel import netns

ROUTE = 0
NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
_NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSGERR_ATTR_MSG = 1

SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33

_NLA_F_NESTED = 0x8000
_NLA_TYPE = 0x3FFF

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
HEADER_BYTES = 16
_ATTR = struct.Struct("=HH")
_U8 = struct.Struct("=HHB3x")
_U16 = struct.Struct("=HHH2x")
_U32 = struct.Struct("=HHI")
_U64 = struct.Struct("=HHQ")
_S32 = struct.Struct("=i")
_PAD = (b"", b"\0", b"\0\0", b"\0\0\0")

_BATCH_BYTES = 64 * 1024
_BATCH_REQUESTS = 512  # at worst each answers with an error of about 1 kB of socket memory
_BUFFER_BYTES = 4 << 20
_DUMP_TRIES = 10


def attr(kind: int, payload: bytes) -> bytes:
    """One attribute with its padding."""
    length = len(payload) + 4
    return _ATTR.pack(length, kind) + payload + _PAD[-length & 3]


def u8(kind: int, value: int) -> bytes:
    return _U8.pack(5, kind, value)


def u16(kind: int, value: int) -> bytes:
    return _U16.pack(6, kind, value)


def u32(kind: int, value: int) -> bytes:
    """A 32-bit attribute in host order."""
    return _U32.pack(8, kind, value)


def u64(kind: int, value: int) -> bytes:
    return _U64.pack(12, kind, value)


def text(kind: int, value: str) -> bytes:
    """A NUL-terminated string."""
    return attr(kind, value.encode() + b"\0")


def nest(kind: int, *attributes: bytes) -> bytes:
    """An attribute made of attributes."""
    return attr(kind | _NLA_F_NESTED, b"".join(attributes))


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes of a message or nest from `offset` on; of a repeated one, the last."""
    found: dict[int, bytes] = {}
    unpack = _ATTR.unpack_from
    end = len(data) - 3
    while offset < end:
        length, kind = unpack(data, offset)
        if length < 4:
            break
        found[kind & _NLA_TYPE] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def each_attribute(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Like `attributes`, in order and with repetitions (lists)."""
    end = len(data) - 3
    while offset < end:
        length, kind = _ATTR.unpack_from(data, offset)
        if length < 4:
            return
        yield kind & _NLA_TYPE, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """One message: header and body."""
    return _HEADER.pack(HEADER_BYTES + len(body), kind, flags, sequence, 0) + body


def messages(datagram: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The messages of a datagram as ``(type, flags, sequence, body)``."""
    offset = 0
    while offset + HEADER_BYTES <= len(datagram):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(datagram, offset)
        yield kind, flags, sequence, datagram[offset + HEADER_BYTES : offset + length]
        offset += (length + 3) & ~3


def number(payload: bytes) -> int:
    """An unsigned integer of any width in host order."""
    return int.from_bytes(payload, sys.byteorder)


def string(payload: bytes) -> str:
    """A NUL-terminated string."""
    return payload.rstrip(b"\0").decode(errors="replace")


class Request(NamedTuple):
    """One message to the kernel.

    `what` completes the sentence "cannot …" of an error. Errors listed in `tolerate` (positive
    errno) count as success: ``delete(...).tolerating(ENOENT)``.
    """

    type: int
    flags: int
    body: bytes
    what: str
    tolerate: tuple[int, ...] = ()

    def tolerating(self, *errno: int) -> Request:
        return self._replace(tolerate=self.tolerate + errno)


class Failure(NamedTuple):
    """A request that the kernel refused."""

    request: Request
    errno: int
    extack: str

    def error(self) -> KernelError:
        return KernelError(
            f"cannot {self.request.what}: {os.strerror(self.errno)}",
            errno=self.errno,
            extack=self.extack,
        )


class NetlinkSocket:
    """A netlink socket of one network namespace, usable from any thread in any namespace.

    `netns_fd` is the namespace it belongs to (default: the caller's). One exchange runs at a time;
    others wait.
    """

    def __init__(self, protocol: int = ROUTE, netns_fd: int | None = None) -> None:
        self._socket = netns.socket(netns_fd, socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._sequence = 0
        self._lock = threading.Lock()
        for level, option, value in _OPTIONS:
            self._socket.setsockopt(level, option, value)

    def __enter__(self) -> NetlinkSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def run(self, *requests: Request) -> list[bytes]:
        """Send all requests at once, in order; return the bodies of what the kernel answered.

        The kernel goes on after a refused request. Raises KernelError for the first one, with the
        kernel's own sentence.
        """
        replies, failures = self.attempt(requests)
        if failures:
            error = failures[0].error()
            for failure in failures[1:6]:
                error.add_note(str(failure.error()))
            raise error
        return replies

    def attempt(self, requests: Sequence[Request]) -> tuple[list[bytes], list[Failure]]:
        """Like `run`, but hand back the refused requests."""
        replies: list[bytes] = []
        failures: list[Failure] = []
        with self._lock:
            for batch in _batches(requests):
                self._exchange(batch, replies, failures)
        return replies, failures

    def dump(self, kind: int, body: bytes, what: str) -> list[bytes]:
        """The bodies of a table, consistent: a dump that a change cut through is made again.

        Raises KernelError, also (EINTR) when the table never held still.
        """
        request = Request(kind, NLM_F_DUMP, body, f"list {what}")
        with self._lock:
            for _ in range(_DUMP_TRIES):
                bodies, interrupted = self._dump(request)
                if not interrupted:
                    return bodies
        raise Failure(request, errnos.EINTR, "the table changed during every try").error()

    def _exchange(
        self, requests: Sequence[Request], replies: list[bytes], failures: list[Failure]
    ) -> None:
        first = self._sequence + 1
        last = self._sequence = self._sequence + len(requests)
        out: list[bytes] = []
        for sequence, (kind, flags, body, _, _) in enumerate(requests, first):
            flags |= NLM_F_REQUEST if sequence != last else NLM_F_REQUEST | NLM_F_ACK
            out.append(message(kind, flags, sequence, body))
        self._send(b"".join(out))
        while True:
            for kind, flags, sequence, body in self._receive():
                if not first <= sequence <= last:
                    continue  # a late answer to an exchange that an exception cut short
                if kind != NLMSG_ERROR:
                    replies.append(body)
                    continue
                failure = _failure(requests[sequence - first], kind, flags, body)
                if failure and failure.errno not in failure.request.tolerate:
                    failures.append(failure)
                if sequence == last:
                    return

    def _dump(self, request: Request) -> tuple[list[bytes], bool]:
        self._sequence += 1
        sequence = self._sequence
        self._send(message(request.type, request.flags | NLM_F_REQUEST, sequence, request.body))
        bodies: list[bytes] = []
        interrupted = False
        while True:
            for kind, flags, answered, body in self._receive():
                if answered != sequence:
                    continue
                interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                if kind > NLMSG_DONE:
                    bodies.append(body)
                    continue
                failure = _failure(request, kind, flags, body)
                if failure and failure.errno != errnos.EINTR:
                    raise failure.error()
                return bodies, interrupted or failure is not None

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise broken("write to", error) from None

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            datagram = self._socket.recv(_BATCH_BYTES)
        except OSError as error:
            raise broken("read from", error) from None
        return messages(datagram)


_OPTIONS = (
    (SOL_NETLINK, NETLINK_EXT_ACK, 1),
    (SOL_NETLINK, NETLINK_CAP_ACK, 1),
    (SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1),
    (socket.SOL_SOCKET, SO_SNDBUFFORCE, _BUFFER_BYTES),
    (socket.SOL_SOCKET, SO_RCVBUFFORCE, _BUFFER_BYTES),
)


def subscribe(
    protocol: int, groups: Iterable[int], netns_fd: int | None, buffer_bytes: int
) -> socket.socket:
    """A socket that gets what is sent to these multicast groups; it does not block."""
    subscribed = netns.socket(netns_fd, socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    subscribed.setblocking(False)
    subscribed.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer_bytes)
    subscribed.bind((0, 0))
    for group in groups:
        subscribed.setsockopt(SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
    return subscribed


def drain(subscribed: socket.socket, most: int = sys.maxsize) -> Iterator[bytes]:
    """The datagrams that are waiting, at most so many; an empty one where some were dropped."""
    for _ in range(most):
        try:
            yield subscribed.recv(_BATCH_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errnos.ENOBUFS:
                raise broken("read from", error) from None
            yield b""


def broken(verb: str, error: OSError) -> KernelError:
    """What to raise when the socket itself fails."""
    errno = error.errno or 0
    return KernelError(f"cannot {verb} the netlink socket: {os.strerror(errno)}", errno=errno)


def _batches(requests: Sequence[Request]) -> Iterable[Sequence[Request]]:
    start = size = 0
    for i, request in enumerate(requests):
        length = len(request.body) + 16
        if size and (size + length > _BATCH_BYTES or i - start == _BATCH_REQUESTS):
            yield requests[start:i]
            start, size = i, 0
        size += length
    if size:
        yield requests[start:]


def _failure(request: Request, kind: int, flags: int, body: bytes) -> Failure | None:
    """What an NLMSG_ERROR or NLMSG_DONE body says; None for success."""
    (code,) = _S32.unpack_from(body)
    if code >= 0:
        return None
    extack = ""
    if flags & NLM_F_ACK_TLVS:
        offset = 4
        if kind == NLMSG_ERROR:  # then comes the request: its header and, unless capped, its body
            length = 16 if flags & _NLM_F_CAPPED else _HEADER.unpack_from(body, 4)[0]
            offset += (length + 3) & ~3
        extack = string(attributes(body, offset).get(NLMSGERR_ATTR_MSG, b""))
    return Failure(request, -code, extack)
