"""The echo server's protocol, without sockets: bytes in, bytes out."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.lab.echo import Identity, TcpEcho, endpoint_text, parse_head


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("::ffff:10.0.0.9", 4000), "sockname": ("fd00::1", 80)})
        self.out = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        self.out += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def connect() -> tuple[TcpEcho, Wire, Identity]:
    identity = Identity("shop", "web-1", "node1")
    echo, wire = TcpEcho(identity, "TCP", set()), Wire()
    echo.connection_made(wire)
    return echo, wire, identity


def answers(wire: Wire) -> list[tuple[int, dict[str, str], bytes]]:
    """The responses on the wire, with their bodies."""
    found, rest = [], bytes(wire.out)
    while rest:
        head, _, rest = rest.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        length = int(headers.get("Content-Length", 0))
        found.append((int(lines[0].split()[1]), headers, rest[:length]))
        rest = rest[length:]
    return found


def test_a_request_is_answered_with_what_was_seen() -> None:
    echo, wire, identity = connect()
    echo.data_received(
        b"POST /cart?x=1 HTTP/1.1\r\nHost: a\r\nX-A: b\r\nContent-Length: 3\r\n\r\nabc"
    )
    ((status, headers, body),) = answers(wire)
    seen = json.loads(body)
    assert (status, headers["Connection"]) == (200, "keep-alive")
    assert seen["pod"] == "web-1"
    assert seen["client"] == "10.0.0.9:4000"
    assert seen["address"] == "[fd00::1]:80"
    assert (seen["method"], seen["path"], seen["body_bytes"]) == ("POST", "/cart", 3)
    assert seen["headers"]["x-a"] == "b"
    assert [entry.request for entry in identity.log] == ["POST /cart?x=1"]


def test_pipelined_requests_are_answered_in_order_and_close_is_honoured() -> None:
    echo, wire, _ = connect()
    echo.data_received(
        b"GET /healthz HTTP/1.1\r\n\r\nHEAD /size/10 HTTP/1.1\r\n\r\n"
        b"GET /size/70000 HTTP/1.1\r\nConnection: close\r\n\r\n"
    )
    text = bytes(wire.out)
    assert text.startswith(b"HTTP/1.1 200 OK\r\n")
    assert text.count(b"HTTP/1.1 200") == 3
    assert len(text) > 70000
    assert wire.closed


def test_chunked_bodies_are_read_to_their_end() -> None:
    echo, wire, _ = connect()
    echo.data_received(
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n"
        b"0\r\nTrailer: x\r\n\r\nGET /second HTTP/1.1\r\n\r\n"
    )
    first, second = (json.loads(body) for _, _, body in answers(wire))
    assert first["body_bytes"] == 13
    assert second["path"] == "/second"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /?status=503 HTTP/1.1\r\n\r\n", 503),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /" + b"a" * 70000, 431),
    ],
)
def test_statuses(request_: bytes, status: int) -> None:
    echo, wire, _ = connect()
    echo.data_received(request_)
    assert answers(wire)[0][0] == status


def test_an_unhealthy_pod_fails_its_probes_only() -> None:
    echo, wire, identity = connect()
    identity.healthy = False
    echo.data_received(b"GET /healthz HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert [status for status, _, _ in answers(wire)] == [503, 200]


def test_what_is_not_http_is_described_and_echoed() -> None:
    echo, wire, identity = connect()
    echo.data_received(b"PING\r\n")
    echo.data_received(b"more")
    line, _, rest = bytes(wire.out).partition(b"\n")
    assert json.loads(line)["data"] == "PING\r\n"
    assert rest == b"PING\r\nmore"
    assert identity.log[0].request == "PING"


@given(st.data())
def test_any_split_of_the_stream_gives_the_same_answers(data: st.DataObject) -> None:
    stream = (
        b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
        b"POST /b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        b"POST /c HTTP/1.1\r\nContent-Length: 4\r\n\r\nbodyGET /d HTTP/1.0\r\n\r\n"
    )
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=8)))
    echo, wire, _ = connect()
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        if begin < end:
            echo.data_received(stream[begin:end])
    assert [json.loads(body)["path"] for _, _, body in answers(wire)] == ["/a", "/b", "/c", "/d"]
    assert wire.closed  # HTTP/1.0 without keep-alive


@given(st.binary(max_size=300))
def test_any_head_parses_or_is_refused(head: bytes) -> None:
    request = parse_head(head)
    assert request is None or request.length >= -1


def test_endpoints_are_written_as_people_read_them() -> None:
    assert endpoint_text(("::ffff:10.0.0.1", 80, 0, 0)) == "10.0.0.1:80"
    assert endpoint_text(("fe80::1%eth0", 80, 0, 2)) == "[fe80::1]:80"
