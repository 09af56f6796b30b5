"""Kernel parameters under /proc/sys, of any network namespace.

/proc/sys/net shows the namespace of whoever looks a file up, so the calling thread visits the
namespace (two system calls, 2 µs) and opens the file there.

Names are written as sysctl(8) does: ``net.ipv4.conf.eth0.rp_filter``; dots inside an interface name
become slashes: ``net.ipv4.conf.eth0/100.rp_filter`` (see `interface`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from podwire.errors import KernelError
from podwire.kernel import netns

_SWAP = str.maketrans("./", "/.")


def interface(name: str) -> str:
    """An interface's name as a part of a sysctl's."""
    return name.translate(_SWAP)


def path(name: str) -> str:
    """The file of a parameter."""
    return "/proc/sys/" + name.translate(_SWAP)


def read(name: str, netns_fd: int | None = None) -> str:
    """The value, without the newline. Raises KernelError (ENOENT: no such parameter)."""
    with netns.entered(netns_fd):
        try:
            fd = os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.read(fd, 65536).decode().rstrip("\n")
            finally:
                os.close(fd)
        except OSError as error:
            raise _error("read", name, error) from None


def write(values: Mapping[str, str | int], netns_fd: int | None = None) -> None:
    """Set parameters in order. Raises KernelError at the first that the kernel refuses."""
    with netns.entered(netns_fd):
        for name, value in values.items():
            try:
                fd = os.open(path(name), os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(fd, str(value).encode())
                finally:
                    os.close(fd)
            except OSError as error:
                raise _error(f"set to {value}", name, error) from None


def _error(verb: str, name: str, error: OSError) -> KernelError:
    errno = error.errno or 0
    return KernelError(f"cannot {verb} the sysctl {name}: {os.strerror(errno)}", errno=errno)
