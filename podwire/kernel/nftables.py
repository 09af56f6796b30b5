"""nf_tables through two doors: `nft` in text for structure, our own messages for elements.

Structure (tables, chains, rules, sets) is rare and is read by people, so it goes through the
`nft` program. Elements are the hot path: a `Transaction` is a value made of element changes, and
`NfTables.commit` sends it as one atomic batch, without listing anything first.

An element's key and data are the concatenated fields as the kernel's registers hold them: each
field in network order, padded to four bytes (`concat`); `mark`, `priority` and `numgen` fields
are host order. Intervals of single-field sets are two elements (`interval`), those of concatenated
sets one element with `end`.

Sources: include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h; nft(8).
"""

from __future__ import annotations

import errno as errnos
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

from podwire.errors import KernelError, Unsupported
from podwire.kernel import netlink, netns

IP = 2
IP6 = 10
BRIDGE = 7
INET = 1

_SUBSYSTEM = 10 << 8
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_GETTABLE, _GETCHAIN, _GETRULE, _GETSET = 1, 4, 7, 10
_NEWSETELEM, _GETSETELEM, _DELSETELEM, _GETGEN = 12, 13, 14, 16
_GETOBJ, _OBJECT_COUNTER = 19, 1

_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS, _LIST_ELEM = 1, 2, 3, 1
_ELEM_KEY, _ELEM_DATA, _ELEM_FLAGS, _ELEM_TIMEOUT = 1, 2, 3, 4
_ELEM_EXPR, _ELEM_KEY_END = 7, 10
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 1, 2, 1, 2

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLMSGERR_ATTR_MSG, _NLMSGERR_ATTR_OFFS = 1, 2
_NLM_F_ACK_TLVS = 0x200
_NLM_F_DUMP_INTR = 0x10
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33

_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
# An attribute's length has 16 bits, and the elements of one message are one attribute.
_MESSAGE_BYTES = 60_000
_RECEIVE_BYTES = 1 << 18
_SEND_BUFFER = 1 << 30
_RECEIVE_BUFFER = 8 << 20
_DUMP_TRIES = 10
_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")

INTERVAL_END = 1


class Verdict(NamedTuple):
    """A map's data that decides: `code` as in nf_tables.h, `chain` for jump and goto."""

    code: int
    chain: str = ""


ACCEPT = Verdict(1)
DROP = Verdict(0)
RETURN = Verdict(-5)


def jump(chain: str) -> Verdict:
    return Verdict(-3, chain)


def goto(chain: str) -> Verdict:
    return Verdict(-4, chain)


Data: TypeAlias = bytes | Verdict | None


class Element(NamedTuple):
    """One element. `data` is None in sets; `end` is the inclusive last key of a concatenated range.

    `timeout_ms` 0 is the set's default. Deleting looks at `key`, `end` and `flags` only.
    """

    key: bytes
    data: Data = None
    end: bytes | None = None
    timeout_ms: int = 0
    flags: int = 0


class Set(NamedTuple):
    """Where elements live: a set or map. `family` is `IP`, `IP6`, `BRIDGE` or `INET`."""

    family: int
    table: str
    name: str


class Change(NamedTuple):
    verb: Literal["add", "delete"]
    set: Set
    elements: Sequence[Element]


def concat(*fields: bytes) -> bytes:
    """The fields one after the other, each padded to four bytes."""
    return b"".join(field + _PAD[len(field) & 3] for field in fields)


def interval(first: bytes, last: bytes) -> list[Element]:
    """The inclusive range as the two elements that a single-field interval set holds."""
    after = int.from_bytes(last, "big") + 1
    if after >> (8 * len(last)):
        return [Element(first)]
    return [Element(first), Element(after.to_bytes(len(last), "big"), flags=INTERVAL_END)]


def intervals(elements: Iterable[Element]) -> frozenset[tuple[bytes, bytes]]:
    """The inclusive ranges that the elements of a single-field interval set mean."""
    elements = list(elements)
    starts = sorted(e.key for e in elements if not e.flags & INTERVAL_END)
    ends = sorted(e.key for e in elements if e.flags & INTERVAL_END and any(e.key))
    ranges: set[tuple[bytes, bytes]] = set()
    for i, start in enumerate(starts):
        after = int.from_bytes(ends[i], "big") if i < len(ends) else 1 << (len(start) * 8)
        ranges.add((start, (after - 1).to_bytes(len(start), "big")))
    return frozenset(ranges)


class Transaction:
    """Element changes in order, across sets, tables and families; all of them happen or none.

    Adding an element that is there with the same data is no error; with other data it is EEXIST
    or EBUSY, so delete it first. Deleting an absent element is ENOENT.
    """

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def add(self, target: Set, elements: Iterable[Element]) -> None:
        self._append("add", target, elements)

    def delete(self, target: Set, elements: Iterable[Element]) -> None:
        self._append("delete", target, elements)

    def _append(
        self, verb: Literal["add", "delete"], target: Set, elements: Iterable[Element]
    ) -> None:
        sequence = elements if isinstance(elements, (list, tuple)) else list(elements)
        if sequence:
            self.changes.append(Change(verb, target, sequence))

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __len__(self) -> int:
        """How many elements change."""
        return sum(len(change.elements) for change in self.changes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transaction) and self.changes == other.changes

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "\n".join(
            f"{verb} {target.table}/{target.name} "
            + ", ".join(_text(element) for element in elements)
            for verb, target, elements in self.changes
        )


class _Commits:
    """How many commits this process has made in one network namespace."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0


_COMMITS: dict[int, _Commits] = {}
"""By the namespace's inode."""


class NfTables:
    """nf_tables of one network namespace (`netns_fd`; default: the caller's). Thread-safe."""

    def __init__(self, netns_fd: int | None = None) -> None:
        self._netns_fd = netns_fd
        self._socket = netns.socket(netns_fd, socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETFILTER)
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        self._sequence = 0
        self._lock = threading.Lock()
        with netns.entered(netns_fd):
            inode = os.stat("/proc/thread-self/ns/net").st_ino
        self._commits = _COMMITS.setdefault(inode, _Commits())

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> NfTables:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, script: str, *, timeout_s: float = 30) -> None:
        """Apply `script` (one transaction) with the `nft` program.

        Raises KernelError with nft's own message, Unsupported where nft is not installed.
        """
        try:
            with self._commits.lock:
                done = netns.run(
                    self._netns_fd, ["nft", "-f", "-"], stdin=script, timeout_s=timeout_s
                )
                self._commits.count += not done.returncode
        except FileNotFoundError:
            raise Unsupported("the nft program is missing: install the package nftables") from None
        except subprocess.TimeoutExpired:
            raise KernelError(f"nft did not finish in {timeout_s} s") from None
        if done.returncode:
            raise KernelError(f"nft refused the script: {done.stderr.strip()}")

    def commit(self, transaction: Transaction) -> None:
        """Apply the transaction atomically. An empty one makes no system call.

        Raises KernelError that names the first refused element; nothing has changed then.
        """
        if not transaction:
            return
        with self._commits.lock, self._lock:
            messages = list(_messages(transaction))
            first = self._sequence + 1
            last = self._sequence = self._sequence + len(messages) + 2
            out = [_batch_edge(_BATCH_BEGIN, first)]
            for sequence, message in enumerate(messages, first + 1):
                # Kernels before 6.10 do not acknowledge the end of a batch, so the last message.
                flags = 0x5 if sequence == last - 1 else 0x1
                length = 16 + len(message.body)
                out.append(_HEADER.pack(length, message.kind, flags | message.flags, sequence, 0))
                out.append(message.body)
            out.append(_batch_edge(_BATCH_END, last))
            self._socket.send(b"".join(out))
            self._await_acknowledgement(messages, first)
            self._commits.count += 1

    def send(self, family: int, messages: Sequence[tuple[int, int, bytes]], what: str) -> None:
        """One batch of other messages: kind, flags and attributes of each (`kernel.nftrules`).

        Raises KernelError ("cannot `what`"); nothing has changed then.
        """
        with self._lock:
            first = self._sequence + 1
            self._sequence += len(messages) + 2
            out = [_batch_edge(_BATCH_BEGIN, first)]
            for sequence, (kind, flags, attributes) in enumerate(messages, first + 1):
                flags |= 0x5 if sequence == first + len(messages) else 0x1
                body = _nfgenmsg(family) + attributes
                out.append(_HEADER.pack(16 + len(body), _SUBSYSTEM | kind, flags, sequence, 0))
                out.append(body)
            out.append(_batch_edge(_BATCH_END, self._sequence))
            self._socket.send(b"".join(out))
            while True:
                for kind, _, sequence, body in self._receive():
                    if kind != _NLMSG_ERROR or not first <= sequence <= self._sequence:
                        continue
                    code = -int.from_bytes(body[:4], _ORDER, signed=True)
                    if code:
                        self._drain()
                        raise KernelError(f"cannot {what}: {os.strerror(code)}", errno=code)
                    if sequence == first + len(messages):
                        return

    def strangers(self) -> int:
        """A number that stays the same while only this process commits in the namespace.

        It tells whether somebody else may have touched our tables, without listing them. (A script
        without effect makes it differ too: then there is one listing too many.)
        """
        with self._commits.lock:
            return (self.generation() - self._commits.count) & 0xFFFFFFFF

    def generation(self) -> int:
        """The rule set's generation: any commit in the namespace, by anyone, increases it."""
        (body,) = self._ask(_GETGEN, 0, b"", dump=False)
        return int.from_bytes(netlink.attributes(body, 4)[1], "big")

    def elements(self, target: Set) -> list[Element]:
        """All elements of a set or map, in no order. Raises KernelError (ENOENT: no such set)."""
        request = netlink.text(_LIST_TABLE, target.table) + netlink.text(_LIST_SET, target.name)
        return [
            _decode(payload)
            for body in self._ask(_GETSETELEM, target.family, request)
            for payload in _listed(body)
        ]

    def element_counters(self, target: Set) -> dict[bytes, tuple[int, int]]:
        """Packets and bytes by key, of a set or map whose elements count."""
        request = netlink.text(_LIST_TABLE, target.table) + netlink.text(_LIST_SET, target.name)
        found: dict[bytes, tuple[int, int]] = {}
        for body in self._ask(_GETSETELEM, target.family, request):
            for payload in _listed(body):
                element = netlink.attributes(payload)
                if _ELEM_EXPR in element:
                    counter = netlink.attributes(netlink.attributes(element[_ELEM_EXPR])[2])
                    octets, packets = (int.from_bytes(counter[kind], "big") for kind in (1, 2))
                    found[element[_ELEM_KEY][4:]] = (packets, octets)
        return found

    def tables(self, family: int) -> list[str]:
        """Names of the tables of a family."""
        return [_name(body, 1) for body in self._ask(_GETTABLE, family, b"") if body[0] == family]

    def chains(self, family: int, table: str) -> list[str]:
        """Names of the chains of a table; none if there is no such table."""
        bodies = self._ask(_GETCHAIN, family, b"")
        return [_name(body, 3) for body in bodies if _name(body, 1) == table]

    def chain_uses(self, family: int, table: str) -> dict[str, int]:
        """How many rules each chain of a table holds, and jumps to it there are, in one number."""
        uses: dict[str, int] = {}
        for body in self._ask(_GETCHAIN, family, b""):
            attributes = netlink.attributes(body, 4)
            if netlink.string(attributes[1]) == table:
                uses[netlink.string(attributes[3])] = int.from_bytes(attributes[6], "big")
        return uses

    def rules(self, family: int, table: str) -> list[tuple[str, bytes]]:
        """Every rule's chain and expressions, to compare: empty if there is no such table."""
        found: list[tuple[str, bytes]] = []
        for body in self._ask(_GETRULE, family, netlink.text(1, table)):
            attributes = netlink.attributes(body, 4)
            found.append((netlink.string(attributes[2]), attributes.get(4, b"")))
        return found

    def counters(self, family: int, table: str) -> dict[str, tuple[int, int]]:
        """Packets and bytes of a table's named counters; empty if there is no such table."""
        found: dict[str, tuple[int, int]] = {}
        for body in self._ask(_GETOBJ, family, netlink.text(1, table)):
            parts = netlink.attributes(body, 4)
            if int.from_bytes(parts[3], "big") == _OBJECT_COUNTER:
                numbers = netlink.attributes(parts[4])
                packets, octets = (int.from_bytes(numbers[n], "big") for n in (2, 1))
                found[netlink.string(parts[2])] = (packets, octets)
        return found

    def sets(self, family: int, table: str) -> list[str]:
        """Names of the sets and maps of a table; none if there is no such table."""
        try:
            bodies = self._ask(_GETSET, family, netlink.text(1, table))
        except KernelError as error:
            if error.errno == errnos.ENOENT:
                return []
            raise
        return [_name(body, 2) for body in bodies]

    def _ask(self, kind: int, family: int, attributes: bytes, *, dump: bool = True) -> list[bytes]:
        """The answers' bodies; a dump that a change cut through is made again."""
        body = _nfgenmsg(family) + attributes
        flags = 1 | (netlink.NLM_F_DUMP if dump else netlink.NLM_F_ACK)
        with self._lock:
            for _ in range(_DUMP_TRIES):
                self._sequence += 1
                sequence = self._sequence
                header = _HEADER.pack(16 + len(body), _SUBSYSTEM | kind, flags, sequence, 0)
                self._socket.send(header + body)
                answers, whole = self._collect(sequence)
                if whole:
                    return answers
        raise KernelError("nf_tables changed during every try to list it", errno=errnos.EINTR)

    def _collect(self, sequence: int) -> tuple[list[bytes], bool]:
        answers: list[bytes] = []
        whole = True
        while True:
            for kind, flags, answered, body in self._receive():
                if answered != sequence:
                    continue
                whole = whole and not flags & _NLM_F_DUMP_INTR
                if kind > _NLMSG_DONE:
                    answers.append(body)
                    continue
                code = -int.from_bytes(body[:4], _ORDER, signed=True)
                if code == errnos.EINTR:
                    whole = False
                elif code > 0:
                    raise KernelError(f"cannot list nf_tables: {os.strerror(code)}", errno=code)
                return answers, whole

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        data = self._socket.recv(_RECEIVE_BYTES)
        offset = 0
        while offset + 16 <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            yield kind, flags, sequence, data[offset + 16 : offset + length]
            offset += (length + 3) & ~3

    def _await_acknowledgement(self, messages: Sequence[_Message], first: int) -> None:
        """Return on success; raise for the first refusal (the kernel reports all of them)."""
        last = first + len(messages)
        while True:
            for kind, flags, sequence, body in self._receive():
                if kind != _NLMSG_ERROR or not first <= sequence <= last + 1:
                    continue
                code = -int.from_bytes(body[:4], _ORDER, signed=True)
                if code:
                    self._drain()
                    index = max(sequence - first - 1, 0)
                    raise _refusal(messages[min(index, len(messages) - 1)], code, flags, body)
                if sequence == last:
                    return

    def _drain(self) -> None:
        """Throw away what the kernel has said already: further refusals of the same batch."""
        try:
            while self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT):
                pass
        except BlockingIOError:
            pass


class _Message(NamedTuple):
    kind: int
    flags: int
    body: bytes
    change: Change
    start: int  # index of its first element in the change
    parts: Sequence[bytes]  # its elements, encoded


_ORDER: Literal["little", "big"] = "little" if struct.pack("=H", 1) == b"\1\0" else "big"


def _nfgenmsg(family: int) -> bytes:
    return bytes((family, 0, 0, 0))


def _batch_edge(kind: int, sequence: int) -> bytes:
    return _HEADER.pack(20, kind, 1, sequence, 0) + b"\0\0\0\x0a"


def _messages(transaction: Transaction) -> Iterator[_Message]:
    """Cut every change into messages of a size that the kernel takes."""
    for change in transaction.changes:
        verb, target, elements = change
        kind = _SUBSYSTEM | (_NEWSETELEM if verb == "add" else _DELSETELEM)
        flags = netlink.NLM_F_CREATE if verb == "add" else 0
        head = (
            _nfgenmsg(target.family)
            + netlink.text(_LIST_TABLE, target.table)
            + netlink.text(_LIST_SET, target.name)
        )
        start = size = 0
        parts: list[bytes] = []
        for part in map(_encode if verb == "add" else _encode_key, elements):
            if size + len(part) > _MESSAGE_BYTES:
                yield _message(kind, flags, head, parts, change, start)
                start += len(parts)
                parts, size = [], 0
            parts.append(part)
            size += len(part)
        yield _message(kind, flags, head, parts, change, start)


def _message(
    kind: int, flags: int, head: bytes, parts: list[bytes], change: Change, start: int
) -> _Message:
    body = head + netlink.nest(_LIST_ELEMENTS, *parts)
    return _Message(kind, flags, body, change, start, parts)


def _refusal(message: _Message, code: int, flags: int, body: bytes) -> KernelError:
    verb, target, elements = message.change
    what = f"cannot {verb} elements of {target.table}/{target.name}"
    extack = ""
    if flags & _NLM_F_ACK_TLVS:
        notes = netlink.attributes(body, 20)  # after the code and the refused message's header
        extack = netlink.string(notes.get(_NLMSGERR_ATTR_MSG, b""))
        if _NLMSGERR_ATTR_OFFS in notes:
            offset = int.from_bytes(notes[_NLMSGERR_ATTR_OFFS], _ORDER) - 16
            index = _index_at(message, offset)
            if index is not None:
                what = f"cannot {verb} {_text(elements[message.start + index])} "
                what += f"{'to' if verb == 'add' else 'of'} {target.table}/{target.name}"
    return KernelError(f"{what}: {os.strerror(code)}", errno=code, extack=extack)


def _index_at(message: _Message, offset: int) -> int | None:
    """Which element of the message holds the byte at `offset` of its body."""
    position = len(message.body) - sum(map(len, message.parts))
    for index, part in enumerate(message.parts):
        if position <= offset < position + len(part):
            return index
        position += len(part)
    return None


@lru_cache(maxsize=64)
def _value_heads(kind: int, length: int) -> bytes:
    """The headers in front of a value of `length` bytes (a multiple of four) in `kind`."""
    return _ATTR.pack(length + 8, kind | 0x8000) + _ATTR.pack(length + 4, _DATA_VALUE)


@lru_cache(maxsize=64)
def _element_head(length: int) -> bytes:
    return _ATTR.pack(length + 4, _LIST_ELEM | 0x8000)


@lru_cache(maxsize=4096)
def _verdict(verdict: Verdict) -> bytes:
    code, chain = verdict
    parts = _ATTR.pack(8, _VERDICT_CODE) + struct.pack(">i", code)
    if chain:
        parts += netlink.text(_VERDICT_CHAIN, chain)
    return netlink.nest(_ELEM_DATA, netlink.nest(_DATA_VERDICT, parts))


def _encode(element: Element) -> bytes:
    key, data, end, timeout_ms, flags = element
    out = _value_heads(_ELEM_KEY, len(key)) + key
    if data is not None:
        if isinstance(data, Verdict):
            out += _verdict(data)
        else:
            out += _value_heads(_ELEM_DATA, len(data)) + data
    if end is not None:
        out += _value_heads(_ELEM_KEY_END, len(end)) + end
    if timeout_ms:
        out += _ATTR.pack(12, _ELEM_TIMEOUT) + struct.pack(">Q", timeout_ms)
    if flags:
        out += _ATTR.pack(8, _ELEM_FLAGS) + struct.pack(">I", flags)
    return _element_head(len(out)) + out


def _encode_key(element: Element) -> bytes:
    return _encode(Element(element.key, None, element.end, 0, element.flags))


def _listed(body: bytes) -> Iterator[bytes]:
    """The elements, still encoded, of one NEWSETELEM message of a dump."""
    for kind, payload in netlink.each_attribute(body, 4):
        if kind == _LIST_ELEMENTS:
            for _, element in netlink.each_attribute(payload):
                yield element


def _decode(payload: bytes) -> Element:
    found = netlink.attributes(payload)
    key = found[_ELEM_KEY][4:] if _ELEM_KEY in found else b""  # none: the catch-all element
    data: Data = None
    if _ELEM_DATA in found:
        data = _decode_data(found[_ELEM_DATA])
    return Element(
        key,
        data,
        found[_ELEM_KEY_END][4:] if _ELEM_KEY_END in found else None,
        int.from_bytes(found.get(_ELEM_TIMEOUT, b""), "big"),
        int.from_bytes(found.get(_ELEM_FLAGS, b""), "big"),
    )


def _decode_data(payload: bytes) -> Data:
    ((kind, value),) = netlink.each_attribute(payload)
    if kind == _DATA_VALUE:
        return value
    parts = netlink.attributes(value)
    code = int.from_bytes(parts[_VERDICT_CODE], "big", signed=True)
    return Verdict(code, netlink.string(parts.get(_VERDICT_CHAIN, b"")))


def _name(body: bytes, attribute: int) -> str:
    return netlink.string(netlink.attributes(body, 4).get(attribute, b""))


def _text(element: Element) -> str:
    """An element for people: hexadecimal words, ranges with a hyphen."""
    out = element.key.hex(" ", 4)
    if element.end is not None:
        out += f"-{element.end.hex(' ', 4)}"
    if element.flags & INTERVAL_END:
        out += " (end)"
    if isinstance(element.data, Verdict):
        out += f" : {element.data.code} {element.data.chain}".rstrip()
    elif element.data is not None:
        out += f" : {element.data.hex(' ', 4)}"
    return out
