"""The healthCheckNodePort of Services: load balancers ask which nodes have endpoints of their own.

One small HTTP server per Service, on the addresses that serve node ports. Status, headers and body
are kube-proxy's (kubernetes pkg/proxy/healthcheck/service_health.go), on every path.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from aiohttp import web

from podwire.agent.logs import event
from podwire.kernel import netns
from podwire.net import Address, format_address
from podwire.services import HealthCheck, Settings
from podwire.services.nodeports import selected_addresses
from podwire.services.table import is_loopback

log = logging.getLogger("podwire.agent.health")

Key: TypeAlias = tuple[str, str]

_ANY: tuple[Address, Address] = (bytes(4), bytes(16))
_IPV6_V6ONLY = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


def listen_addresses(settings: Settings) -> list[Address]:
    """Where the servers listen: the addresses in scope of node ports, or (all zero) any."""
    found: list[Address] = []
    for family, anywhere in zip((4, 6), _ANY, strict=True):
        scope = settings.nodeports[family]
        if scope.prefixes is None:
            found.append(anywhere)
        else:
            own = selected_addresses(scope, family, settings.node.addresses)
            found += [address for address in own if not is_loopback(address)]
    return found


class _Server(NamedTuple):
    port: int
    runner: web.ServerRunner
    sites: dict[Address, web.SockSite]


class ServiceHealth:
    """The servers of all Services that have a healthCheckNodePort.

    `healthy` says whether the proxy itself is. A port that is taken is named in `problems` and
    tried again with the next `update`. `netns_fd`: where to listen (default: here).
    """

    def __init__(self, healthy: Callable[[], bool], netns_fd: int | None = None) -> None:
        self._healthy = healthy
        self._netns_fd = netns_fd
        self._servers: dict[Key, _Server] = {}
        self._checks: Mapping[Key, HealthCheck] = {}
        self.problems: dict[str, str] = {}
        """``Service ns/name``: why its health check is not served."""

    async def update(self, checks: Mapping[Key, HealthCheck], addresses: Sequence[Address]) -> None:
        """Serve these checks on these addresses; costs nothing where both are as before."""
        self._checks = checks
        for key, server in list(self._servers.items()):
            if key not in checks or checks[key].port != server.port:
                await self._servers.pop(key).runner.cleanup()
        self.problems = {}
        for key, check in checks.items():
            if key not in self._servers:
                runner = web.ServerRunner(web.Server(self._handler(key)))
                await runner.setup()
                self._servers[key] = _Server(check.port, runner, {})
            await self._listen(key, addresses)

    async def close(self) -> None:
        """Stop listening."""
        await self.update({}, ())

    async def _listen(self, key: Key, addresses: Sequence[Address]) -> None:
        port, runner, sites = self._servers[key]
        for address in sites.keys() - set(addresses):
            await sites.pop(address).stop()
        for address in addresses:
            if address in sites:
                continue
            try:
                site = web.SockSite(runner, self._socket(address, port))
            except OSError as error:
                name = f"Service {key[0]}/{key[1]}"
                where = f"{format_address(address)} port {port}"
                self.problems[name] = f"health check cannot listen on {where}: {error.strerror}"
                event(log, logging.ERROR, "health check cannot listen", service=name,
                      where=where, error=error)  # fmt: skip
                continue
            sites[address] = site
            await site.start()

    def _socket(self, address: Address, port: int) -> socket.socket:
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        sock = netns.socket(self._netns_fd, family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(*_IPV6_V6ONLY)
            sock.bind((format_address(address), port))
            sock.listen(128)
        except OSError:
            sock.close()
            raise
        return sock

    def _handler(self, key: Key) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        async def answer(_: web.BaseRequest) -> web.Response:
            local = self._checks[key].local_endpoints
            healthy = self._healthy()
            body = {
                "service": {"namespace": key[0], "name": key[1]},
                "localEndpoints": local,
                "serviceProxyHealthy": healthy,
            }
            return web.Response(
                body=json.dumps(body).encode(),
                status=200 if local and healthy else 503,
                headers={
                    "Content-Type": "application/json",
                    "X-Content-Type-Options": "nosniff",
                    "X-Load-Balancing-Endpoint-Weight": str(local),
                },
            )

        return answer
