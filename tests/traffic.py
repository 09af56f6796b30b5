"""Small senders and receivers in namespaces, for tests that look at real packets."""

from __future__ import annotations

import select
import socket
import time

from podwire.kernel import netns


def udp_source(
    client: int, server: int, address: str, *, source: str = "", size: int = 8, wait_s: float = 4
) -> str:
    """Send a datagram from one namespace to another until it arrives.

    Returns the source address that the receiver saw, or "" if nothing came within `wait_s`.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    deadline = time.monotonic() + wait_s
    with (
        netns.socket(server, family, socket.SOCK_DGRAM) as receiver,
        netns.socket(client, family, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((address, 0))
        if source:
            sender.bind((source, 0))
        while time.monotonic() < deadline:
            try:
                sender.sendto(bytes(size), receiver.getsockname()[:2])
            except OSError:
                return ""
            if select.select([receiver], [], [], 0.1)[0]:
                return receiver.recvfrom(size)[1][0]
    return ""
