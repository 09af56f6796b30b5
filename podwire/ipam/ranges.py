"""Ranges of addresses to hand out, as CNI's host-local plugin configures them. Pure.

Source: containernetworking/plugins, plugins/ipam/host-local (README and range.go).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from podwire.errors import ConfigError, InvalidObject
from podwire.net import Address, Prefix, format_address, parse_address, parse_prefix


class Range(NamedTuple):
    """Addresses `first` to `last` (inclusive) of `subnet`; the gateway is never handed out."""

    subnet: Prefix
    first: int
    last: int
    gateway: Address

    @property
    def bits(self) -> int:
        return self.subnet.bits

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.first <= number <= self.last

    def __str__(self) -> str:
        size = self.bits // 8
        first, last = (number.to_bytes(size, "big") for number in (self.first, self.last))
        return f"{format_address(first)}-{format_address(last)}"


RangeSet = tuple[Range, ...]
"""One address is taken from each set: from whichever of its ranges has one."""


def make_range(subnet: str, start: str = "", end: str = "", gateway: str = "") -> Range:
    """A range, with the defaults filled in. Raises ConfigError naming what is wrong."""
    if not subnet:
        raise ConfigError("a range has no subnet", field="ipam.ranges")
    prefix = _prefix(subnet)
    if prefix.length > prefix.bits - 2:
        raise ConfigError(f"Network {prefix} too small to allocate from", field="ipam.ranges")
    lowest = int.from_bytes(prefix.first, "big") + 1
    highest = int.from_bytes(prefix.last, "big") - (1 if prefix.bits == 32 else 0)
    first, last = lowest, highest
    for name, text in (("rangeStart", start), ("rangeEnd", end)):
        if not text:
            continue
        address = _address(text, name)
        if address not in prefix:
            raise ConfigError(f"{name} {text} is not in the subnet {prefix}", field="ipam.ranges")
        number = int.from_bytes(address, "big")
        if name == "rangeStart":
            first = max(number, lowest)
        else:
            last = min(number, highest)
    if first > last:
        raise ConfigError(f"rangeStart {start} is after rangeEnd {end}", field="ipam.ranges")
    router = _address(gateway, "gateway") if gateway else lowest.to_bytes(prefix.bits // 8, "big")
    if len(router) != len(prefix.address):
        raise ConfigError(
            f"the gateway {gateway} is not of the family of {prefix}", field="ipam.ranges"
        )
    return Range(prefix, first, last, router)


def check_sets(sets: Sequence[RangeSet]) -> tuple[RangeSet, ...]:
    """The sets, looked over. Raises ConfigError for empty, mixed and overlapping ones."""
    every: list[Range] = []
    for number, ranges in enumerate(sets):
        if not ranges:
            raise ConfigError(f"range set {number} is empty", field="ipam.ranges")
        if len({each.bits for each in ranges}) > 1:
            raise ConfigError(f"mixed address families in range set {number}", field="ipam.ranges")
        for each in ranges:
            for other in every:
                if _overlap(each, other):
                    raise ConfigError(f"ranges overlap: {other} and {each}", field="ipam.ranges")
            every.append(each)
    return tuple(sets)


def _overlap(one: Range, other: Range) -> bool:
    return one.bits == other.bits and one.first <= other.last and other.first <= one.last


def _prefix(text: str) -> Prefix:
    try:
        prefix = parse_prefix(text)
        address = parse_address(text.partition("/")[0])
    except InvalidObject as error:
        raise ConfigError(str(error), field="ipam.ranges") from None
    if "/" not in text:
        raise ConfigError(f"the subnet {text} has no prefix length", field="ipam.ranges")
    if address != prefix.address:
        raise ConfigError(f"Network has host bits set: {text}", field="ipam.ranges")
    return prefix


def _address(text: str, name: str) -> Address:
    try:
        return parse_address(text)
    except InvalidObject as error:
        raise ConfigError(f"{name}: {error}", field="ipam.ranges") from None
