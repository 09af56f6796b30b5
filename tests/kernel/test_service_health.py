"""The health check server: where it listens, and what becomes of a port that is taken."""

from __future__ import annotations

import asyncio
import socket

from podwire.agent.health import ServiceHealth, listen_addresses
from podwire.kernel import netns
from podwire.net import parse_address
from podwire.services import HealthCheck, NodeFacts, ProxyConfig, ServiceCompiler

LOOPBACK = [parse_address("127.0.0.1"), parse_address("::1")]
CHECK = {("demo", "web"): HealthCheck(31000, 1)}


def test_addresses_follow_the_node_port_option() -> None:
    node = NodeFacts("n", (parse_address("192.0.2.1"), parse_address("192.0.2.2")))
    for option, expected in ((("primary",), ["192.0.2.1"]), (("all",), ["0.0.0.0", "::"])):
        config = ProxyConfig(nodeport_addresses=option)
        settings = ServiceCompiler(node, config).table.settings
        assert listen_addresses(settings) == [parse_address(text) for text in expected]


def test_a_taken_port_is_named_and_tried_again(netns_fd: int) -> None:
    async def scenario() -> None:
        server = ServiceHealth(lambda: True, netns_fd)
        with netns.socket(netns_fd, socket.AF_INET, socket.SOCK_STREAM) as taken:
            taken.bind(("127.0.0.1", 31000))
            taken.listen()
            await server.update(CHECK, LOOPBACK)
            assert "127.0.0.1 port 31000" in server.problems["Service demo/web"]
            assert await asyncio.to_thread(listens, netns_fd, "::1")
        await server.update(CHECK, LOOPBACK)
        assert server.problems == {}
        assert await asyncio.to_thread(listens, netns_fd, "127.0.0.1")
        await server.update({}, LOOPBACK)
        assert not await asyncio.to_thread(listens, netns_fd, "127.0.0.1")
        await server.close()

    asyncio.run(scenario())


def listens(fd: int, address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with netns.socket(fd, family, socket.SOCK_STREAM) as sock:
        return sock.connect_ex((address, 31000)) == 0
