"""Policy routing rules. rtnetlink messages RTM_{NEW,DEL,GET}RULE.

Source: ip-rule(8); include/uapi/linux/fib_rules.h.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from podwire.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NetlinkSocket,
    Request,
    attr,
    attributes,
    number,
    string,
    text,
    u8,
    u32,
)
from podwire.net import Prefix, address_family

RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
# fib_rule_hdr: family, destination and source length, TOS, table, action, flags
_HEADER = struct.Struct("=BBBBB2xBI")
_DST, _SRC, _IIFNAME, _PRIORITY, _FWMARK = 1, 2, 3, 6, 10
_TABLE, _FWMASK, _OIFNAME, _PROTOCOL = 15, 16, 17, 21
_INVERT = 2

TO_TABLE = 1
ANY_IPV4, ANY_IPV6 = Prefix(bytes(4), 0), Prefix(bytes(16), 0)


class Rule(NamedTuple):
    """What matches all of `source`, `destination`, `mark`/`mask`, `input`, `output` → `table`.

    The family is that of the two prefixes, of which `ANY_IPV4` or `ANY_IPV6` match everything;
    `input` and `output` are link names. A rule of the kernel with more conditions than these
    shows only these.
    """

    priority: int
    table: int
    source: Prefix = ANY_IPV4
    destination: Prefix = ANY_IPV4
    mark: int = 0
    mask: int = 0
    input: str = ""
    output: str = ""
    protocol: int = 0
    action: int = TO_TABLE
    invert: bool = False

    def __str__(self) -> str:
        text = f"{self.priority}: from {self.source} to {self.destination}"
        if self.mark or self.mask:
            text += f" fwmark {self.mark:#x}/{self.mask:#x}"
        return f"{text} lookup {self.table}"


def from_prefix(prefix: Prefix, priority: int, table: int, protocol: int = 0) -> Rule:
    """What comes from `prefix` looks up `table`."""
    return Rule(priority, table, prefix, _any(prefix), protocol=protocol)


def to_prefix(prefix: Prefix, priority: int, table: int, protocol: int = 0) -> Rule:
    """What goes to `prefix` looks up `table`."""
    return Rule(priority, table, _any(prefix), prefix, protocol=protocol)


def _any(prefix: Prefix) -> Prefix:
    return ANY_IPV4 if prefix.bits == 32 else ANY_IPV6


def add(rule: Rule) -> Request:
    """Add; EEXIST when an equal one is there."""
    return Request(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _encode(rule), f"add the rule {rule}")


def delete(rule: Rule) -> Request:
    """Delete the first rule with these conditions; ENOENT when there is none."""
    return Request(RTM_DELRULE, 0, _encode(rule), f"delete the rule {rule}")


def dump(sock: NetlinkSocket, family: int = 0) -> list[Rule]:
    """All rules in order of priority, IPv4 then IPv6, or of one family."""
    families = (family,) if family else (socket.AF_INET, socket.AF_INET6)
    found: list[Rule] = []
    for each in families:
        body = _HEADER.pack(each, 0, 0, 0, 0, 0, 0)
        found += [parse(reply) for reply in sock.dump(RTM_GETRULE, body, "rules")]
    return found


def parse(body: bytes) -> Rule:
    """A rule from the body of RTM_NEWRULE."""
    family, to_length, from_length, _, table, action, flags = _HEADER.unpack_from(body)
    get = attributes(body, 12).get
    unspecified = bytes(4 if family == socket.AF_INET else 16)
    return Rule(
        number(get(_PRIORITY, b"")),
        number(get(_TABLE, b"")) or table,
        Prefix(get(_SRC, unspecified), from_length),
        Prefix(get(_DST, unspecified), to_length),
        number(get(_FWMARK, b"")),
        number(get(_FWMASK, b"")),
        string(get(_IIFNAME, b"")),
        string(get(_OIFNAME, b"")),
        number(get(_PROTOCOL, b"")),
        action,
        bool(flags & _INVERT),
    )


def _encode(rule: Rule) -> bytes:
    family = address_family(rule.source.address)
    flags = _INVERT if rule.invert else 0
    to_length, from_length = rule.destination.length, rule.source.length
    parts = [
        _HEADER.pack(family, to_length, from_length, 0, 0, rule.action, flags),
        u32(_PRIORITY, rule.priority),
        u32(_TABLE, rule.table),
        u8(_PROTOCOL, rule.protocol),
    ]
    if to_length:
        parts.append(attr(_DST, rule.destination.address))
    if from_length:
        parts.append(attr(_SRC, rule.source.address))
    if rule.mark or rule.mask:
        parts += [u32(_FWMARK, rule.mark), u32(_FWMASK, rule.mask)]
    if rule.input:
        parts.append(text(_IIFNAME, rule.input))
    if rule.output:
        parts.append(text(_OIFNAME, rule.output))
    return b"".join(parts)
