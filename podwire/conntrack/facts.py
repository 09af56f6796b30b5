"""What the machine and the namespace say about their connection table, besides its entries."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from podwire.conntrack import sizing
from podwire.errors import KernelError, PodwireError
from podwire.kernel import kmsg, netns, sysctl

_PREFIX = "net.netfilter.nf_conntrack_"
_FOLDER = Path("/proc/sys/net/netfilter")
_TIMEOUT = re.compile(r"nf_conntrack_(\w*timeout\w*)$")
_FULL = "nf_conntrack: table full"
_OTHER_NAMESPACE = re.compile(r"in netns (\d+)")
_ENTRY_BYTES = 256  # the slab object of Linux 6.x, where /proc/slabinfo cannot be read

# NAT, labels, events are one kmalloc more; accounting and timestamps take it to the next size
_EXTENSION_BYTES, _EXTENSION_MORE_BYTES = 128, 192


class Settings(NamedTuple):
    """Of one namespace. Timeouts in seconds by the sysctl's name (``tcp_timeout_established``)."""

    limit: int
    buckets: int
    timeouts: Mapping[str, int]
    accounting: bool
    timestamps: bool
    tcp_be_liberal: bool
    local_ports: tuple[int, int]
    """net.ipv4.ip_local_port_range, both ends included."""
    refusal: str
    """Why the limit cannot be set from here; empty where it can."""

    @property
    def entry_bytes(self) -> int:
        """Memory of one entry with its extensions (estimated; the object itself is measured)."""
        more = self.accounting or self.timestamps
        return slab().object_bytes + (_EXTENSION_MORE_BYTES if more else _EXTENSION_BYTES)


class Slab(NamedTuple):
    """The kernel's cache of entries, of all namespaces together."""

    objects: int | None
    object_bytes: int


def slab() -> Slab:
    """From /proc/slabinfo (root only; merged caches do not show)."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/slabinfo").read_text().splitlines():
            words = line.split()
            if words[0] == "nf_conntrack":
                return Slab(int(words[1]), int(words[3]))
    return Slab(None, _ENTRY_BYTES)


def settings(netns_fd: int | None = None) -> Settings:
    """Raises KernelError where the namespace has no connection tracking."""
    low, high = sysctl.read("net.ipv4.ip_local_port_range", netns_fd).split()
    return Settings(
        limit=_number("max", netns_fd),
        buckets=_number("buckets", netns_fd),
        timeouts=netns.call(netns_fd, _timeouts),
        accounting=_number("acct", netns_fd) == 1,
        timestamps=_optional("timestamp", netns_fd) == 1,
        tcp_be_liberal=_number("tcp_be_liberal", netns_fd) == 1,
        local_ports=(int(low), int(high)),
        refusal=netns.call(netns_fd, _refusal),
    )


def _number(name: str, netns_fd: int | None) -> int:
    return int(sysctl.read(_PREFIX + name, netns_fd))


def _optional(name: str, netns_fd: int | None) -> int:
    try:
        return _number(name, netns_fd)
    except KernelError:
        return 0


def _timeouts() -> dict[str, int]:
    found: dict[str, int] = {}
    for file in sorted(_FOLDER.iterdir()):
        match = _TIMEOUT.fullmatch(file.name)
        if match:
            found[match[1]] = int(file.read_text())
    return found


def _refusal() -> str:
    """The kernel shows the sysctl read-only outside of the first network namespace."""
    mode = os.stat(_FOLDER / "nf_conntrack_max").st_mode
    if not mode & 0o200:
        return (
            "nf_conntrack_max is one number for all network namespaces, and the kernel lets only "
            "the machine's first one set it: run this on the host"
        )
    if not os.access(_FOLDER / "nf_conntrack_max", os.W_OK):
        return "/proc/sys is mounted read-only here, or this is not root"
    return ""


def cores() -> int:
    """CPUs of the machine, as kube-proxy counts them."""
    return os.cpu_count() or 1


def machine(netns_fd: int | None, peak: int) -> sizing.Machine:
    """For `sizing.advise`."""
    here = settings(netns_fd)
    return sizing.Machine(
        memory_mb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        cores=cores(),
        limit=here.limit,
        buckets=here.buckets,
        peak=peak,
        entry_bytes=here.entry_bytes,
    )


def full_messages(netns_fd: int | None = None) -> list[kmsg.Message]:
    """ "table full, dropping packet" lines of this namespace that are still in the kernel's log.

    The kernel limits their rate, so their number is no count of dropped packets.
    """
    own = netns.inode(netns_fd)
    first = _first_inode()
    out: list[kmsg.Message] = []
    for message in kmsg.read(_FULL):
        match = _OTHER_NAMESPACE.search(message.text)
        if (int(match[1]) if match else first) == own:
            out.append(message)
    return out


def _first_inode() -> int:
    """Of the machine's first network namespace: process 1 lives there, except in a container."""
    try:
        return os.stat("/proc/1/ns/net").st_ino
    except OSError:
        return 0


def apply(sysctls: Mapping[str, int], netns_fd: int | None = None) -> None:
    """Set them. Raises PodwireError with the reason where this namespace may not."""
    refusal = settings(netns_fd).refusal
    if refusal:
        raise PodwireError(refusal)
    sysctl.write(sysctls, netns_fd)
