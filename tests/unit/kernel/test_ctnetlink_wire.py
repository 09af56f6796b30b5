"""The connection table's messages, both ways, without a kernel."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.kernel import kmsg
from podwire.kernel.ctnetlink import Entry, Status, TcpState, Tuple
from podwire.kernel.ctnetlink.ahead import read_ahead
from podwire.kernel.ctnetlink.counting import count_flows, flow_key
from podwire.kernel.ctnetlink.entries import create_request, delete_request, parse
from podwire.kernel.ctnetlink.table import entries_of, sum_proc_statistics

PROTOCOLS = (6, 17, 132)


@st.composite
def tuples(draw: st.DrawFn) -> Tuple:
    size = draw(st.sampled_from((4, 16)))
    address = st.binary(min_size=size, max_size=size)
    port = st.integers(0, 65535)
    return Tuple(
        draw(address), draw(address), draw(st.sampled_from(PROTOCOLS)), draw(port), draw(port)
    )


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    there = draw(tuples())
    tcp = there.protocol == 6
    return Entry(
        there,
        there.reversed(),
        Status(draw(st.sampled_from((8, 14)))),
        draw(st.integers(0, 2**31)),
        mark=draw(st.integers(0, 2**32 - 1)),
        zone=draw(st.sampled_from((0, 0, 0, 7))),
        labels=draw(st.sampled_from((0, 1 << 70))),
        state=draw(st.sampled_from(list(TcpState))) if tcp else None,
    )


@given(entries())
def test_what_is_spelled_is_parsed(entry: Entry) -> None:
    assert parse(create_request(entry).body) == entry


@given(entries())
def test_a_delete_names_tuple_zone_and_id(entry: Entry) -> None:
    body = delete_request(entry._replace(id=77)).body
    assert body.endswith(struct.pack(">HHI", 0x800, 0xC00, 77)[-4:])
    assert (b"\x06\x00\x12\x00" in body) == bool(entry.zone)  # CTA_ZONE


def message(body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), 0x100, 2, 1, 0) + body


@given(st.lists(entries(), max_size=30))
def test_counting_messages_of_any_shape(made: list[Entry]) -> None:
    """Our own spelling has other attributes than a kernel's dump, so TCP takes the long way and
    the rest the short one; both must agree with the full parse.
    """
    datagram = b"".join(message(create_request(entry).body) for entry in made)
    assert list(entries_of(datagram)) == made
    counted: dict[object, int] = {}
    for portion in count_flows([datagram]):
        for key, count in portion.items():
            counted[key] = counted.get(key, 0) + count
    expected: dict[object, int] = {}
    for entry in made:
        expected[flow_key(entry)] = expected.get(flow_key(entry), 0) + 1
    assert counted == expected


# two entries as Linux 6.18 dumps them: TCP ESTABLISHED and UDP, IPv4
KERNEL_TCP = bytes.fromhex(
    "02000000 34000180 14000180 08000100 0a01006d 08000200 0a600109 1c000280 05000100 06000000"
    "06000200 398d0000 06000300 00500000 34000280 14000180 08000100 0a600109 08000200 0a01006d"
    "1c000280 05000100 06000000 06000200 00500000 06000300 398d0000 08000300 0000000e 08000800"
    "00000000 08000c00 37e1964a 08000b00 00000001 08000700 00000255 30000480 2c000180 05000100"
    "03000000 05000200 00000000 05000300 00000000 06000400 00000000 06000500 00000000 1c001880"
    "08000100 00000000 08000200 00000000 08000300 00000000"
)


def test_a_kernels_message_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = parse(KERNEL_TCP)
    assert expected
    assert expected.state == TcpState.ESTABLISHED
    monkeypatch.setattr("podwire.kernel.ctnetlink.counting.parse", lambda body: None)
    (counted,) = count_flows([message(KERNEL_TCP) * 3])
    assert counted == {flow_key(expected): 3}


def test_reading_ahead_changes_nothing_and_leaves_no_thread() -> None:
    pieces = [bytes([n]) for n in range(100)]
    assert list(read_ahead(iter(pieces))) == pieces
    early = read_ahead(iter(pieces))
    assert next(early) == pieces[0]
    early.close()

    def broken() -> Iterator[bytes]:
        yield b"first"
        raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        list(read_ahead(broken()))
    assert not [t for t in threading.enumerate() if t.name == "conntrack-dump"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("entries drop\n0000000a 00000001\n0000000a 000000ff\n", {"entries": 10, "drop": 256}),
        ("entries  searched drop delete_list\n1 2 3 4\n", {"entries": 1, "searched": 2, "drop": 3,
                                                            "delete_list": 4}),
        ("", {}),
    ],
)  # fmt: skip
def test_statistics_are_read_by_header(text: str, expected: dict[str, int]) -> None:
    assert sum_proc_statistics(text) == expected


def test_a_kernel_log_record() -> None:
    record = "4,1207,8000000,-;nf_conntrack: table full, dropping packet\n SUBSYSTEM=net\n"
    assert kmsg.parse(record, 100.0) == (108.0, "nf_conntrack: table full, dropping packet")
