"""Addresses and prefixes as packed bytes, held against Python's ipaddress."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.errors import InvalidObject
from podwire.net import (
    Prefix,
    disjoint,
    format_address,
    format_endpoint,
    network,
    parse_address,
    parse_prefix,
    range_to_prefixes,
)

ADDRESSES = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)
# Few bits, so that prefixes meet.
PREFIXES = st.builds(
    lambda first, length, ipv6: network(bytes([first]) + bytes(15 if ipv6 else 3), length),
    st.integers(0, 255),
    st.integers(0, 9),
    st.booleans(),
)


@given(ADDRESSES)
def test_an_address_survives_its_text(address: bytes) -> None:
    text = format_address(address)
    assert ipaddress.ip_address(text).packed == address
    mapped = len(address) == 16 and address.startswith(bytes(10) + b"\xff\xff")
    assert parse_address(text) == (address[12:] if mapped else address)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("010.002.003.004", bytes([10, 2, 3, 4])),
        ("::ffff:192.0.2.1", bytes([192, 0, 2, 1])),
        ("::1", bytes(15) + b"\1"),
    ],
)
def test_spellings_that_stored_objects_have(text: str, address: bytes) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "1.2.3", "1.2.3.256", "1.2.3.4.5", "1.2.3.4 ", "fe80::1%eth0", "::g", "١.2.3.4"]
)
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(InvalidObject, match="not an IP address"):
        parse_address(text)


def test_endpoints_of_ipv6_have_brackets() -> None:
    assert format_endpoint(parse_address("10.0.0.1"), 80) == "10.0.0.1:80"
    assert format_endpoint(parse_address("fd00:0:0::1"), 80) == "[fd00::1]:80"


@given(ADDRESSES, st.data())
def test_a_prefix_is_the_network_around_an_address(address: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(address) * 8))
    oracle = ipaddress.ip_network((address, length), strict=False)
    prefix = network(address, length)
    assert (prefix.first, prefix.last) == (oracle[0].packed, oracle[-1].packed)
    assert address in prefix
    assert prefix.covers(Prefix(address, len(address) * 8))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        (" 10.0.0.0/8 ", "10.0.0.0/8"),
        ("10.0.0.1", "10.0.0.1/32"),
        ("fd00::1/64", "fd00::/64"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_cidrs_of_stored_objects(text: str, canonical: str) -> None:
    assert str(parse_prefix(text)) == canonical


@pytest.mark.parametrize("text", ["10.0.0.0/33", "fd00::/129", "10.0.0.0/", "10.0.0.0/-1", "x/8"])
def test_what_is_no_cidr_is_named(text: str) -> None:
    with pytest.raises(InvalidObject, match="not a"):
        parse_prefix(text)


@given(st.lists(PREFIXES, max_size=12))
def test_disjoint_prefixes_cover_the_same_addresses(prefixes: list[Prefix]) -> None:
    found = disjoint(prefixes)
    assert all(any(wide.covers(each) for wide in found) for each in prefixes)
    assert set(found) <= set(prefixes)
    assert not any(a.covers(b) for a in found for b in found if a != b)
    assert list(found) == sorted(found, key=lambda each: (each.bits, each))


@given(st.integers(0, 255), st.integers(0, 255))
def test_a_range_is_cut_into_the_fewest_prefixes(one: int, other: int) -> None:
    first, last = sorted((one, other))
    oracle = ipaddress.summarize_address_range(
        ipaddress.IPv4Address(first), ipaddress.IPv4Address(last)
    )
    assert range_to_prefixes(first, last, 32) == [
        (int(each.network_address), each.prefixlen) for each in oracle
    ]
