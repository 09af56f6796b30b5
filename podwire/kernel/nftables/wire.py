"""How element changes are spelled in messages, and how elements come back.

Source: include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from podwire.errors import KernelError
from podwire.kernel import netlink
from podwire.kernel.nftables.batch import Refusal, nfgenmsg
from podwire.kernel.nftables.transaction import (
    Change,
    Data,
    Element,
    Set,
    Transaction,
    Verdict,
    spell,
)

_NEWSETELEM, _DELSETELEM = 12, 14
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS, _LIST_ELEM = 1, 2, 3, 1
_ELEM_KEY, _ELEM_DATA, _ELEM_FLAGS, _ELEM_TIMEOUT = 1, 2, 3, 4
_ELEM_EXPR, _ELEM_KEY_END = 7, 10
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 1, 2, 1, 2

_ATTR = struct.Struct("=HH")
# An attribute's length has 16 bits, and the elements of one message are one attribute.
_MESSAGE_BYTES = 60_000


class ElementMessage(NamedTuple):
    """A part of one change, of a size that the kernel takes."""

    kind: int
    flags: int
    body: bytes
    change: Change
    start: int  # index of its first element in the change
    parts: Sequence[bytes]  # its elements, encoded

    def refusal(self, refused: Refusal) -> KernelError:
        """The error that names the element which the kernel refused, where the kernel tells."""
        verb, target, elements = self.change
        index = None if refused.offset is None else self._index_at(refused.offset)
        if index is None:
            what = f"cannot {verb} elements of {target.table}/{target.name}"
        else:
            what = f"cannot {verb} {spell(elements[self.start + index])} "
            what += f"{'to' if verb == 'add' else 'of'} {target.table}/{target.name}"
        return refused.error(what)

    def _index_at(self, offset: int) -> int | None:
        """Which element of the message holds the byte at `offset` of its body."""
        position = len(self.body) - sum(map(len, self.parts))
        for index, part in enumerate(self.parts):
            if position <= offset < position + len(part):
                return index
            position += len(part)
        return None


def messages(transaction: Transaction) -> Iterator[ElementMessage]:
    """The transaction's changes in order."""
    for change in transaction.changes:
        adding = change.verb == "add"
        encoded = map(_encode if adding else _encode_key, change.elements)
        start = size = 0
        parts: list[bytes] = []
        for part in encoded:
            if size + len(part) > _MESSAGE_BYTES:
                yield _message(change, start, parts)
                start += len(parts)
                parts, size = [], 0
            parts.append(part)
            size += len(part)
        yield _message(change, start, parts)


def _message(change: Change, start: int, parts: list[bytes]) -> ElementMessage:
    adding = change.verb == "add"
    body = nfgenmsg(change.set.family) + of_set(change.set) + netlink.nest(_LIST_ELEMENTS, *parts)
    return ElementMessage(
        _NEWSETELEM if adding else _DELSETELEM,
        netlink.NLM_F_CREATE if adding else 0,
        body,
        change,
        start,
        parts,
    )


def of_set(target: Set) -> bytes:
    """The attributes that say which set's elements are meant."""
    return netlink.text(_LIST_TABLE, target.table) + netlink.text(_LIST_SET, target.name)


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


def listed(body: bytes) -> Iterator[bytes]:
    """The elements, still encoded, of one NEWSETELEM message of a dump."""
    for kind, payload in netlink.each_attribute(body, 4):
        if kind == _LIST_ELEMENTS:
            for _, element in netlink.each_attribute(payload):
                yield element


def counter(payload: bytes) -> tuple[bytes, tuple[int, int]] | None:
    """Key, then packets and bytes, of an element that counts; None for one that does not."""
    found = netlink.attributes(payload)
    if _ELEM_EXPR not in found:
        return None
    numbers = netlink.attributes(netlink.attributes(found[_ELEM_EXPR])[2])
    octets, packets = (int.from_bytes(numbers[kind], "big") for kind in (1, 2))
    return found[_ELEM_KEY][4:], (packets, octets)


def decode(payload: bytes) -> Element:
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
