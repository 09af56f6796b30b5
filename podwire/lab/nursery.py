"""Where supervisors are born: a process that has imported what labs run, and only forks.

Whoever asks for a lab may have threads, an event loop, locks that somebody holds, sockets; a fork
of it would have them, too. The nursery is a program of its own, started at the first lab and ended
with the process that started it; labs live on. Its one import serves all labs of that process.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from podwire.errors import PodwireError
from podwire.lab import process
from podwire.lab.state import LabDir, Record

_LARGEST = 1 << 20  # a request: the environment is most of it
_PACKAGES = Path(__file__).parents[2]


class Nursery:
    """The caller's end."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST)
        paths = [str(_PACKAGES), os.environ.get("PYTHONPATH", "")]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "podwire.lab.nursery"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                start_new_session=True,  # Ctrl-C is the caller's
            )

    @property
    def alive(self) -> bool:
        """Whether it serves this process: a fork of the owner needs one of its own."""
        return self.owner == os.getpid() and self._process.poll() is None

    def bear(self, lab: LabDir, record: Record, nodes: list[str]) -> str:
        """Have a supervisor started; ``+`` when everything runs, else what failed."""
        read, write = os.pipe2(os.O_CLOEXEC)
        request = {"record": asdict(record), "nodes": nodes, "environment": dict(os.environ)}
        try:
            socket.send_fds(self._sock, [json.dumps(request).encode()], [write])
        except OSError as error:
            raise PodwireError(f"lab {lab.name} cannot be started: {error}") from None
        finally:
            os.close(write)
        with os.fdopen(read) as answer:
            return answer.read()


_lock = threading.Lock()
_nursery: Nursery | None = None


def start(lab: LabDir, record: Record, nodes: list[str]) -> None:
    """Start a lab's supervisor; returns when every process runs.

    It has the caller's environment. Raises PodwireError when the lab does not come up (what was
    made is taken away by `down`).
    """
    global _nursery
    with _lock:
        if _nursery is None or not _nursery.alive:
            _nursery = Nursery()
        nursery = _nursery
    answer = nursery.bear(lab, record, nodes)
    if answer != "+":
        raise PodwireError(f"lab {lab.name} does not come up: {answer or 'the supervisor died'}")


def main() -> None:
    """Serve the process at the other end of standard input until it ends."""
    from podwire.lab import supervisor  # and with it all that a lab runs

    gc.collect()
    gc.freeze()  # what is imported stays shared with the labs
    sock = socket.socket(fileno=os.dup(0))
    gone = select.poll()
    gone.register(sock, select.POLLRDHUP)
    while True:
        text, fds, _, _ = socket.recv_fds(sock, _LARGEST, 1)
        if not text or gone.poll(0):
            return
        (ready,) = fds
        if process.daemon():
            sock.close()
            request = json.loads(text)
            _become(request["environment"])
            record = Record(**request["record"])
            supervisor.supervise(LabDir(record.name), record, request["nodes"], ready)
        os.close(ready)


def _become(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


if __name__ == "__main__":
    main()
