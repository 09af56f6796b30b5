"""The BPF file system: names that keep maps and links alive without a process."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from podwire.errors import KernelError
from podwire.kernel.bpf.links import Link
from podwire.kernel.bpf.maps import Map
from podwire.kernel.bpf.syscall import Command, attr, bpf

ROOT = Path("/sys/fs/bpf")
_libc = ctypes.CDLL(None, use_errno=True)


def mount() -> None:
    """Mount the BPF file system where it is missing. Raises KernelError."""
    with open("/proc/self/mounts") as file:
        if any(line.split()[1:3] == [str(ROOT), "bpf"] for line in file):
            return
    if _libc.mount(b"bpf", str(ROOT).encode(), b"bpf", 0, None) != 0:
        code = ctypes.get_errno()
        raise KernelError(f"cannot mount bpf on {ROOT}: {os.strerror(code)}", errno=code)


def place(*parts: str) -> Path:
    """``/sys/fs/bpf/podwire/<parts>``. Dots, which bpffs refuses, become '_'."""
    return ROOT.joinpath("podwire", *(part.replace(".", "_") for part in parts))


def directory(*parts: str) -> Path:
    """The same, made when missing. Raises KernelError."""
    mount()
    path = place(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def pin(thing: Map | Link, path: Path) -> None:
    """Give `thing` a name. Raises KernelError (EEXIST when the name is taken)."""
    name = ctypes.create_string_buffer(str(path).encode())
    request = attr(16, struct.pack("=QII", ctypes.addressof(name), thing.fd, 0))
    bpf(Command.OBJ_PIN, request, f"cannot pin {path}")


def open_map(path: Path) -> Map | None:
    """The map pinned there, or None."""
    fd = _get(path)
    return None if fd is None else Map(fd)


def open_link(path: Path) -> Link | None:
    """The link pinned there, or None."""
    fd = _get(path)
    return None if fd is None else Link(fd)


def remove(path: Path) -> None:
    """Unpin everything below `path` and the directory itself; links detach when unheld."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for entry in path.iterdir():
        remove(entry)
    path.rmdir()


def _get(path: Path) -> int | None:
    if not path.exists():
        return None
    name = ctypes.create_string_buffer(str(path).encode())
    request = attr(16, struct.pack("=QII", ctypes.addressof(name), 0, 0))
    return bpf(Command.OBJ_GET, request, f"cannot open {path}")
