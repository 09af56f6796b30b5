"""Expressions of rules, and the messages that make rules of them: for what nft cannot say.

nft's grammar has no way to look up two values and use both in one key, though the kernel's
registers make it plain. An expression here is one step of a rule: load into a register, look up,
decide.

nft 1.0.6 aborts when it lists a rule whose key holds what a lookup found. So such a value goes
through the packet's mark (`through_mark`), which is put back at once, within the rule: the listing
then shows ``meta mark set ip saddr map @a`` and ``meta mark`` in the key. It reads well enough; it
cannot be loaded again as text.

Registers are the kernel's 32-bit ones, counted from 0.

Source: include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from podwire.kernel import netlink
from podwire.kernel.nftables.batch import nfgenmsg
from podwire.kernel.nftables.transaction import Verdict

_FIRST_REGISTER = 8  # NFT_REG32_00; four of them make up one of the old 128-bit registers
_VERDICT_REGISTER = 0

_NEWRULE, _DELRULE = 6, 8
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4

_NETWORK, _TRANSPORT = 1, 2
_META_MARK, _META_NFPROTO, _META_L4PROTO = 3, 15, 16


def _u32(kind: int, value: int) -> bytes:
    return netlink.attr(kind, struct.pack(">I", value))


def _register(number: int) -> int:
    return _FIRST_REGISTER + number


def _expression(name: str, *data: bytes) -> bytes:
    return netlink.nest(1, netlink.text(1, name), netlink.nest(2, *data))


def _payload(base: int, offset: int, length: int, register: int) -> bytes:
    return _expression(
        "payload", _u32(1, _register(register)), _u32(2, base), _u32(3, offset), _u32(4, length)
    )


def source_address(bits: int, register: int) -> bytes:
    """Load ``ip saddr`` or ``ip6 saddr`` (one register or four)."""
    return _payload(_NETWORK, *((12, 4) if bits == 32 else (8, 16)), register)


def destination_address(bits: int, register: int) -> bytes:
    """Load ``ip daddr`` or ``ip6 daddr``."""
    return _payload(_NETWORK, *((16, 4) if bits == 32 else (24, 16)), register)


def transport_protocol(register: int) -> bytes:
    """Load ``meta l4proto``."""
    return _expression("meta", _u32(1, _register(register)), _u32(2, _META_L4PROTO))


def destination_port(register: int) -> bytes:
    """Load ``th dport``. The rule does not match packets too short to have one."""
    return _payload(_TRANSPORT, 2, 2, register)


def only_family(bits: int) -> bytes:
    """Go on only with packets of IPv4 or IPv6: loads of addresses do not look."""
    value = netlink.attr(1, bytes([2 if bits == 32 else 10]))
    return _expression("meta", _u32(1, _register(0)), _u32(2, _META_NFPROTO)) + _expression(
        "cmp", _u32(1, _register(0)), _u32(2, 0), netlink.nest(3, value)
    )


def through_mark(*pairs: tuple[int, int], spare: int) -> bytes:
    """Copy registers (from, to) by way of the packet's mark, which keeps its value.

    `spare` is a register of our own. Nothing in between can end the rule.
    """
    out = _expression("meta", _u32(1, _register(spare)), _u32(2, _META_MARK))
    for source, target in pairs:
        out += _expression("meta", _u32(3, _register(source)), _u32(2, _META_MARK))
        out += _expression("meta", _u32(1, _register(target)), _u32(2, _META_MARK))
    return out + _expression("meta", _u32(3, _register(spare)), _u32(2, _META_MARK))


def constant(value: bytes, register: int) -> bytes:
    """Load four bytes."""
    return _expression(
        "immediate",
        _u32(1, _register(register)),
        netlink.nest(2, netlink.attr(1, value)),
    )


def lookup(name: str, key: int, into: int | None = None) -> bytes:
    """Look up the key that starts at a register; the rule ends where it is not there.

    `into`: the register for the map's data; None: the data is a verdict, which is followed.
    """
    register = _VERDICT_REGISTER if into is None else _register(into)
    return _expression("lookup", netlink.text(1, name), _u32(2, _register(key)), _u32(3, register))


def verdict(value: Verdict) -> bytes:
    """Decide."""
    parts = netlink.attr(1, struct.pack(">i", value.code))
    if value.chain:
        parts += netlink.text(2, value.chain)
    return _expression(
        "immediate", _u32(1, _VERDICT_REGISTER), netlink.nest(2, netlink.nest(2, parts))
    )


class RuleMessage(NamedTuple):
    """One message of a batch: `podwire.kernel.nftables.batch.Message`."""

    kind: int
    flags: int
    body: bytes


def rule_messages(
    family: int, table: str, chains: Mapping[str, Sequence[Sequence[bytes]]]
) -> list[RuleMessage]:
    """What empties the chains and fills them with these rules, each its expressions in order."""
    messages: list[RuleMessage] = []
    for chain, rules in chains.items():
        where = nfgenmsg(family)
        where += netlink.text(_RULE_TABLE, table) + netlink.text(_RULE_CHAIN, chain)
        messages.append(RuleMessage(_DELRULE, 0, where))
        for rule in rules:
            body = where + netlink.nest(_RULE_EXPRESSIONS, *rule)
            flags = netlink.NLM_F_CREATE | netlink.NLM_F_APPEND
            messages.append(RuleMessage(_NEWRULE, flags, body))
    return messages
