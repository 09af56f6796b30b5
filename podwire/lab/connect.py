"""Real requests from any namespace of the lab to any address, many at once.

A socket belongs for good to the namespace in which it was opened, so one process can ask from
everywhere. What answers is the echo server (or any HTTP server); what it saw comes back parsed.
"""

from __future__ import annotations

import errno
import json
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from podwire.kernel import netns

Outcome: TypeAlias = Literal["ok", "refused", "unreachable", "timeout", "broken"]

AT_ONCE = 256
UDP_RESEND_S = 0.25
_REFUSED = (errno.ECONNREFUSED, errno.ECONNRESET)
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Ask:
    """One request. `netns_fd` None: from the caller's own namespace. `label` is the caller's."""

    netns_fd: int | None
    address: str
    port: int
    protocol: str = "TCP"
    path: str = "/"
    timeout_s: float = 1.0
    label: Any = None


@dataclass(frozen=True)
class Answer:
    """What came of it. `status` and `body` are HTTP's; `seen` is the echo server's description."""

    ask: Ask
    outcome: Outcome
    latency_s: float
    status: int = 0
    body: bytes = b""

    @property
    def seen(self) -> dict[str, Any]:
        try:
            found: object = json.loads(self.body)
        except ValueError:
            return {}
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def ask(
    netns_fd: int | None,
    address: str,
    port: int,
    protocol: str = "TCP",
    path: str = "/",
    timeout_s: float = 2.0,
) -> Answer:
    """One request, to its end."""
    return ask_all([Ask(netns_fd, address, port, protocol, path, timeout_s)])[0]


def ask_all(asks: Iterable[Ask]) -> list[Answer]:
    """All requests, a bounded number at once; the answers in the order of the requests."""
    waiting = deque(enumerate(asks))
    answers: dict[int, Answer] = {}
    with selectors.DefaultSelector() as selector:
        running: dict[int, _Exchange] = {}
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                number, wanted = waiting.popleft()
                exchange = _Exchange(wanted)
                if exchange.answer is None:
                    running[number] = exchange
                    selector.register(exchange.socket, exchange.events, number)
                else:
                    answers[number] = exchange.answer
            now = time.monotonic()
            wake = min((e.wakes_at for e in running.values()), default=now)
            for key, _ in selector.select(max(wake - now, 0)):
                running[key.data].advance()
            now = time.monotonic()
            for number, exchange in list(running.items()):
                if now >= exchange.wakes_at:
                    exchange.wake(now)
                if exchange.answer is not None:
                    answers[number] = exchange.answer
                    selector.unregister(exchange.socket)
                    exchange.socket.close()
                    del running[number]
                elif selector.get_key(exchange.socket).events != exchange.events:
                    selector.modify(exchange.socket, exchange.events, number)
    return [answers[number] for number in range(len(answers))]


class _Exchange:
    """One request under way."""

    def __init__(self, wanted: Ask) -> None:
        self.ask = wanted
        self.answer: Answer | None = None
        self.events = selectors.EVENT_WRITE
        self._began = time.monotonic()
        self._deadline = self._began + wanted.timeout_s
        self._datagram = wanted.protocol == "UDP"
        self._resend = self._began + UDP_RESEND_S
        self._received = b""
        family = socket.AF_INET6 if ":" in wanted.address else socket.AF_INET
        kind = socket.SOCK_DGRAM if self._datagram else socket.SOCK_STREAM
        number = 132 if wanted.protocol == "SCTP" else 0
        self.socket = netns.socket(wanted.netns_fd, family, kind | socket.SOCK_NONBLOCK, number)
        code = self.socket.connect_ex((wanted.address, wanted.port))
        if code not in (0, errno.EINPROGRESS):
            self._fail(code)
            self.socket.close()

    @property
    def wakes_at(self) -> float:
        return min(self._deadline, self._resend) if self._datagram else self._deadline

    def wake(self, now: float) -> None:
        if now >= self._deadline:
            self._end("timeout")
        elif self._datagram:
            self._resend = now + UDP_RESEND_S
            self.events |= selectors.EVENT_WRITE

    def advance(self) -> None:
        try:
            if self.events & selectors.EVENT_WRITE:
                self._write()
            else:
                self._read()
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error.errno or 0)

    def _write(self) -> None:
        if code := self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._fail(code)
            return
        wanted = self.ask
        if self._datagram:
            self.socket.send(wanted.path.encode())
        else:
            host = f"[{wanted.address}]" if ":" in wanted.address else wanted.address
            self.socket.send(
                f"GET {wanted.path} HTTP/1.1\r\nHost: {host}:{wanted.port}\r\n"
                "User-Agent: podwire-lab\r\nConnection: close\r\n\r\n".encode()
            )
        self.events = selectors.EVENT_READ

    def _read(self) -> None:
        data = self.socket.recv(1 << 18)
        if self._datagram:
            self._end("ok", body=data)
            return
        self._received += data
        if data:
            return
        head, separator, body = self._received.partition(b"\r\n\r\n")
        words = head.split(b" ", 2)
        if separator and len(words) == 3 and words[1].isdigit():
            self._end("ok", int(words[1]), body)
        else:
            self._end("broken")

    def _fail(self, code: int) -> None:
        if code in _REFUSED:
            self._end("refused")
        else:
            self._end("unreachable" if code in _UNREACHABLE else "broken")

    def _end(self, outcome: Outcome, status: int = 0, body: bytes = b"") -> None:
        latency = time.monotonic() - self._began
        self.answer = Answer(self.ask, outcome, latency, status, body)


def outcomes(answers: Sequence[Answer]) -> dict[str, int]:
    """How many of each."""
    counts: dict[str, int] = {}
    for answer in answers:
        counts[answer.outcome] = counts.get(answer.outcome, 0) + 1
    return counts
