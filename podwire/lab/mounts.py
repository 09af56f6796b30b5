"""Mounts and the namespaces that go with them: mount(2), unshare(2), setns(2) through ctypes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from podwire.errors import KernelError

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWNET = (
    0x20000,
    0x2000000,
    0x4000000,
    0x40000000,
)
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_SLAVE, _MS_SHARED = 0x1000, 0x4000, 1 << 18, 1 << 19, 1 << 20
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise KernelError(f"cannot {what}: {os.strerror(errno)}", errno=errno)


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    _check(_libc.unshare(flags), "make namespaces")


def setns(fd: int, flags: int) -> None:
    """Move this process (the calling thread, for a network namespace) into a namespace."""
    _check(_libc.setns(fd, flags), "enter a namespace")


def bind(source: Path, target: Path) -> None:
    result = _libc.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND, None)
    _check(result, f"mount {source} at {target}")


def mount(kind: str, target: Path) -> None:
    """A new instance of a file system without a device."""
    result = _libc.mount(kind.encode(), os.fsencode(target), kind.encode(), 0, None)
    _check(result, f"mount {kind} at {target}")


def share(target: Path) -> None:
    """Mounts below `target` appear in the mount namespaces that are copied from now on.

    First private, for below a shared mount the target is in its parent's peer group.
    """
    for flag in (_MS_PRIVATE, _MS_SHARED):
        _check(_libc.mount(None, os.fsencode(target), None, flag, None), f"share {target}")


def receive_only() -> None:
    """What is mounted in this mount namespace stays here; what others mount still appears."""
    _check(_libc.mount(None, b"/", None, _MS_SLAVE | _MS_REC, None), "make the mounts slaves")


def below(directory: Path) -> list[Path]:
    """The mount points at and below a directory, in the order of mounting."""
    prefix = str(directory)
    found: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = line.split(" ", 5)[4].replace("\\040", " ")
        if target == prefix or target.startswith(prefix + "/"):
            found.append(Path(target))
    return found


def detach(target: Path) -> bool:
    """Unmount with everything below it; whoever still uses it keeps it. False if none is there."""
    return _libc.umount2(os.fsencode(target), _MNT_DETACH) == 0
