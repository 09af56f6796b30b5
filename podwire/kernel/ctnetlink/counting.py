"""How many entries there are of each kind of flow, from raw datagrams.

A full parse costs 10 µs an entry; a table of 500,000 would take the agent five seconds. Nearly all
entries are TCP, UDP or SCTP of zone 0, and the kernel spells these with every field at one place:
tuples of 52 (IPv4) or 76 (IPv6) bytes, then CTA_STATUS. So slices of such a message, the
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

    source: Address
    destination: Address
    protocol: int
    destination_port: int
    reply_source: Address
    reply_destination: Address
    reply_source_port: int
    status: int
    state: int | None


def flow_key(entry: Entry) -> FlowKey:
    original, reply = entry.original, entry.reply
    return FlowKey(
        original.source,
        original.destination,
        original.protocol,
        original.destination_port,
        reply.source,
        reply.destination,
        reply.source_port,
        entry.status,
        entry.state,
    )


# Length, header of CTA_TUPLE_ORIG; addresses and protocol; destination port, reply's addresses and
# source port; header of CTA_STATUS, status; header of the TCP state, state.
_MESSAGE4 = struct.Struct("=I16xI8x21s15x46s10xI4s40xIc")
_MESSAGE6 = struct.Struct("=I16xI8x45s15x70s10xI4s40xIc")
# The slices joined: of protocols without a state, and of TCP.
_KEY4 = struct.Struct(">4s4x4s8xBH14x4s4x4s16xHI")
_KEY6 = struct.Struct(">16s4x16s8xBH14x16s4x16s16xHI")
_TCP_KEY4 = struct.Struct(_KEY4.format + "B")
_TCP_KEY6 = struct.Struct(_KEY6.format + "B")


def _attribute_header(length: int, kind: int) -> int:
    return struct.unpack("=I", struct.pack("=HH", length, kind))[0]


_TUPLE4 = _attribute_header(52, 0x8001)
_TUPLE6 = _attribute_header(76, 0x8001)
_SHAPES = (_TUPLE4, _TUPLE6)
_STATUS = _attribute_header(8, 3)
_STATE = _attribute_header(5, 1)
_TAIL = bytes(_MESSAGE6.size)  # so that a short last message can be looked at like others


def count_flows(datagrams: Iterable[bytes]) -> Iterator[dict[FlowKey, int]]:
    """Counts by key, in portions of bounded size: a key may come again in a later portion."""
    raw: dict[bytes, int] = {}
    parsed: dict[FlowKey, int] = {}
    for datagram in datagrams:
        _count(datagram, raw, parsed)
        if len(raw) + len(parsed) > MOST_KEYS:
            yield _decoded(raw, parsed)
            raw, parsed = {}, {}
    yield _decoded(raw, parsed)


def _count(datagram: bytes, raw: dict[bytes, int], parsed: dict[FlowKey, int]) -> None:
    """The hot loop: half a microsecond an entry, most of it one unpack."""
    data = datagram + _TAIL
    message4, message6 = _MESSAGE4.unpack_from, _MESSAGE6.unpack_from
    offset, end = 0, len(datagram)
    while offset < end:
        length, shape, first, second, header, status, state_header, state = message4(data, offset)
        if shape == _TUPLE6:
            _, _, first, second, header, status, state_header, state = message6(data, offset)
        if header == _STATUS and shape in _SHAPES:
            if first[-1] != 6:
                key = first + second + status
                raw[key] = raw.get(key, 0) + 1
                offset += length
                continue
            if state_header == _STATE:
                key = first + second + status + state
                raw[key] = raw.get(key, 0) + 1
                offset += length
                continue
        entry = parse(data[offset + 16 : offset + length])
        if entry is not None:
            full = flow_key(entry)
            parsed[full] = parsed.get(full, 0) + 1
        offset += length


def _decoded(raw: dict[bytes, int], parsed: dict[FlowKey, int]) -> dict[FlowKey, int]:
    out = parsed
    tcp = {layout.size: layout.unpack for layout in (_TCP_KEY4, _TCP_KEY6)}
    other = {layout.size: layout.unpack for layout in (_KEY4, _KEY6)}
    make = FlowKey._make
    for key, count in raw.items():
        unpack = tcp.get(len(key))
        full = make(unpack(key) if unpack else (*other[len(key)](key), None))
        out[full] = out.get(full, 0) + count  # a parsed one, of another zone, may be equal
    return out
