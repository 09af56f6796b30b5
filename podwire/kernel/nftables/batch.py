"""Batches: messages to nf_tables that take effect together or not at all."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from podwire.errors import KernelError
from podwire.kernel import netlink, netns

SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_BEGIN, _END = 0x10, 0x11

_NLMSGERR_ATTR_OFFS = 2

_RECEIVE_BYTES = 1 << 18
_SEND_BUFFER = 1 << 30
_RECEIVE_BUFFER = 8 << 20

_S32 = struct.Struct("=i")


def nfgenmsg(family: int) -> bytes:
    """The header that every message to nf_tables begins with."""
    return bytes((family, 0, 0, 0))


class Message(Protocol):
    """`kind` and `flags` without what belongs to the batch."""

    @property
    def kind(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def body(self) -> bytes: ...


@dataclass(frozen=True)
class Refusal:
    """Why the kernel refused the batch: the message at `index`, at the byte `offset` of its body.

    `errno` is positive; `offset` is None where the kernel does not say it.
    """

    index: int
    errno: int
    extack: str
    offset: int | None

    def error(self, what: str) -> KernelError:
        """`what` is the sentence's beginning: "cannot …"."""
        message = f"{what}: {os.strerror(self.errno)}"
        return KernelError(message, errno=self.errno, extack=self.extack)


class BatchSocket:
    """Sends batches to nf_tables of one network namespace. Not thread-safe."""

    def __init__(self, netns_fd: int | None) -> None:
        self._socket = netns.socket(netns_fd, socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETFILTER)
        self._socket.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, netlink.SO_SNDBUFFORCE, _SEND_BUFFER)
        self._socket.setsockopt(socket.SOL_SOCKET, netlink.SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def send(self, messages: Sequence[Message]) -> Refusal | None:
        """Send one batch; the first refusal, after which nothing has changed, or None.

        Raises KernelError when the socket fails.
        """
        first = self._sequence + 1
        last = first + len(messages)  # of the messages: the batch's edges are around them
        self._sequence = last + 1
        out = [_edge(_BEGIN, first)]
        for sequence, message in enumerate(messages, first + 1):
            # Kernels before 6.10 do not acknowledge the end of a batch, so the last message.
            flags = message.flags | netlink.NLM_F_REQUEST
            flags |= netlink.NLM_F_ACK if sequence == last else 0
            out.append(netlink.message(SUBSYSTEM | message.kind, flags, sequence, message.body))
        out.append(_edge(_END, last + 1))
        try:
            self._socket.send(b"".join(out))
            return self._await_acknowledgement(first, last)
        except OSError as error:
            raise netlink.broken("use", error) from None

    def _await_acknowledgement(self, first: int, last: int) -> Refusal | None:
        while True:
            datagram = self._socket.recv(_RECEIVE_BYTES)
            for kind, flags, sequence, body in netlink.messages(datagram):
                if kind != netlink.NLMSG_ERROR or not first <= sequence <= last + 1:
                    continue
                (code,) = _S32.unpack_from(body)
                if code:
                    self._drain()
                    index = min(max(sequence - first - 1, 0), last - first - 1)
                    return _refusal(index, -code, flags, body)
                if sequence == last:
                    return None

    def _drain(self) -> None:
        """Throw away what the kernel has said already: further refusals of the same batch."""
        try:
            while self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT):
                pass
        except BlockingIOError:
            pass


def _edge(kind: int, sequence: int) -> bytes:
    return netlink.message(kind, netlink.NLM_F_REQUEST, sequence, b"\0\0\0\x0a")


def _refusal(index: int, errno: int, flags: int, body: bytes) -> Refusal:
    if not flags & netlink.NLM_F_ACK_TLVS:
        return Refusal(index, errno, "", None)
    # After the code and the refused message's header.
    notes = netlink.attributes(body, _S32.size + netlink.HEADER_BYTES)
    offset = netlink.number(notes[_NLMSGERR_ATTR_OFFS]) if _NLMSGERR_ATTR_OFFS in notes else None
    return Refusal(
        index,
        errno,
        netlink.string(notes.get(netlink.NLMSGERR_ATTR_MSG, b"")),
        None if offset is None else offset - netlink.HEADER_BYTES,
    )
