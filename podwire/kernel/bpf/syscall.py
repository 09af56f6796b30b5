"""The one place that calls bpf(2)."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from enum import IntEnum

from podwire.errors import KernelError

_SYSCALL_NUMBER = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]
_number = _SYSCALL_NUMBER.get(platform.machine(), 280)


class Command(IntEnum):
    """enum bpf_cmd of include/uapi/linux/bpf.h, as far as it is used here."""

    MAP_CREATE = 0
    MAP_LOOKUP = 1
    MAP_UPDATE = 2
    MAP_DELETE = 3
    MAP_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_TEST_RUN = 10
    PROG_FD_BY_ID = 13
    MAP_FD_BY_ID = 14
    OBJ_INFO = 15
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_FD_BY_ID = 30
    ENABLE_STATS = 32
    ITER_CREATE = 33
    LINK_DETACH = 34


def bpf_errno(command: Command, attr: ctypes.Array[ctypes.c_char]) -> tuple[int, int]:
    """``(result, errno)``; the result is -1 on error. `attr` is changed by commands that answer."""
    while True:
        result = _syscall(_number, command, ctypes.addressof(attr), len(attr))
        if result >= 0:
            return result, 0
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            return -1, code


def bpf(command: Command, attr: ctypes.Array[ctypes.c_char], what: str) -> int:
    """The result (a descriptor, for most commands). Raises KernelError that says `what` failed."""
    result, code = bpf_errno(command, attr)
    if code:
        raise KernelError(f"{what}: {os.strerror(code)}", errno=code)
    return result


def object_info(fd: int, size: int, what: str) -> bytes:
    """The first `size` bytes of what the kernel tells of a map, program or link.

    Raises KernelError that says `what` cannot be read.
    """
    buffer = ctypes.create_string_buffer(size)
    request = attr(16, struct.pack("=IIQ", fd, size, ctypes.addressof(buffer)))
    bpf(Command.OBJ_INFO, request, f"cannot read {what} info")
    return buffer.raw


def attr(size: int, packed: bytes) -> ctypes.Array[ctypes.c_char]:
    """union bpf_attr of `size` bytes that begins with `packed`."""
    buffer = ctypes.create_string_buffer(size)
    buffer[: len(packed)] = packed  # pyright: ignore[reportArgumentType]
    return buffer


def name_bytes(name: str) -> bytes:
    """A kernel object name: at most 15 characters of letters, digits, '_' and '.'."""
    return name.replace("-", "_").encode()[:15]
