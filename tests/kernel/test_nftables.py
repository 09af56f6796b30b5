"""nf_tables by our own messages, against a real kernel; `nft` is the oracle."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from podwire.errors import KernelError
from podwire.kernel import netns
from podwire.kernel.nftables import (
    DROP,
    IP,
    Element,
    NfTables,
    Set,
    Transaction,
    concat,
    goto,
    interval,
)

STRUCTURE = """
table ip t {
    map verdicts { type ipv4_addr . inet_proto . inet_service : verdict; }
    map backends {
        typeof ip daddr . meta l4proto . th dport . numgen random mod 65535 : ip daddr . tcp dport
    }
    set ranges { type ipv4_addr . inet_service; flags interval; }
    set prefixes { type ipv4_addr; flags interval; }
    set clients { type ipv4_addr; flags timeout; }
    chain there { accept; }
}
"""
VERDICTS, BACKENDS = Set(IP, "t", "verdicts"), Set(IP, "t", "backends")
RANGES, PREFIXES, CLIENTS = (
    Set(IP, "t", "ranges"),
    Set(IP, "t", "prefixes"),
    Set(IP, "t", "clients"),
)


@pytest.fixture
def namespace() -> Iterator[int]:
    fd = netns.create()
    yield fd
    os.close(fd)


@pytest.fixture
def nft(namespace: int) -> Iterator[NfTables]:
    with NfTables(namespace) as nft:
        nft.run(STRUCTURE)
        yield nft


def key(number: int, port: int = 80) -> bytes:
    return concat((0x0A600000 + number).to_bytes(4, "big"), b"\x06", port.to_bytes(2, "big"))


def commit(nft: NfTables, *changes: tuple[str, Set, list[Element]]) -> None:
    transaction = Transaction()
    for verb, target, elements in changes:
        getattr(transaction, verb)(target, elements)
    nft.commit(transaction)


def listing(namespace: int, name: str) -> str:
    return netns.run(namespace, ["nft", "list", "map", "ip", "t", name]).stdout


def test_elements_of_many_messages_read_back_and_nft_agrees(nft: NfTables, namespace: int) -> None:
    slots = [
        Element(
            key(i) + slot.to_bytes(4, "little"),
            concat(bytes((10, 20, i >> 8, i & 255)), (8080 + slot).to_bytes(2, "big")),
        )
        for i in range(2000)
        for slot in range(2)
    ]
    verdicts = [Element(key(i), goto("there")) for i in range(2000)] + [Element(key(9999), DROP)]
    commit(nft, ("add", BACKENDS, slots), ("add", VERDICTS, verdicts))
    assert set(nft.elements(BACKENDS)) == set(slots)
    assert set(nft.elements(VERDICTS)) == set(verdicts)
    text = listing(namespace, "backends")
    assert "10.96.0.7 . tcp . 80 . 1 : 10.20.0.7 . 8081" in text
    assert "10.96.0.7 . tcp . 80 : goto there" in listing(namespace, "verdicts")


def test_a_refused_element_is_named_and_nothing_changes(nft: NfTables) -> None:
    commit(nft, ("add", VERDICTS, [Element(key(1), DROP)]))
    before = nft.generation()
    gone = Element(key(2))
    with pytest.raises(KernelError, match="0a600002") as caught:
        commit(nft, ("add", VERDICTS, [Element(key(3), DROP)]), ("delete", VERDICTS, [gone]))
    assert caught.value.errno == errno.ENOENT
    assert nft.elements(VERDICTS) == [Element(key(1), DROP)]
    assert nft.generation() == before
    commit(nft, ("delete", VERDICTS, [Element(key(1))]))  # the socket is in step afterwards
    assert nft.elements(VERDICTS) == []


def test_an_element_is_replaced_within_one_transaction(nft: NfTables) -> None:
    commit(nft, ("add", VERDICTS, [Element(key(1), DROP)]))
    commit(
        nft,
        ("delete", VERDICTS, [Element(key(1))]),
        ("add", VERDICTS, [Element(key(1), goto("there"))]),
    )
    assert nft.elements(VERDICTS) == [Element(key(1), goto("there"))]


def test_ranges_intervals_and_timeouts(nft: NfTables) -> None:
    first, last = concat(b"\x0a\0\0\0", b"\0\x50"), concat(b"\x0a\0\0\xff", b"\0\x5a")
    commit(
        nft,
        ("add", RANGES, [Element(first, end=last)]),
        ("add", PREFIXES, [*interval(b"\x0a\0\0\0", b"\x0a\0\0\xff")]),
        ("add", PREFIXES, [*interval(b"\xff\0\0\0", b"\xff\xff\xff\xff")]),
        ("add", CLIENTS, [Element(b"\x0a\0\0\1", timeout_ms=60_000)]),
    )
    assert nft.elements(RANGES) == [Element(first, end=last)]
    assert len(nft.elements(PREFIXES)) == 3
    assert nft.elements(CLIENTS) == [Element(b"\x0a\0\0\1", timeout_ms=60_000)]
    commit(
        nft,
        ("delete", RANGES, [Element(first, end=last)]),
        ("delete", PREFIXES, [*interval(b"\x0a\0\0\0", b"\x0a\0\0\xff")]),
    )
    assert nft.elements(RANGES) == []
    assert nft.elements(PREFIXES) == [Element(b"\xff\0\0\0")]


def test_names(nft: NfTables) -> None:
    assert nft.tables(IP) == ["t"]
    assert nft.chains(IP, "t") == ["there"]
    assert set(nft.sets(IP, "t")) == {"verdicts", "backends", "ranges", "prefixes", "clients"}
    assert nft.sets(IP, "nowhere") == []


def test_nft_speaks_for_itself_when_it_refuses(nft: NfTables) -> None:
    with pytest.raises(KernelError, match="syntax error"):
        nft.run("table ip t { chain }")


def test_an_empty_transaction_makes_no_commit(nft: NfTables) -> None:
    before = nft.generation()
    nft.commit(Transaction())
    assert nft.generation() == before
