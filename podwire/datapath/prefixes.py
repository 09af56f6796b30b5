"""Prefixes as packet filters want them."""

from __future__ import annotations

from collections.abc import Iterable

from podwire.net import Prefix


def widest(prefixes: Iterable[Prefix], bits: int) -> list[Prefix]:
    """Those of one family (32 or 128 bits) that no other one covers, in order: disjoint."""
    found: list[Prefix] = []
    for prefix in sorted(prefix for prefix in prefixes if prefix.bits == bits):
        if not found or not found[-1].covers(prefix):
            found.append(prefix)
    return found
