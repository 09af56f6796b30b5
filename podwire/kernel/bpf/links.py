"""Links: where a program is attached. A link dies with its last descriptor unless it is pinned."""

from __future__ import annotations

import os
import struct
from enum import IntEnum
from typing import NamedTuple

from podwire.kernel.bpf.programs import Program
from podwire.kernel.bpf.syscall import Command, attr, bpf, object_info


class AttachType(IntEnum):
    """enum bpf_attach_type, with the kernel that brought the link."""

    CONNECT4 = 10  # cgroup links: 5.7
    CONNECT6 = 11
    SENDMSG4 = 14
    SENDMSG6 = 15
    RECVMSG4 = 19
    RECVMSG6 = 20
    ITER = 28  # 5.8
    GETPEERNAME4 = 29  # 5.8
    GETPEERNAME6 = 30
    XDP = 37  # 5.9
    TCX_INGRESS = 46  # 6.6
    TCX_EGRESS = 47


class LinkInfo(NamedTuple):
    """`target` is an interface index or a cgroup id; 0 for iterators."""

    type: int
    id: int
    program_id: int
    target: int
    attach_type: int


_BEFORE = 1 << 3  # BPF_F_BEFORE; without a link to be before: before all
_LINK_CGROUP, _LINK_ITER, _LINK_XDP, _LINK_TCX = 3, 4, 6, 11
_XDP_SKB_MODE, _XDP_DRV_MODE = 1 << 1, 1 << 2  # include/uapi/linux/if_link.h


class Link:
    """An attachment, owned by this descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def tcx(cls, program: Program, ifindex: int, where: AttachType, *, first: bool = False) -> Link:
        """Attach behind what is there, or before it when `first`.

        The interface is of the caller's network namespace.
        """
        flags = _BEFORE if first else 0
        return cls._create(program, ifindex, where, f"tcx on interface {ifindex}", flags)

    @classmethod
    def xdp(cls, program: Program, ifindex: int, *, generic: bool = False) -> Link:
        """Attach at the driver, or in the stack when `generic`.

        Raises KernelError: EOPNOTSUPP where the driver cannot, EBUSY where another program is.
        """
        flags = _XDP_SKB_MODE if generic else _XDP_DRV_MODE
        return cls._create(program, ifindex, AttachType.XDP, f"XDP on interface {ifindex}", flags)

    @classmethod
    def cgroup(cls, program: Program, path: str, where: AttachType) -> Link:
        """Attach to a cgroup v2 directory and all below; programs of parents run as well."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return cls._create(program, fd, where, f"{where.name} on cgroup {path}")
        finally:
            os.close(fd)

    @classmethod
    def iterator(cls, program: Program) -> Link:
        """An iterator over the whole kind; `run` walks it."""
        return cls._create(program, 0, AttachType.ITER, "iterator")

    @classmethod
    def by_id(cls, id: int) -> Link:
        return cls(bpf(Command.LINK_FD_BY_ID, attr(12, struct.pack("=I", id)), f"no link {id}"))

    @classmethod
    def _create(
        cls,
        program: Program,
        target: int,
        where: AttachType,
        what: str,
        flags: int = 0,
    ) -> Link:
        request = attr(64, struct.pack("=IIII", program.fd, target, where, flags))
        return cls(bpf(Command.LINK_CREATE, request, f"cannot attach {what}"))

    def update(self, program: Program) -> None:
        """Replace the program in one step: every packet sees the old one or the new one.

        Raises KernelError.
        """
        bpf(
            Command.LINK_UPDATE,
            attr(16, struct.pack("=IIII", self.fd, program.fd, 0, 0)),
            "cannot replace program",
        )

    def detach(self) -> None:
        """Take the program away although others hold the link."""
        bpf(Command.LINK_DETACH, attr(4, struct.pack("=I", self.fd)), "cannot detach link")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def run(self) -> bytes:
        """Walk an iterator link to its end and return what its program wrote."""
        fd = bpf(Command.ITER_CREATE, attr(8, struct.pack("=II", self.fd, 0)), "iterator")
        with open(fd, "rb", buffering=0) as file:
            return file.read()

    @property
    def info(self) -> LinkInfo:
        """What is attached where at this moment."""
        facts = object_info(self.fd, 64, "link")
        type, id, program_id = struct.unpack_from("=III", facts)
        target = attach_type = 0
        if type == _LINK_CGROUP:
            target, attach_type = struct.unpack_from("=QI", facts, 16)
        elif type == _LINK_TCX:
            target, attach_type = struct.unpack_from("=II", facts, 16)
        elif type == _LINK_XDP:
            target, attach_type = struct.unpack_from("=I", facts, 16)[0], AttachType.XDP
        elif type == _LINK_ITER:
            attach_type = AttachType.ITER
        return LinkInfo(type, id, program_id, target, attach_type)
