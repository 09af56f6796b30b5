"""Programs in the kernel: facts, counters, test runs."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from podwire.kernel.bpf.syscall import Command, attr, bpf, bpf_errno

_XDP, _XDP_HAS_FRAGS = 6, 1 << 5  # include/uapi/linux/bpf.h
_test_run = struct.Struct("=IIIIQQIIIIQQIII")


class ProgramInfo(NamedTuple):
    """`run_time_ns` and `run_count` count only while statistics are on (`statistics`)."""

    type: int
    id: int
    tag: str
    name: str
    map_ids: tuple[int, ...]
    run_time_ns: int
    run_count: int
    verified_instructions: int


class TestRun(NamedTuple):
    """What one BPF_PROG_TEST_RUN left: return value, packet, context, mean nanoseconds."""

    __test__ = False

    value: int
    data: bytes
    context: bytes
    duration_ns: int


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
        code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0))
        licence = ctypes.create_string_buffer(b"GPL")
        addresses = ctypes.addressof(code), ctypes.addressof(licence)
        fields = (_XDP, 2, *addresses, 0, 0, 0, 0, _XDP_HAS_FRAGS, b"xdp_pass")
        request = attr(128, struct.pack("=IIQQIIQII16s", *fields))
        return cls(bpf(Command.PROG_LOAD, request, "cannot load an XDP program"))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def info(self) -> ProgramInfo:
        """Facts and counters of this moment."""
        ids = (ctypes.c_uint32 * 64)()
        buffer = ctypes.create_string_buffer(228)
        struct.pack_into("=IIQ", buffer, 48, 0, len(ids), ctypes.addressof(ids))
        request = attr(16, struct.pack("=IIQ", self.fd, len(buffer), ctypes.addressof(buffer)))
        bpf(Command.OBJ_INFO, request, "cannot read program info")
        type, id, tag = struct.unpack_from("=II8s", buffer)
        run_time, run_count, _, verified = struct.unpack_from("=QQQI", buffer, 192)
        count = min(struct.unpack_from("=I", buffer, 52)[0], len(ids))
        name = buffer.raw[64:80].rstrip(b"\0").decode()
        return ProgramInfo(
            type, id, tag.hex(), name, tuple(ids[:count]), run_time, run_count, verified
        )

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
            fields[7],
        )


def program_ids() -> Iterator[int]:
    """Ids of all programs of the machine."""
    return _ids(Command.PROG_NEXT_ID)


def link_ids() -> Iterator[int]:
    """Ids of all links of the machine."""
    return _ids(Command.LINK_NEXT_ID)


def statistics() -> int:
    """Turn on run counts and times for all programs while the returned descriptor is open."""
    return bpf(Command.ENABLE_STATS, attr(4, struct.pack("=I", 0)), "cannot enable statistics")


def _ids(command: Command) -> Iterator[int]:
    request = attr(12, b"")
    while bpf_errno(command, request)[1] == 0:
        id = struct.unpack_from("=I", request, 4)[0]
        yield id
        struct.pack_into("=I", request, 0, id)


def _address(buffer: ctypes.Array[ctypes.c_char] | None) -> int:
    return ctypes.addressof(buffer) if buffer is not None else 0
