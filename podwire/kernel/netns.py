"""Network namespaces: make, hold, name, enter.

A namespace is held by a file descriptor (or a bind mount of one); it lives as long as something
holds it. Python 3.11 has no `os.setns`, and setns moves one thread only, so everything here moves
the calling thread for the length of a call and brings it back.

Source: network_namespaces(7), setns(2), unshare(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket as sockets
import subprocess
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeVar

from podwire.errors import KernelError

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MNT_DETACH = 2
_HERE = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise KernelError(f"cannot {what}: {os.strerror(errno)}", errno=errno)


def open_path(path: str | Path) -> int:
    """A descriptor of the namespace at `path` (``/run/netns/x``, ``/proc/1/ns/net``).

    Raises KernelError; that `path` is something else shows only when it is entered.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(
            f"cannot open the network namespace {path}: {os.strerror(error.errno or 0)}",
            errno=error.errno or 0,
        ) from None


def current() -> int:
    """A descriptor of the calling thread's namespace."""
    return open_path(_HERE)


def inode(fd: int | None = None) -> int:
    """What namespaces are told apart by (``net:[4026531840]``); default: the caller's."""
    return (os.stat(_HERE) if fd is None else os.fstat(fd)).st_ino


def enter(fd: int) -> None:
    """Move the calling thread into the namespace for good (the first thing of a worker thread)."""
    _check(_libc.setns(fd, _CLONE_NEWNET), "enter the network namespace")


@contextlib.contextmanager
def entered(fd: int | None) -> Generator[None]:
    """Move the calling thread into the namespace for a while; `None` stays where it is.

    Children started inside belong to the namespace. Do not await inside.
    """
    if fd is None:
        yield
        return
    home = current()
    try:
        _check(_libc.setns(fd, _CLONE_NEWNET), "enter the network namespace")
        try:
            yield
        finally:
            _check(_libc.setns(home, _CLONE_NEWNET), "return to the own network namespace")
    finally:
        os.close(home)


def create() -> int:
    """A descriptor of a new, empty namespace that has no name and ends with its last holder."""
    home = current()
    try:
        _check(_libc.unshare(_CLONE_NEWNET), "make a network namespace")
        try:
            return current()
        finally:
            _check(_libc.setns(home, _CLONE_NEWNET), "return to the own network namespace")
    finally:
        os.close(home)


def create_named(path: str | Path) -> int:
    """Like `create`, and bound to `path`, which must not exist, so that it outlives the process."""
    fd = create()
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o444))
        try:
            source = f"/proc/self/fd/{fd}".encode()
            target = os.fsencode(path)
            _check(_libc.mount(source, target, b"none", _MS_BIND, None), f"bind a name at {path}")
        except KernelError:
            os.unlink(path)
            raise
    except BaseException:
        os.close(fd)
        raise
    return fd


def remove_named(path: str | Path) -> None:
    """Take the name away; the namespace ends when nothing else holds it. No error if absent."""
    _libc.umount2(os.fsencode(path), _MNT_DETACH)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def call(fd: int | None, function: Callable[[], T]) -> T:
    """What `function` returns inside the namespace."""
    with entered(fd):
        return function()


def socket(fd: int | None, family: int, kind: int, protocol: int = 0) -> sockets.socket:
    """A socket that belongs to the namespace and works from anywhere."""
    with entered(fd):
        return sockets.socket(family, kind | sockets.SOCK_CLOEXEC, protocol)


def run(
    fd: int | None, command: Sequence[str], *, stdin: str = "", timeout_s: float = 30
) -> subprocess.CompletedProcess[str]:
    """Run a program inside the namespace to its end; its exit status is the caller's to judge.

    Raises subprocess.TimeoutExpired, OSError.
    """
    with entered(fd):
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    with child:
        try:
            out, err = child.communicate(stdin, timeout=timeout_s)
        except BaseException:
            child.kill()
            raise
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)
