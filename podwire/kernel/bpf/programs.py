"""Programs in the kernel: facts, counters, test runs."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import NamedTuple

from podwire.errors import KernelError
from podwire.kernel.bpf.syscall import (
    Command,
    attr,
    bpf,
    bpf_errno,
    name_bytes,
    object_info,
)

_XDP, _XDP_HAS_FRAGS = 6, 1 << 5  # include/uapi/linux/bpf.h
_XDP_PASS = 2
_test_run = struct.Struct("=IIIIQQIIIIQQIII")


class ProgramInfo(NamedTuple):
    """`run_time_ns` and `run_count` count only while statistics are on (`statistics`)."""

    type: int
    id: int
    tag: str
    name: str
    run_time_ns: int
    run_count: int
    verified_instructions: int


class TestRun(NamedTuple):
    """What one BPF_PROG_TEST_RUN left: return value, packet, context."""

    __test__ = False

    value: int
    data: bytes
    context: bytes


class Program:
    """A loaded program, owned by this descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def by_id(cls, id: int) -> Program:
        return cls(bpf(Command.PROG_FD_BY_ID, attr(12, struct.pack("=I", id)), f"no program {id}"))

    @classmethod
    def xdp_pass(cls) -> Program:
        """An XDP program that passes every packet. Raises KernelError."""
        fd, code = load_constant(_XDP, _XDP_PASS, "xdp_pass", flags=_XDP_HAS_FRAGS)
        if code:
            raise KernelError(f"cannot load an XDP program: {os.strerror(code)}", errno=code)
        return cls(fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def info(self) -> ProgramInfo:
        """Facts and counters of this moment."""
        facts = object_info(self.fd, 228, "program")
        type, id, tag = struct.unpack_from("=II8s", facts)
        run_time, run_count, _, verified = struct.unpack_from("=QQQI", facts, 192)
        name = facts[64:80].rstrip(b"\0").decode()
        return ProgramInfo(type, id, tag.hex(), name, run_time, run_count, verified)

    def test_run(self, data: bytes = b"", *, context: bytes = b"", repeat: int = 1) -> TestRun:
        """Run on `data` (a packet) and `context` (packed; kind depends on the program's type).

        Raises KernelError.
        """
        data_in = ctypes.create_string_buffer(data, len(data)) if data else None
        data_out = ctypes.create_string_buffer(len(data) + 512) if data else None
        context_in = ctypes.create_string_buffer(context, len(context)) if context else None
        context_out = ctypes.create_string_buffer(len(context)) if context else None
        request = attr(
            80,
            _test_run.pack(
                *(self.fd, 0, len(data), len(data_out) if data_out else 0),
                *(_address(data_in), _address(data_out), repeat if data else 0, 0),
                *(len(context), len(context) if data else 0),
                *(_address(context_in), _address(context_out) if data else 0, 0, 0, 0),
            ),
        )
        bpf(Command.PROG_TEST_RUN, request, "test run")
        fields = _test_run.unpack_from(request)
        return TestRun(
            fields[1],
            data_out.raw[: fields[3]] if data_out else b"",
            context_out.raw if context_out and data else (context_in.raw if context_in else b""),
        )


def load_constant(type: int, value: int, name: str, *, flags: int = 0) -> tuple[int, int]:
    """Load a program that only returns `value`: ``(descriptor, 0)``, or ``(-1, errno)``."""
    # r0 = value; exit
    code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, value, 0x95, 0, 0, 0))
    licence = ctypes.create_string_buffer(b"GPL")
    instructions = len(code) // 8
    request = attr(
        128,
        struct.pack(
            "=IIQQIIQII16s",
            *(type, instructions, ctypes.addressof(code), ctypes.addressof(licence)),
            *(0, 0, 0, 0, flags, name_bytes(name)),
        ),
    )
    return bpf_errno(Command.PROG_LOAD, request)


def statistics() -> int:
    """Turn on run counts and times for all programs while the returned descriptor is open."""
    return bpf(Command.ENABLE_STATS, attr(4, struct.pack("=I", 0)), "cannot enable statistics")


def _address(buffer: ctypes.Array[ctypes.c_char] | None) -> int:
    return ctypes.addressof(buffer) if buffer is not None else 0
