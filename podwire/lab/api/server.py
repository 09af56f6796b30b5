"""The API server: registry, TLS door, the objects every cluster has, and the way in for clients."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import secrets
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
from aiohttp import web

from podwire.kube.labels import SERVICE_NAME
from podwire.kube.objects import Json
from podwire.lab.api import certificates
from podwire.lab.api.addresses import ServiceAddresses
from podwire.lab.api.http import HttpDoor
from podwire.lab.api.registry import Registry, utc_now
from podwire.lab.api.storage import encode


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """`service_cidrs`: one per family, the first is the primary one. `hosts`: names and addresses
    that the certificate is good for. Without `token` a random one is made.
    """

    service_cidrs: Sequence[str] = ("10.96.0.0/16",)
    node_ports: tuple[int, int] = (30000, 32767)
    hosts: Sequence[str] = ("127.0.0.1", "::1", "localhost", "kubernetes.default.svc")
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    now: Callable[[], datetime] = utc_now
    event_log_length: int = 8192


class ApiServer:
    """One cluster's API. `registry` is the in-process door, `start` opens the one over TLS.

    `tokens` may be changed while it runs: a removed token is refused at once.
    """

    def __init__(self, config: ApiConfig = ApiConfig()) -> None:
        self.config = config
        self.registry = Registry(
            ServiceAddresses(config.service_cidrs, config.node_ports),
            now=config.now,
            log_length=config.event_log_length,
        )
        self.tokens: set[str] = {config.token}
        self.certificates = certificates.make(config.hosts)
        self._runner: web.ServerRunner | None = None
        self._addresses: list[tuple[str, int]] = []
        self._bootstrap()

    # --- what every cluster has ------------------------------------------------------------------

    def _bootstrap(self) -> None:
        for name in ("default", "kube-system", "kube-public", "kube-node-lease"):
            self._create("v1", "Namespace", {"metadata": {"name": name}})
        service: Json = {
            "metadata": {
                "name": "kubernetes",
                "labels": {"component": "apiserver", "provider": "kubernetes"},
            },
            "spec": {
                "ports": [{"name": "https", "port": 443, "targetPort": 6443}],
                "clusterIP": self._first_address(),
            },
        }
        self._create("v1", "Service", service, "default")
        cidrs: Json = {
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": list(self.config.service_cidrs)},
        }
        self._create("networking.k8s.io/v1", "ServiceCIDR", cidrs)

    def _first_address(self) -> str:
        return str(ipaddress.ip_network(self.config.service_cidrs[0])[1])

    def _create(self, api_version: str, kind: str, obj: Json, namespace: str = "") -> None:
        resource = self.registry.resource(kind, api_version)
        self.registry.create(resource, namespace, obj)

    def publish(self, address: str, port: int) -> None:
        """Point the Service ``default/kubernetes`` at the address where pods reach this server."""
        family = "IPv6" if ":" in address else "IPv4"
        self.load(
            [
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": "kubernetes",
                        "namespace": "default",
                        "labels": {SERVICE_NAME: "kubernetes"},
                    },
                    "addressType": family,
                    "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
                    "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
                }
            ]
        )

    def load(self, objects: Iterable[Json]) -> None:
        """Put finished objects in place, see `Registry.load`."""
        self.registry.load(objects)

    # --- the TLS door ----------------------------------------------------------------------------

    async def start(self, sockets: Sequence[socket.socket] = ()) -> None:
        """Serve on bound sockets (in whatever namespace they are), or on a free loopback port."""
        if not sockets:
            sockets = [socket.create_server(("127.0.0.1", 0))]
        door = HttpDoor(self.registry, self.tokens)
        server = web.Server(door.handle, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=0.5)
        await self._runner.setup()
        context = self._context()
        for sock in sockets:
            await web.SockSite(self._runner, sock, ssl_context=context, backlog=1024).start()
            self._addresses.append(sock.getsockname()[:2])
        self.publish(*self._addresses[0])

    def _context(self) -> ssl.SSLContext:
        with tempfile.TemporaryDirectory(prefix="podwire-tls-") as directory:
            return self.certificates.server_context(Path(directory))

    async def stop(self) -> None:
        """Close every connection; watches end."""
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    @property
    def connections(self) -> Sequence[asyncio.Protocol]:
        """The open client connections."""
        server = self._runner.server if self._runner else None
        return server.connections if server else []

    @property
    def url(self) -> str:
        host, port = self._addresses[0]
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"

    def kubeconfig(self, url: str = "", context: str = "podwire-lab") -> str:
        """A kubeconfig with the authority and the token inside. Secret: write it mode 0600."""
        authority = base64.b64encode(self.certificates.authority).decode()
        config: Json = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": context,
            "clusters": [
                {
                    "name": context,
                    "cluster": {
                        "server": url or self.url,
                        "certificate-authority-data": authority,
                    },
                }
            ],
            "users": [{"name": context, "user": {"token": self.config.token}}],
            "contexts": [{"name": context, "context": {"cluster": context, "user": context}}],
        }
        return msgspec.json.format(encode(config)).decode()  # JSON is YAML
