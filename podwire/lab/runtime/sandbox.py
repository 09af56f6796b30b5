"""A pod's network namespace and the sockets in it.

Blocking, for a thread of its own: every visit moves the calling thread into the namespace.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from podwire.errors import KernelError
from podwire.kernel import link, netns
from podwire.kernel.netlink import NetlinkSocket

log = logging.getLogger("podwire.lab.runtime")

IPPROTO_SCTP = 132


def create(path: Path) -> int:
    """A descriptor of the namespace at `path`, made with its loopback up if it is not there yet."""
    if os.path.exists(path):
        if os.path.ismount(path):
            return netns.open_path(path)
        path.unlink()  # an earlier runtime died between making the file and mounting over it
    fd = netns.create_named(path)
    with NetlinkSocket(netns_fd=fd) as sock:
        sock.run(link.change("lo", up=True))
    return fd


def listen(fd: int, ports: Iterable[tuple[str, int]]) -> list[tuple[str, socket.socket]]:
    """Sockets bound to every address of the namespace, IPv6 and IPv4.

    A protocol that the kernel has no sockets for is left out (SCTP). Raises KernelError when a port
    is taken; then nothing stays open.
    """
    opened: list[tuple[str, socket.socket]] = []
    try:
        with netns.entered(fd):
            for protocol, port in sorted(ports):
                sock = _bound(protocol, port)
                if sock is not None:
                    opened.append((protocol, sock))
    except OSError as error:
        for _, sock in opened:
            sock.close()
        raise KernelError(f"cannot listen: {error.strerror}", errno=error.errno or 0) from None
    return opened


def _bound(protocol: str, port: int) -> socket.socket | None:
    kind = socket.SOCK_DGRAM if protocol == "UDP" else socket.SOCK_STREAM
    number = IPPROTO_SCTP if protocol == "SCTP" else 0
    try:
        sock = socket.socket(socket.AF_INET6, kind | socket.SOCK_NONBLOCK, number)
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:
            log.debug("no sockets of this protocol here: %s/%d", protocol, port)
            return None
        raise
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
    except OSError as error:
        sock.close()
        raise OSError(
            error.errno, f"{protocol} port {port}: {os.strerror(error.errno or 0)}"
        ) from None
    return sock
