"""The agent's side of the CNI plugin: a unix socket, one call per connection.

Only root is served: the socket's mode says so, and the peer's credentials are checked. Each call
has a thread (kernel calls block shortly, `admit` may wait), so one that waits delays no other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from podwire.cni import wire
from podwire.cni.lifecycle import Lifecycle
from podwire.cni.protocol import (
    ADDRESS_TAKEN,
    INTERNAL,
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    KERNEL_REFUSED,
    NEWEST,
    NOT_AVAILABLE,
    TRY_AGAIN,
    Call,
    CniError,
    answer_version,
    parse_call,
)
from podwire.errors import ConfigError, KernelError, PodwireError
from podwire.ipam.pool import Exhausted, NotAvailable

log = logging.getLogger(__name__)

SOCKET = "cni.sock"
LEFT_DELETES = "cni-deletes"
_WORKERS = 256  # an ADD may wait for an address of the VPC, and must not keep DELs waiting
_REQUEST_TIMEOUT_S = 10


class CniServer:
    """Serves `<run_dir>/cni.sock` from `start` to `stop`.

    `ready` raises CniError 50 (or 51) while ADD cannot be served; STATUS asks it. `observe` hears
    of every call: command, error code (0: served) and seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        lifecycle: Lifecycle,
        ready: Callable[[], None] = lambda: None,
        observe: Callable[[str, int, float], None] = lambda command, code, seconds: None,
    ) -> None:
        self._path = run_dir / SOCKET
        self._left = run_dir / LEFT_DELETES
        self._lifecycle = lifecycle
        self._ready, self._observe = ready, observe
        self._threads = ThreadPoolExecutor(_WORKERS, thread_name_prefix="cni")
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    def start(self) -> None:
        """Bring the kernel to what is recorded, then listen. Raises OSError, KernelError."""
        self._left.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lifecycle.reconcile()
        self.work_off_left_deletes()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        mask = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        finally:
            os.umask(mask)
        listener.listen(1024)
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, name="cni-accept", daemon=True)
        self._acceptor.start()
        self.work_off_left_deletes()  # a shim that did not see us listen has left its DEL by now

    def stop(self) -> None:
        """Answer what has been asked, then no more."""
        if self._listener is None or self._acceptor is None:
            return
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self._threads.shutdown()
        self._lifecycle.stop()
        self._listener = None

    def work_off_left_deletes(self) -> None:
        """The DELs that came while no agent was there."""
        for path in sorted(self._left.iterdir()):
            if path.name.startswith("."):
                continue
            try:
                frame = wire.decode_left(path.read_bytes())
                self._lifecycle.delete(parse_call(frame.plugin, frame.environment, frame.stdin))
            except (CniError, wire.Malformed) as error:
                log.warning("a left DEL makes no sense", extra={"error": str(error)})
            except PodwireError as error:
                log.error("a left DEL is kept for the next start", extra={"error": str(error)})
                continue
            path.unlink(missing_ok=True)

    def handle(self, frame: wire.Frame) -> tuple[int, bytes]:
        """Exit status and standard output of one call. Raises nothing."""
        started = time.monotonic()
        command = frame.environment.get("CNI_COMMAND", "")
        try:
            call = parse_call(frame.plugin, frame.environment, frame.stdin, frame.netns_fd)
            output = self._serve(call)
        except Exception as error:
            refusal = _refusal(error)
            self._observe(command, refusal.code, time.monotonic() - started)
            _log(logging.WARNING, command, frame, started, f"{refusal}")
            return 1, refusal.encode(answer_version(frame.stdin))
        self._observe(command, 0, time.monotonic() - started)
        _log(logging.DEBUG, command, frame, started, "")
        return 0, output

    def _serve(self, call: Call) -> bytes:
        match call.command:
            case "ADD":
                return msgspec.json.encode(self._lifecycle.add(call)) + b"\n"
            case "DEL":
                self._lifecycle.delete(call)
            case "CHECK":
                self._lifecycle.check(call)
            case "GC":
                self._lifecycle.collect(call)
            case _:
                self._ready()
        return b""

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._threads.submit(self._converse, connection)

    def _converse(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(_REQUEST_TIMEOUT_S)
            try:
                status, output = self._answer(connection)
                wire.answer(connection, status, output)
            except (OSError, wire.Malformed) as error:
                log.info("a CNI connection ended early", extra={"error": str(error)})
            except Exception:
                log.exception("a CNI connection failed")

    def _answer(self, connection: socket.socket) -> tuple[int, bytes]:
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("=iII", peer)
        if uid != 0:
            refusal = CniError(INVALID_ENVIRONMENT, "only root may wire pods")
            return 1, refusal.encode()
        try:
            frame = wire.receive(connection)
        except CniError as error:
            return 1, error.encode()
        try:
            return self.handle(frame)
        finally:
            if frame.netns_fd is not None:
                os.close(frame.netns_fd)


def refuse(message: str, details: str = "") -> CniError:
    """STATUS's answer when ADD cannot be served."""
    return CniError(NOT_AVAILABLE, message, details)


def _refusal(error: Exception) -> CniError:
    """The specification's code for what went wrong."""
    match error:
        case CniError():
            return error
        case Exhausted():
            return CniError(TRY_AGAIN, str(error))
        case NotAvailable():
            return CniError(ADDRESS_TAKEN, str(error))
        case ConfigError():
            return CniError(INVALID_CONFIG, str(error))
        case KernelError():
            return CniError(KERNEL_REFUSED, str(error))
        case sqlite3.Error():
            return CniError(TRY_AGAIN, f"cannot write the state file: {error}")
        case PodwireError():
            return CniError(KERNEL_REFUSED, str(error))
        case _:
            log.exception("a CNI call failed", exc_info=error)
            return CniError(INTERNAL, f"internal error: {error!r}", f"podwire agent, CNI {NEWEST}")


def _log(level: int, command: str, frame: wire.Frame, started: float, error: str) -> None:
    environment = frame.environment
    extra = {
        "command": command,
        "container": environment.get("CNI_CONTAINERID", ""),
        "ifname": environment.get("CNI_IFNAME", ""),
        "duration_ms": round((time.monotonic() - started) * 1000, 1),
    }
    if error:
        extra["error"] = error
    log.log(level, "CNI call refused" if error else "CNI call served", extra=extra)
