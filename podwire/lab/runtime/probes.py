"""Readiness probes, sent from the node as the kubelet does.

Source: kubernetes pkg/kubelet/prober.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from podwire.kernel import netns
from podwire.lab.runtime.objects import Container, HTTPGet, Probe, TCPSocket

FIRST_RETRY_S = 0.1


def _resolve_port(port: int | str, container: Container) -> int:
    """The number of a port that a probe names; 0 when the container has no port of that name."""
    if isinstance(port, int):
        return port
    if port.isdigit():
        return int(port)
    return next((p.container_port for p in container.ports if p.name == port), 0)


async def attempt(node_netns: int, address: str, container: Container, probe: Probe) -> bool:
    """One probe of a pod at `address`."""
    handler = probe.http_get or probe.tcp_socket or probe.grpc
    if handler is None:
        return True
    try:
        return await asyncio.wait_for(
            _ask(node_netns, handler.host or address, handler, container), probe.timeout_seconds
        )
    except (TimeoutError, OSError):
        return False


async def _ask(
    node_netns: int, address: str, handler: HTTPGet | TCPSocket, container: Container
) -> bool:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = netns.socket(node_netns, family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await loop.sock_connect(sock, (address, _resolve_port(handler.port, container)))
        if isinstance(handler, TCPSocket):
            return True
        host = f"[{address}]" if ":" in address else address
        request = (
            f"GET {handler.path} HTTP/1.1\r\nHost: {host}\r\n"
            "User-Agent: kube-probe/1.36\r\nConnection: close\r\n\r\n"
        )
        await loop.sock_sendall(sock, request.encode())
        answer = await loop.sock_recv(sock, 4096)
        words = answer.split(b" ", 2)
        return len(words) > 1 and words[1].isdigit() and 200 <= int(words[1]) < 400
    finally:
        sock.close()


async def watch(
    node_netns: int,
    address: str,
    container: Container,
    probe: Probe,
    changed: Callable[[bool], None],
) -> None:
    """Probe for ever; `changed` is called when the container turns ready or not ready.

    A container that is not ready is asked more often than its period says, as the API allows, so
    that it is ready sooner.
    """
    await asyncio.sleep(probe.initial_delay_seconds)
    ready, run, last, impatient_s = False, 0, False, FIRST_RETRY_S
    while True:
        result = await attempt(node_netns, address, container, probe)
        run = run + 1 if result == last else 1
        last = result
        threshold = probe.success_threshold if result else probe.failure_threshold
        if result != ready and run >= threshold:
            ready, impatient_s = result, FIRST_RETRY_S
            changed(ready)
        if ready:
            await asyncio.sleep(probe.period_seconds)
        else:
            await asyncio.sleep(min(impatient_s, probe.period_seconds))
            impatient_s *= 2
