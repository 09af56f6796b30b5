"""Maglev tables: a flow gets the same backend on every node, and few flows move when one goes.

Each backend has a preference order of its own over the table's entries, and backends take turns
in claiming the entry that they like best among those still free. Source: Eisenbud et al., "Maglev:
A Fast and Reliable Software Network Load Balancer" (NSDI 2016), section 3.4.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

from podwire.services import Backend

SIZES = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
"""Primes, so that every step visits every entry. A hundred entries for each backend are even to a
percent or two."""
DEFAULT_SIZE = 16381
_MOST_BACKENDS = 1 << 16  # an entry has two bytes
_LAST = 128  # about the square root of a table: what is cheaper changes there


@lru_cache(maxsize=64)
def table(backends: Sequence[Backend], size: int) -> bytes:
    """Places in `backends` (a sorted tuple), two bytes each in the machine's order, `size` in all.

    Depends on nothing but the arguments. Empty where no table is of use: with one backend, or with
    more than there is room for; then the choice is random.
    """
    if not needs_table(len(backends), size):
        return b""
    entries = array("i", [-1]) * size
    orders = [_order(backend, size) for backend in backends]
    nexts = [offset for offset, _ in orders]
    free = size
    while free > _LAST:
        for number, (_, skip) in enumerate(orders):
            entry = nexts[number]
            while entries[entry] >= 0:
                entry += skip
                if entry >= size:
                    entry -= size
            entries[entry] = number
            nexts[number] = entry
            free -= 1
            if free == _LAST:
                break
    _claim_last(entries, orders, (size - free) % len(orders))
    return array("H", entries).tobytes()


def needs_table(count: int, size: int) -> bool:
    """Whether a list of `count` backends gets a table of `size` entries."""
    return 1 < count <= min(size, _MOST_BACKENDS)


def _order(backend: Backend, size: int) -> tuple[int, int]:
    """First entry, and the step to each next one."""
    digest = blake2b(backend, digest_size=16).digest()
    first, second = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
    return first % size, second % (size - 1) + 1


def _claim_last(entries: array[int], orders: Sequence[tuple[int, int]], turn: int) -> None:
    """The same for the entries that are left: a step from one to the next would be long by now."""
    size = len(entries)
    free = {entry for entry, number in enumerate(entries) if number < 0}
    inverses = [pow(skip, -1, size) for _, skip in orders]
    while free:
        offset, inverse = orders[turn][0], inverses[turn]
        entry = min(free, key=lambda each: (each - offset) * inverse % size)
        entries[entry] = turn
        free.remove(entry)
        turn = (turn + 1) % len(orders)
