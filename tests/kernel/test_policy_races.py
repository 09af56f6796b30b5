"""Never a packet through that the table forbids: labels that flip, pods that come and go."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from podwire.kube.objects import Pod
from tests.kernel.policy_play import Play

FROM_B = {
    "podSelector": {"matchLabels": {"app": "a"}},
    "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}],
}
FLIPS = 200


@pytest.fixture
def play() -> Iterator[Play]:
    stage = Play()
    stage.policy("x/in", FROM_B)
    stage.start("x/a", 11, {"app": "a"})
    try:
        yield stage
    finally:
        stage.close()


class Traffic:
    """New UDP connections, one after the other, each with the time of its sending."""

    def __init__(self, play: Play, source: str, destination: str) -> None:
        self._play, self._source, self._to = play, source, (play.ip(destination), 53)
        self._server = play.socket(destination, socket.SOCK_DGRAM)
        self._server.bind(self._to)
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._stop = threading.Event()
        self.sent: list[tuple[float, float]] = []
        self.failures: list[Exception] = []
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _send(self) -> None:
        try:
            while not self._stop.is_set():
                with self._play.socket(self._source, socket.SOCK_DGRAM) as one:
                    before = time.monotonic()
                    one.sendto(str(len(self.sent)).encode(), self._to)
                    self.sent.append((before, time.monotonic()))
                time.sleep(0.0005)
        except Exception as error:
            self.failures.append(error)

    def arrived(self) -> set[int]:
        """Numbers of the packets that got through."""
        out: set[int] = set()
        self._server.setblocking(False)
        while select.select([self._server], [], [], 0.1)[0]:
            with contextlib.suppress(BlockingIOError):
                out.add(int(self._server.recv(64)))
        self._server.close()
        return out


def test_labels_flipped_under_traffic(play: Play) -> None:
    """What is sent while the table forbids it never arrives; what it allows does."""
    play.start("x/b", 12, {"app": "b"})
    forbidden: list[tuple[float, float]] = []
    allowed: list[tuple[float, float]] = []
    with Traffic(play, "x/b", "x/a") as traffic:
        began, welcome = time.monotonic(), True
        for _ in range(FLIPS):
            time.sleep(0.01)
            (allowed if welcome else forbidden).append((began, time.monotonic()))
            welcome = not welcome
            play.pod("x/b", {"app": "b" if welcome else "c"}, addresses=ADDRESSES)
            play.play()
            began = time.monotonic()
    assert traffic.failures == []
    arrived = traffic.arrived()
    judged = 0
    for number, (before, after) in enumerate(traffic.sent):
        if any(first < before and after < last for first, last in forbidden):
            assert number not in arrived, "a forbidden packet got through"
            judged += 1
        elif any(first < before and after < last for first, last in allowed):
            assert number in arrived, "an allowed packet was dropped"
            judged += 1
    assert judged > FLIPS / 2


ADDRESSES = ("10.244.1.12", "fd00:10:244:1::c")


def test_an_address_given_to_another_pod(play: Play) -> None:
    """flow-10 with packets: x/b may, the pod that takes its address may not; both orders."""
    server = play.socket("x/a", socket.SOCK_DGRAM)
    with server:
        server.bind((play.ip("x/a"), 53))
        server.settimeout(5)
        for round_ in range(8):
            play.start("x/b", 12, {"app": "b"})
            send(play, "x/b", b"welcome")
            assert server.recv(64) == b"welcome"
            play.stop("x/b")
            if round_ % 2:  # the API tells of the end before the beginning, or after
                play.store.remove(Pod, ("x", "b"))
                play.play()
            play.start("y/q", 12, {"app": "q"})
            for _ in range(10):
                send(play, "y/q", b"forbidden")
            play.store.remove(Pod, ("x", "b"))
            play.play()
            for _ in range(10):
                send(play, "y/q", b"forbidden")
            play.stop("y/q")
            play.store.remove(Pod, ("y", "q"))
            play.play()
        control = play.socket("node:n1", socket.SOCK_DGRAM)
        with control:
            control.sendto(b"control", (play.ip("x/a"), 53))
        assert server.recv(64) == b"control"


def send(play: Play, source: str, data: bytes) -> None:
    with play.socket(source, socket.SOCK_DGRAM) as one:
        one.sendto(data, (play.ip("x/a"), 53))


def test_pods_created_and_deleted_under_default_deny(play: Play) -> None:
    play.policy("y/deny", {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})
    play.play()
    server = play.socket("x/a", socket.SOCK_DGRAM)
    with server:
        server.bind((play.ip("x/a"), 53))
        server.settimeout(5)
        for round_ in range(10):
            name = f"y/p{round_ % 2}"
            play.start(name, 20, {"app": "b"})
            for _ in range(10):
                send(play, name, b"forbidden")
            play.stop(name)
            play.store.remove(Pod, ("y", name[2:]))
            play.play()
        with play.socket("node:n1", socket.SOCK_DGRAM) as control:
            control.sendto(b"control", (play.ip("x/a"), 53))
        assert server.recv(64) == b"control"
