"""Maglev tables: even, the same everywhere, and little moves when a backend leaves."""

from array import array
from collections import Counter

import pytest

from podwire.datapath.ebpf import maglev


def make_backends(count):
    return tuple(bytes([10, 0, number >> 8, number & 255, 0, 80]) for number in range(count))


def read(table, backends):
    return [backends[number] for number in array("H", table)]


def claimed_in_turn(backends, size):
    """The paper's pseudocode (figure 3.4.1), word by word."""
    orders = [maglev._order(backend, size) for backend in backends]
    entries, tried, filled = [-1] * size, [0] * len(backends), 0
    while True:
        for number, (offset, skip) in enumerate(orders):
            while entries[entry := (offset + tried[number] * skip) % size] >= 0:
                tried[number] += 1
            entries[entry] = number
            filled += 1
            if filled == size:
                return entries


@pytest.mark.parametrize(("count", "size"), [(2, 251), (7, 1021), (251, 251), (100, 4093)])
def test_it_is_the_papers_table(count, size):
    backends = make_backends(count)
    assert list(array("H", maglev.table(backends, size))) == claimed_in_turn(backends, size)


def test_every_backend_gets_its_share():
    backends = make_backends(100)
    shares = Counter(read(maglev.table(backends, 16381), backends))
    assert len(shares) == 100
    assert max(shares.values()) - min(shares.values()) <= 2  # of 164


@pytest.mark.parametrize("gone", [0, 37, 99])
def test_little_moves_when_one_of_a_hundred_leaves(gone):
    backends = make_backends(100)
    left = backends[:gone] + backends[gone + 1 :]
    pairs = zip(
        read(maglev.table(backends, 16381), backends),
        read(maglev.table(left, 16381), left),
        strict=True,
    )
    moved = sum(old != new for old, new in pairs if old != backends[gone])
    assert moved < 0.02 * 16381


@pytest.mark.parametrize(("count", "size"), [(0, 251), (1, 251), (252, 251)])
def test_no_table_where_none_is_of_use(count, size):
    assert maglev.table(make_backends(count), size) == b""
