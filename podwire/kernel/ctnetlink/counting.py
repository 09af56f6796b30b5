"""How many entries there are of each kind of flow, from raw datagrams.

A full parse costs 10 µs an entry; a table of 500,000 would take the agent five seconds. Nearly all
entries are TCP, UDP or SCTP of zone 0, and the kernel spells these with every field at one place:
tuples of 52 (IPv4) or 76 (IPv6) bytes, then CTA_STATUS. So three slices of such a message, the
client's port left out, are a key to count by, and only distinct keys are decoded. What does not
look like this is parsed in full: other zones, ICMP, and TCP states that moved because security
contexts are in the message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from podwire.kernel.ctnetlink.entries import Entry, parse
from podwire.net import Address

MOST_KEYS = 32768  # distinct keys held at a time: some 8 MB


class FlowKey(NamedTuple):
    """What entries have in common that differ in the client's port alone.

    `destination` is what the client addressed, `reply_source` who answers, `reply_destination`
    whom the answer is sent to: the client, or the address it is masqueraded by.
    """

    protocol: int
    source: Address
    destination: Address
    destination_port: int
    reply_source: Address
    reply_source_port: int
    reply_destination: Address
    status: int
    state: int | None


def flow_key(entry: Entry) -> FlowKey:
    original, reply = entry.original, entry.reply
    return FlowKey(
        original.protocol,
        original.source,
        original.destination,
        original.destination_port,
        reply.source,
        reply.source_port,
        reply.destination,
        entry.status,
        entry.state,
    )


# Length; headers (length, type) of CTA_TUPLE_ORIG, its protocol, CTA_STATUS, the TCP state.
_HEADER4 = struct.Struct("=I16xI28xB71xI44xI")
_HEADER6 = struct.Struct("=I16xI52xB95xI44xI")
_KEY4 = struct.Struct(">4s4x4s8xB H14x4s4x4s16xH I")
_KEY6 = struct.Struct(">16s4x16s8xB H14x16s4x16s16xH I")


def _attribute_header(length: int, kind: int) -> int:
    return struct.unpack("=I", struct.pack("=HH", length, kind))[0]


_TUPLE4 = _attribute_header(52, 0x8001)
_TUPLE6 = _attribute_header(76, 0x8001)
_STATUS = _attribute_header(8, 3)
_STATE = _attribute_header(5, 1)
_TAIL = bytes(_HEADER6.size)  # so that the header of a short last message can be read


def count_flows(datagrams: Iterable[bytes]) -> Iterator[dict[FlowKey, int]]:
    """Counts by key, in portions of bounded size: a key may come again in a later portion."""
    raw4: dict[bytes, int] = {}
    raw6: dict[bytes, int] = {}
    parsed: dict[FlowKey, int] = {}
    for datagram in datagrams:
        _count(datagram, raw4, raw6, parsed)
        if len(raw4) + len(raw6) + len(parsed) > MOST_KEYS:
            yield _decoded(raw4, raw6, parsed)
            raw4, raw6, parsed = {}, {}, {}
    yield _decoded(raw4, raw6, parsed)


def _count(
    datagram: bytes, raw4: dict[bytes, int], raw6: dict[bytes, int], parsed: dict[FlowKey, int]
) -> None:
    """The hot loop: half a microsecond an entry, so the offsets are spelled out."""
    data = datagram + _TAIL
    header4, header6 = _HEADER4.unpack_from, _HEADER6.unpack_from
    offset, end = 0, len(datagram)
    while offset < end:
        length, kind, protocol, status, state = header4(data, offset)
        if kind == _TUPLE4 and status == _STATUS and (protocol != 6 or state == _STATE):
            key = data[offset + 32 : offset + 53] + data[offset + 68 : offset + 114]
            key += data[offset + 128 : offset + 132]
            if protocol == 6:
                key += data[offset + 176 : offset + 177]
            raw4[key] = raw4.get(key, 0) + 1
            offset += length
            continue
        if kind == _TUPLE6:
            _, _, protocol, status, state = header6(data, offset)
            if status == _STATUS and (protocol != 6 or state == _STATE):
                key = data[offset + 32 : offset + 77] + data[offset + 92 : offset + 162]
                key += data[offset + 176 : offset + 180]
                if protocol == 6:
                    key += data[offset + 224 : offset + 225]
                raw6[key] = raw6.get(key, 0) + 1
                offset += length
                continue
        entry = parse(data[offset + 16 : offset + length])
        if entry is not None:
            full = flow_key(entry)
            parsed[full] = parsed.get(full, 0) + 1
        offset += length


def _decoded(
    raw4: dict[bytes, int], raw6: dict[bytes, int], parsed: dict[FlowKey, int]
) -> dict[FlowKey, int]:
    out = parsed
    for layout, raw in ((_KEY4, raw4), (_KEY6, raw6)):
        size = layout.size
        for key, count in raw.items():
            (
                source, destination, protocol, destination_port,
                reply_source, reply_destination, reply_port, status,
            ) = layout.unpack_from(key)  # fmt: skip
            state = key[size] if len(key) > size else None
            full = FlowKey(protocol, source, destination, destination_port, reply_source,
                           reply_port, reply_destination, status, state)  # fmt: skip
            out[full] = out.get(full, 0) + count  # a parsed one, of another zone, may be equal
    return out
