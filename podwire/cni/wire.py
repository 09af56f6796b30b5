"""The frames between shim and agent; `shim.c` is the other side and describes them."""

from __future__ import annotations

import array
import os
import socket
import struct
from dataclasses import dataclass

from podwire.cni.protocol import TRY_AGAIN, CniError

MAGIC = b"PWCN"
VERSION = 1
MAX_BYTES = 8 << 20
_HEADER = struct.Struct("!4sII")
_STATUS = struct.Struct("!I")


class Malformed(Exception):
    """Not a frame, or cut short."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What the shim carried over. The receiver closes `netns_fd`."""

    plugin: str
    environment: dict[str, str]
    stdin: bytes
    netns_fd: int | None = None


def receive(connection: socket.socket) -> Frame:
    """One request. Raises Malformed, OSError, or CniError for a shim of another time."""
    first, descriptors = _first(connection)
    try:
        magic, version, length = _HEADER.unpack(_rest(connection, first, _HEADER.size))
        if magic != MAGIC or length > MAX_BYTES:
            raise Malformed("no podwire CNI shim spoke")
        if version != VERSION:
            raise CniError(
                TRY_AGAIN,
                f"the CNI plugin speaks protocol {version}, the agent {VERSION}",
                "run 'podwire install' with the agent's version",
            )
        return decode(_rest(connection, b"", length), descriptors.pop() if descriptors else None)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def decode(body: bytes, netns_fd: int | None = None) -> Frame:
    """The body of a request. Raises Malformed."""
    head, end, stdin = body.partition(b"\0\0")
    if not end:
        raise Malformed("the environment has no end")
    plugin, *entries = head.decode(errors="replace").split("\0")
    environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return Frame(plugin, environment, stdin, netns_fd)


def decode_left(data: bytes) -> Frame:
    """A request that the shim left in a file. Raises Malformed."""
    if len(data) < _HEADER.size or _HEADER.unpack_from(data)[:2] != (MAGIC, VERSION):
        raise Malformed("not a request of this version")
    return decode(data[_HEADER.size :])


def answer(connection: socket.socket, status: int, output: bytes) -> None:
    """Send the exit status and what goes to standard output."""
    header = _HEADER.pack(MAGIC, VERSION, _STATUS.size + len(output))
    connection.sendall(header + _STATUS.pack(status) + output)


def _first(connection: socket.socket) -> tuple[bytes, list[int]]:
    """The first bytes, at most a header, and the descriptors that came with them."""
    descriptors = array.array("i")
    space = socket.CMSG_SPACE(descriptors.itemsize)
    data, ancillary, _, _ = connection.recvmsg(_HEADER.size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(payload[: len(payload) // 4 * 4])
    return data, list(descriptors)


def _rest(connection: socket.socket, start: bytes, length: int) -> bytes:
    parts = [start]
    missing = length - len(start)
    while missing:
        part = connection.recv(min(missing, 1 << 20))
        if not part:
            raise Malformed("the request is cut short")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
