"""The built-in echo server: what every container of a lab pod runs.

On TCP ports it speaks HTTP/1.1 (keep-alive, pipelining, chunked request bodies) and answers with
what it saw of the request; anything that is not HTTP is answered with one JSON line and then
echoed. On UDP ports every datagram is answered with a JSON datagram.

    /healthz /readyz /livez   200 ok
    ?delay=MS                 answer later
    ?size=BYTES  /size/BYTES  a body of that size
    ?status=CODE              that status

The protocols know nothing of namespaces: they get sockets that somebody opened in the right one.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

LOGGED_REQUESTS = 200  # the newest per pod are kept for `podwire lab logs`
LARGEST_HEAD = 65536
_CHUNK = b"podwire " * 8192
_METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"PATCH ", b"OPTIONS ")
_IP_PKTINFO = 8  # ip(7); Python names it from 3.14 on
_HEALTH = frozenset(("/healthz", "/readyz", "/livez"))


class Entry(NamedTuple):
    """One request as `podwire lab logs` shows it. `time` is wall clock in seconds."""

    time: float
    protocol: str
    port: int
    client: str
    request: str
    status: int


@dataclass(slots=True)
class Identity:
    """Who answers: goes into every reply."""

    namespace: str
    pod: str
    node: str
    healthy: bool = True  # False: /healthz answers 503
    log: deque[Entry] = field(default_factory=lambda: deque(maxlen=LOGGED_REQUESTS))

    def seen(self, protocol: str, local: str, client: str, **more: object) -> bytes:
        """The JSON line that describes one request."""
        return json.dumps(
            {
                "pod": self.pod,
                "namespace": self.namespace,
                "node": self.node,
                "protocol": protocol,
                "address": local,
                "client": client,
                **more,
            }
        ).encode()


def endpoint_text(sockname: Any) -> str:
    """``10.0.0.1:80`` or ``[fd00::1]:80`` of a socket address; IPv4-mapped ones as IPv4."""
    host, port = str(sockname[0]), int(sockname[1])
    if host.startswith("::ffff:") and "." in host:
        host = host[7:]
    host = host.partition("%")[0]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(slots=True)
class Request:
    """A parsed request head; `length` is the body's, -1 when it is chunked."""

    method: str
    target: str
    version: str
    headers: dict[str, str]
    length: int

    @property
    def keep_alive(self) -> bool:
        connection = self.headers.get("connection", "").lower()
        return connection != "close" if self.version == "HTTP/1.1" else connection == "keep-alive"


def parse_head(head: bytes) -> Request | None:
    """The request line and headers (RFC 9112, sections 3 and 5); None when they are malformed."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.1", "HTTP/1.0") or not words[1]:
        return None
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            return None
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if headers.get("transfer-encoding", "").lower() == "chunked":
        length = -1
    else:
        text = headers.get("content-length", "0")
        if not (text.isascii() and text.isdigit()) or "transfer-encoding" in headers:
            return None
        length = int(text)
    return Request(words[0], words[1], words[2], headers, length)


class TcpEcho(asyncio.Protocol):
    """One connection. HTTP when it begins like HTTP, a plain echo otherwise.

    A request is answered before the next one is read, so pipelined ones keep their order.
    """

    def __init__(
        self, identity: Identity, protocol: str, connections: set[asyncio.Transport]
    ) -> None:
        self._identity = identity
        self._connections = connections
        self._protocol = protocol
        self._buffer = bytearray()
        self._state = "start"
        self._request: Request | None = None
        self._body = 0  # bytes of the body read so far
        self._chunk = -1  # bytes left of the present chunk; -1: a size line comes next
        self._to_send = 0  # bytes of a large body still to be written
        self._paused = False
        self._ended = False  # the peer sent its FIN
        self._delay: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(transport)
        self._client = endpoint_text(transport.get_extra_info("peername") or ("?", 0))
        self._local = endpoint_text(transport.get_extra_info("sockname") or ("?", 0))

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self._transport)
        if self._delay is not None:
            self._delay.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._advance()
        if self._state == "answering" and len(self._buffer) > LARGEST_HEAD:
            self._transport.pause_reading()  # pipelined requests wait for the present answer

    def eof_received(self) -> bool:
        self._ended = True
        return self._state == "answering"  # stay open until the answer is written

    def _advance(self) -> None:
        """Take steps until more data is needed or an answer is under way."""
        steps = {
            "start": self._classify,
            "raw": self._echo,
            "head": self._read_head,
            "body": self._read_body,
        }
        while (step := steps.get(self._state)) is not None and step():
            pass

    def _classify(self) -> bool:
        if not self._buffer:
            return False
        if any(self._buffer.startswith(method) for method in _METHODS):
            self._state = "head"
            return True
        if any(method.startswith(self._buffer) for method in _METHODS):
            return False
        self._state = "raw"
        text = bytes(self._buffer[:200]).decode("utf-8", "replace")
        line = self._identity.seen(self._protocol, self._local, self._client, data=text)
        self._transport.write(line + b"\n")
        self._log(text.strip(), 0)
        return True

    def _echo(self) -> bool:
        self._transport.write(bytes(self._buffer))
        self._buffer.clear()
        return False

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or end > LARGEST_HEAD:
            if len(self._buffer) > LARGEST_HEAD:
                self._refuse(431)
            return False
        request = parse_head(bytes(self._buffer[:end]))
        del self._buffer[: end + 4]
        if request is None:
            self._refuse(400)
            return False
        self._request, self._state = request, "body"
        self._body, self._chunk = 0, -1
        if request.headers.get("expect", "").lower() == "100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _read_body(self) -> bool:
        request = self._request
        assert request is not None
        if request.length >= 0:
            take = min(len(self._buffer), request.length - self._body)
            del self._buffer[:take]
            self._body += take
            if self._body < request.length:
                return False
        elif not self._read_chunks():
            return False
        self._answer(request)
        return self._state == "head"

    def _read_chunks(self) -> bool:
        """Eat a chunked body (RFC 9112, section 7.1); True when it is whole."""
        while True:
            if self._chunk > 0:
                take = min(len(self._buffer), self._chunk)
                del self._buffer[:take]
                self._body += take
                self._chunk -= take
                if self._chunk:
                    return False
            end = self._buffer.find(b"\r\n")
            if end < 0:
                if len(self._buffer) > 256:
                    self._refuse(400)
                return False
            line = bytes(self._buffer[:end]).partition(b";")[0].strip()
            if self._chunk == 0 and not line:  # the line end after a chunk's data
                del self._buffer[: end + 2]
                self._chunk = -1
                continue
            if self._chunk == -2:  # trailers, up to the empty line
                del self._buffer[: end + 2]
                if not line:
                    return True
                continue
            try:
                size = int(line, 16)
            except ValueError:
                self._refuse(400)
                return False
            del self._buffer[: end + 2]
            self._chunk = size if size > 0 else -2

    def _refuse(self, status: int) -> None:
        self._state = "closed"
        self._send(status, b"", keep=False, head=False)
        self._transport.close()

    def _answer(self, request: Request) -> None:
        path, _, query_text = request.target.partition("?")
        query = dict(parse_qsl(query_text, keep_blank_values=True))
        self._state = "answering"
        delay_ms = _number(query.get("delay"))
        if delay_ms:
            loop = asyncio.get_running_loop()
            self._delay = loop.call_later(delay_ms / 1000, self._delayed, request, path, query)
        else:
            self._reply(request, path, query)

    def _delayed(self, request: Request, path: str, query: Mapping[str, str]) -> None:
        self._delay = None
        self._reply(request, path, query)
        self._continue()

    def _continue(self) -> None:
        """After an answer that took its time: take up the requests that came meanwhile."""
        if self._state == "head":
            self._transport.resume_reading()
            self._advance()

    def _reply(self, request: Request, path: str, query: Mapping[str, str]) -> None:
        size = _number(path[6:] if path.startswith("/size/") else query.get("size"))
        status = _number(query.get("status")) or 200
        if path in _HEALTH and not self._identity.healthy:
            status = 503
        if not 200 <= status <= 599:
            status = 400
        head = request.method == "HEAD"
        keep = request.keep_alive and not self._ended
        self._log(f"{request.method} {request.target}", status)
        if size:
            self._send(status, b"", keep=keep, head=True, length=size, kind="text/plain")
            self._to_send = 0 if head else size
            self._keep_after = keep
            self._write_more()
            return
        if path in _HEALTH:
            body = b"ok\n" if status == 200 else b"unhealthy\n"
            kind = "text/plain"
        else:
            body = self._describe(request, path)
            kind = "application/json"
        self._send(status, body, keep=keep, head=head, kind=kind)
        self._finish(keep)

    def _describe(self, request: Request, path: str) -> bytes:
        return (
            self._identity.seen(
                self._protocol,
                self._local,
                self._client,
                method=request.method,
                path=path,
                target=request.target,
                headers=request.headers,
                body_bytes=self._body,
            )
            + b"\n"
        )

    def _send(
        self,
        status: int,
        body: bytes,
        *,
        keep: bool,
        head: bool,
        length: int = -1,
        kind: str = "text/plain",
    ) -> None:
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = "Unknown"
        lines = (
            f"HTTP/1.1 {status} {phrase}\r\n"
            f"Server: podwire-echo\r\n"
            f"Content-Type: {kind}\r\n"
            f"Content-Length: {len(body) if length < 0 else length}\r\n"
            f"Connection: {'keep-alive' if keep else 'close'}\r\n\r\n"
        ).encode()
        self._transport.write(lines if head else lines + body)

    def _finish(self, keep: bool) -> None:
        if keep and not self._transport.is_closing():
            self._state = "head"
        else:
            self._state = "closed"
            self._transport.close()

    def _write_more(self) -> None:
        """Write a large body as fast as the peer reads it."""
        while self._to_send and not self._paused and not self._transport.is_closing():
            piece = _CHUNK[: min(self._to_send, len(_CHUNK))]
            self._to_send -= len(piece)
            self._transport.write(piece)
        if not self._to_send and self._state == "answering":
            self._finish(self._keep_after)

    def pause_writing(self) -> None:
        self._paused = True
        if self._state == "raw":
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        if self._state == "raw":
            self._transport.resume_reading()
        elif self._state == "answering" and self._to_send:
            self._write_more()
            self._continue()

    def _log(self, request: str, status: int) -> None:
        port = int(self._local.rpartition(":")[2])
        self._identity.log.append(
            Entry(time.time(), self._protocol, port, self._client, request, status)
        )


def _number(text: str | None) -> int:
    """A non-negative whole number, 0 for anything else."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 12 else 0


class UdpEcho:
    """Answers datagrams on one socket, from the address that each was sent to.

    A wildcard socket would answer from the address of the route back, which differs from the one
    asked when a namespace has several (host network pods); hence the packet info (ip(7), ipv6(7)).
    """

    def __init__(self, sock: socket.socket, identity: Identity) -> None:
        self._socket = sock
        self._identity = identity
        self._port = int(sock.getsockname()[1])
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)

    def readable(self) -> None:
        """Called by the loop: answer what waits, a bounded number at a time."""
        for _ in range(64):
            try:
                data, ancillary, _, client = self._socket.recvmsg(65536, 128)
            except (BlockingIOError, ConnectionRefusedError):
                return
            except OSError:
                continue
            self._answer(data, ancillary, client)

    def _answer(self, data: bytes, ancillary: list[tuple[int, int, bytes]], client: Any) -> None:
        local, reply_info = self._local(ancillary)
        text = data[:200].decode("utf-8", "replace")
        who = endpoint_text(client)
        self._identity.log.append(Entry(time.time(), "UDP", self._port, who, text.strip(), 0))
        reply = self._identity.seen("UDP", local, who, data=text, bytes=len(data))
        try:
            self._socket.sendmsg([reply], reply_info, 0, client)
        except OSError:
            return  # a full buffer or a vanished route: datagrams may be lost

    def _local(
        self, ancillary: list[tuple[int, int, bytes]]
    ) -> tuple[str, list[tuple[int, int, bytes]]]:
        for level, kind, info in ancillary:
            if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
                address = info[:16]
                text = endpoint_text((socket.inet_ntop(socket.AF_INET6, address), self._port))
                return text, [(level, kind, address + bytes(4))]
            if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                address = info[8:12]
                text = endpoint_text((socket.inet_ntop(socket.AF_INET, address), self._port))
                return text, [(level, kind, struct.pack("=I4s4s", 0, address, bytes(4)))]
        return f"?:{self._port}", []


class Servers:
    """The listening sockets of one pod, attached to the running loop."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Transport] = set()
        self._datagrams: list[socket.socket] = []

    async def serve(self, protocol: str, sock: socket.socket) -> None:
        """Take over a bound socket (`protocol` TCP, UDP or SCTP; stream ones not yet listening)."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        if protocol == "UDP":
            loop.add_reader(sock.fileno(), UdpEcho(sock, self.identity).readable)
            self._datagrams.append(sock)
            return
        server = await loop.create_server(
            lambda: TcpEcho(self.identity, protocol, self._connections), sock=sock, backlog=1024
        )
        self._servers.append(server)

    def close(self) -> None:
        """Stop; open connections are reset, for a socket keeps its namespace alive."""
        for server in self._servers:
            server.close()
        for transport in list(self._connections):
            transport.abort()
        loop = asyncio.get_running_loop()
        for sock in self._datagrams:
            loop.remove_reader(sock.fileno())
            sock.close()
        self._servers.clear()
        self._datagrams.clear()
