"""The healthCheckNodePort of Services: load balancers ask which nodes have endpoints of their own.

One small HTTP server per Service, on the addresses that serve node ports. Status, headers and body
are kube-proxy's (kubernetes pkg/proxy/healthcheck/service_health.go), on every path.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from aiohttp import web

from podwire.agent.logs import event
from podwire.kernel import netns
from podwire.net import Address, address_family, format_address
from podwire.services import HealthCheck, ServiceTable, Settings
from podwire.services.model import is_loopback
from podwire.services.nodeports import selected_addresses

log = logging.getLogger("podwire.agent.health")

Key: TypeAlias = tuple[str, str]

RETRY_S = 10.0
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

    `run` keeps them at the newest table that `follow` was given. A port that is taken is named in
    `problems` and tried again. `netns_fd`: where to listen (default: here).
    """

    def __init__(self, netns_fd: int | None = None) -> None:
        self._netns_fd = netns_fd
        self._healthy: Callable[[], bool] = lambda: False
        self._table: ServiceTable | None = None
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._servers: dict[Key, _Server] = {}
        self.problems: dict[str, str] = {}
        """``Service ns/name``: why its health check is not served."""

    def follow(self, table: ServiceTable) -> None:
        """Serve what `table` says from now on. From any thread; the same again costs nothing."""
        before, self._table = self._table, table
        if self._running is None or (
            before is not None
            and before.health_checks is table.health_checks
            and before.settings is table.settings
        ):
            return
        loop, wake = self._running
        loop.call_soon_threadsafe(wake.set)

    async def run(self, healthy: Callable[[], bool]) -> None:
        """Serve until cancelled; `healthy` says whether the proxy itself is."""
        wake = asyncio.Event()
        self._healthy = healthy
        self._running = (asyncio.get_running_loop(), wake)
        try:
            while True:
                wake.clear()
                if self._table is not None:
                    addresses = listen_addresses(self._table.settings)
                    await self._serve(self._table.health_checks, addresses)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), RETRY_S if self.problems else None)
        finally:
            self._running = None
            await self._serve({}, ())

    def reasons(self) -> list[str]:
        """What is amiss, for the status."""
        return [f"{name}: {why}" for name, why in self.problems.items()]

    async def _serve(self, checks: Mapping[Key, HealthCheck], addresses: Sequence[Address]) -> None:
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
        family = address_family(address)
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
            check = self._table.health_checks.get(key) if self._table else None
            local = check.local_endpoints if check else 0
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
