"""Probes: each answers one question about the running kernel by trying it, once per process."""

from __future__ import annotations

import errno
import os
import struct
from functools import cache
from pathlib import Path

from podwire.errors import KernelError
from podwire.kernel.bpf.links import AttachType
from podwire.kernel.bpf.maps import Map, MapFlag, MapType
from podwire.kernel.bpf.programs import Program, load_constant
from podwire.kernel.bpf.syscall import Command, attr, bpf

_SCHED_CLS, _XDP, _SYSCALL = 3, 6, 31
_SLEEPABLE = 1 << 4  # BPF_F_SLEEPABLE
_NO_INTERFACE = 0x7FFFFFFF


def missing() -> list[str]:
    """What the eBPF data path needs and this kernel lacks, in words. Empty: all is there."""
    wanted = (
        ("bpf(2) and the classifier program type (CONFIG_BPF_SYSCALL, 4.1)", has_classifier),
        ("tcx links (CONFIG_NET_XGRESS, 6.6)", has_tcx),
        ("maps inside maps of different sizes (5.10)", has_inner_map_growth),
        ("the ring buffer (5.8)", has_ring_buffer),
        ("test-run programs of type syscall (5.14)", has_syscall_program),
    )
    return [name for name, probe in wanted if not probe()]


def lacking() -> list[str]:
    """What this kernel or machine lacks of the rest, each with what is not done without it."""
    wanted = (
        ("cgroup v2", "Services are balanced packet by packet, not at the socket", has_cgroup2),
        (
            "bpf_sock_destroy (6.5)",
            "connected UDP sockets stay with a backend that left",
            lambda: has_kfunc("bpf_sock_destroy"),
        ),
        (
            "the TCP socket iterator with BTF (5.9)",
            "pods that no policy concerns have no short way",
            lambda: has_kfunc("bpf_iter_tcp"),
        ),
        ("XDP links (5.9)", "NodePorts are not served at the driver", has_xdp_link),
    )
    return [f"{name}: {without}" for name, without, probe in wanted if not probe()]


@cache
def has_classifier() -> bool:
    return _loads(_SCHED_CLS)


@cache
def has_tcx() -> bool:
    """tcx links: attaching to an interface that cannot exist tells ENODEV from EINVAL."""
    return _attach_errno(_SCHED_CLS, AttachType.TCX_INGRESS) == errno.ENODEV


@cache
def has_xdp_link() -> bool:
    return _attach_errno(_XDP, AttachType.XDP) in (errno.ENODEV, errno.EINVAL) and _loads(_XDP)


@cache
def has_syscall_program() -> bool:
    return _loads(_SYSCALL, _SLEEPABLE)


@cache
def has_ring_buffer() -> bool:
    return _creates(MapType.RINGBUF, 0, 0, 4096)


@cache
def has_inner_map_growth() -> bool:
    return _creates(MapType.ARRAY, 4, 4, 1, MapFlag.INNER_MAP)


@cache
def has_kfunc(name: str) -> bool:
    """Whether the kernel's BTF names this function (it may still be for other program types)."""
    btf = Path("/sys/kernel/btf/vmlinux")
    return btf.exists() and f"\0{name}\0".encode() in _read_whole(btf)


def _read_whole(path: Path) -> bytes:
    """As `read_bytes`, without a call for every page, which is all that one read of sysfs gives."""
    with open(path, "rb") as file, open(os.memfd_create(path.name), "rb") as copy:
        size, done = os.fstat(file.fileno()).st_size, 0
        while done < size:
            done += os.sendfile(copy.fileno(), file.fileno(), done, size - done)
        copy.seek(0)
        return copy.read()


@cache
def has_cgroup2() -> Path | None:
    """Where cgroup v2 is mounted, or None."""
    with open("/proc/self/mounts") as file:
        for line in file:
            _, target, kind, *_ = line.split()
            if kind == "cgroup2":
                return Path(target)
    return None


def _loads(type: int, flags: int = 0) -> bool:
    fd, code = load_constant(type, 0, "probe", flags=flags)
    if code:
        return False
    Program(fd).close()
    return True


def _attach_errno(type: int, where: AttachType) -> int:
    fd, code = load_constant(type, 0, "probe")
    if code:
        return code
    program = Program(fd)
    try:
        bpf(
            Command.LINK_CREATE,
            attr(64, struct.pack("=IIII", program.fd, _NO_INTERFACE, where, 0)),
            "probe",
        )
    except KernelError as error:
        return error.errno
    finally:
        program.close()
    return 0


def _creates(type: MapType, key: int, value: int, entries: int, flags: int = 0) -> bool:
    try:
        Map.create(type, key, value, entries, flags=flags, name="probe").close()
    except KernelError:
        return False
    return True
