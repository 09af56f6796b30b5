"""The health check server: where it listens, and what becomes of a port that is taken."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from podwire.agent import health
from podwire.agent.health import ServiceHealth, listen_addresses
from podwire.kernel import netns
from podwire.net import parse_address
from podwire.services import (
    HealthCheck,
    NodeFacts,
    ProxyConfig,
    ServiceCompiler,
    ServiceTable,
)
from podwire.services.shared_map import SharedMap

NODE = NodeFacts("n", (parse_address("192.0.2.1"), parse_address("192.0.2.2")))


def table(port: int | None) -> ServiceTable:
    """One with a health check on `port`, or none."""
    settings = ServiceCompiler(NODE, ProxyConfig(nodeport_addresses=("all",))).table.settings
    checks = {("demo", "web"): HealthCheck(port, 1)} if port else {}
    return ServiceTable(settings, SharedMap(), checks)


def test_addresses_follow_the_node_port_option() -> None:
    for option, expected in (("primary", ["192.0.2.1"]), ("all", ["0.0.0.0", "::"])):
        config = ProxyConfig(nodeport_addresses=(option,))
        settings = ServiceCompiler(NODE, config).table.settings
        assert listen_addresses(settings) == [parse_address(text) for text in expected]


def test_a_taken_port_is_named_and_tried_again(
    netns_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "RETRY_S", 0.01)

    async def scenario() -> None:
        server = ServiceHealth(netns_fd)
        with netns.socket(netns_fd, socket.AF_INET, socket.SOCK_STREAM) as taken:
            taken.bind(("0.0.0.0", 31000))
            taken.listen()
            running = asyncio.create_task(server.run(lambda: True))
            server.follow(table(31000))
            await until(lambda: bool(server.reasons()))
            assert "0.0.0.0 port 31000" in server.problems["Service demo/web"]
            await until(lambda: listens(netns_fd, "::1", 31000))
        await until(lambda: not server.reasons())
        assert listens(netns_fd, "127.0.0.1", 31000)
        server.follow(table(31001))
        await until(lambda: listens(netns_fd, "127.0.0.1", 31001))
        assert not listens(netns_fd, "127.0.0.1", 31000)
        server.follow(table(None))
        await until(lambda: not listens(netns_fd, "127.0.0.1", 31001))
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(scenario())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def listens(fd: int, address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with netns.socket(fd, family, socket.SOCK_STREAM) as sock:
        return sock.connect_ex((address, port)) == 0
