"""DNS messages on the wire: queries in, replies out. Source: RFC 1035, 2782, 6891 (EDNS)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple, TypeAlias

Name: TypeAlias = tuple[bytes, ...]  # labels in lower case, without the root

IN, ANY_CLASS = 1, 255
PAYLOAD = 1232  # what we announce to accept; fits every path's MTU
_HEADER = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHIH")
_QR, _AA, _TC, _RD = 0x8000, 0x0400, 0x0200, 0x0100
_MAX_POINTER = 0x3FFF


class Type(IntEnum):
    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    TXT = 16
    AAAA = 28
    SRV = 33
    OPT = 41
    ANY = 255


class Code(IntEnum):
    """Response codes; BAD_VERSION needs the upper bits that EDNS carries."""

    OK = 0
    FORMAT = 1
    FAILURE = 2
    NO_NAME = 3
    NOT_IMPLEMENTED = 4
    REFUSED = 5
    BAD_VERSION = 16


class Record(NamedTuple):
    """`data` is the finished RDATA; names inside are not compressed."""

    name: Name
    type: int
    ttl: int
    data: bytes


class Query(NamedTuple):
    """One question. `question` is its bytes, to be echoed as they came (also in upper case).

    `payload` is the reply size that the client takes over UDP; `edns` the version, None without.
    """

    id: int
    opcode: int
    recursion: bool
    name: Name
    type: int
    klass: int
    question: bytes
    payload: int
    edns: int | None


class Malformed(Exception):
    """Not a query that can be understood; `id` is 0 when not even that was there."""

    def __init__(self, id: int = 0, *, answerable: bool = False) -> None:
        super().__init__("malformed DNS message")
        self.id = id
        self.answerable = answerable


def name_of(text: str) -> Name:
    return tuple(text.lower().rstrip(".").encode().split(b".")) if text.strip(".") else ()


def pack_name(name: Name) -> bytes:
    """The uncompressed form."""
    return b"".join(bytes([len(label)]) + label for label in name) + b"\0"


# --- queries -------------------------------------------------------------------------------------


def parse_query(packet: bytes) -> Query:
    """Raises Malformed."""
    if len(packet) < _HEADER.size:
        raise Malformed
    id, flags, questions, answers, authorities, extras = _HEADER.unpack_from(packet)
    if flags & _QR:
        raise Malformed(id)  # a reply: answering it could make a loop
    if questions != 1 or answers or authorities:
        raise Malformed(id, answerable=True)
    try:
        name, end = _read_name(packet, _HEADER.size)
        type, klass = struct.unpack_from("!HH", packet, end)
        question = packet[_HEADER.size : end + 4]
        payload, edns = _read_extras(packet, end + 4, extras)
    except (struct.error, IndexError):
        raise Malformed(id, answerable=True) from None
    opcode = flags >> 11 & 15
    recursion = bool(flags & _RD)
    return Query(id, opcode, recursion, name, type, klass, question, payload, edns)


def _read_name(packet: bytes, at: int) -> tuple[Name, int]:
    """A name of the question; compression has nothing to point to there."""
    labels: list[bytes] = []
    total = 0
    while size := packet[at]:
        if size > 63:
            raise IndexError
        label = packet[at + 1 : at + 1 + size]
        total += size + 1
        if len(label) < size or total > 254:
            raise IndexError
        labels.append(label.lower())
        at += 1 + size
    return tuple(labels), at + 1


def _read_extras(packet: bytes, at: int, count: int) -> tuple[int, int | None]:
    """Payload size and version of the OPT record, if there is one."""
    for _ in range(count):
        name, at = _read_name(packet, at)
        type, klass, ttl, size = _RECORD.unpack_from(packet, at)
        at += _RECORD.size + size
        if at > len(packet):
            raise IndexError
        if type == Type.OPT and not name:
            return max(klass, 512), ttl >> 16 & 255
    return 512, None


# --- replies -------------------------------------------------------------------------------------


def reply(
    query: Query,
    code: Code,
    answers: Sequence[Record] = (),
    authority: Sequence[Record] = (),
    additional: Sequence[Record] = (),
    *,
    authoritative: bool = True,
    limit: int | None = None,
) -> bytes:
    """The reply; over `limit` bytes (UDP) answers are cut and TC asks the client to use TCP."""
    opt = b"" if query.edns is None else _opt(code)
    writer = _Writer(query.question, (limit or 65535) - len(opt))
    counts = [writer.add(answers), 0, 0]
    cut = counts[0] < len(answers)
    if not cut:
        counts[1] = writer.add(authority)
        cut = counts[1] < len(authority)
    if not cut:
        counts[2] = writer.add(additional)  # leaving these out is no loss
    flags = _QR | query.opcode << 11 | code & 15
    flags |= _AA * authoritative | _TC * cut | _RD * query.recursion
    header = _HEADER.pack(query.id, flags, 1, counts[0], counts[1], counts[2] + bool(opt))
    return header + writer.body + opt


def format_error(id: int) -> bytes:
    return _HEADER.pack(id, _QR | Code.FORMAT, 0, 0, 0, 0)


def _opt(code: Code) -> bytes:
    return b"\0" + _RECORD.pack(Type.OPT, PAYLOAD, code >> 4 << 24, 0)


class _Writer:
    """The body of a reply; owner names point back to where they were written before."""

    def __init__(self, question: bytes, limit: int) -> None:
        self.body = question
        self._limit = limit - _HEADER.size
        self._places: dict[Name, int] = {}
        self._remember(_labels(question), 0)

    def add(self, records: Iterable[Record]) -> int:
        """Append what fits; returns how many."""
        count = 0
        for record in records:
            name, fresh = self._name(record.name)
            head = _RECORD.pack(record.type, IN, record.ttl, len(record.data))
            size = len(name) + len(head) + len(record.data)
            if len(self.body) + size > self._limit:
                break
            if fresh:
                self._remember(record.name, len(self.body))
            self.body += name + head + record.data
            count += 1
        return count

    def _name(self, name: Name) -> tuple[bytes, bool]:
        """The name's bytes, and whether any of its labels are written out."""
        out = b""
        for i in range(len(name)):
            if (place := self._places.get(name[i:])) is not None:
                return out + struct.pack("!H", 0xC000 | place), i > 0
            out += bytes([len(name[i])]) + name[i]
        return out + b"\0", True

    def _remember(self, name: Name, at: int) -> None:
        at += _HEADER.size
        for i, label in enumerate(name):
            if name[i:] in self._places or at > _MAX_POINTER:
                return
            self._places[name[i:]] = at
            at += 1 + len(label)


def _labels(question: bytes) -> Name:
    return _read_name(question, 0)[0]
