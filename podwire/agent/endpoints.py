"""What the agent answers over TCP: health for kubelet and load balancers, metrics for Prometheus.

Paths and bodies are kube-proxy's (kubernetes pkg/proxy/healthcheck/proxy_health.go,
cmd/kube-proxy/app/server.go).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Counter

from podwire.agent.metrics import Metrics
from podwire.errors import ConfigError


@dataclass
class Health:
    """What the health endpoints judge. Wall-clock seconds; 0: never."""

    timeout_s: float  # a queued update older than this makes the proxy unhealthy
    last_updated: float = 0.0
    queued_since: float = 0.0  # the oldest change that is not in the kernel yet
    node_eligible: bool = True  # neither deleted nor about to be

    def healthy(self, now: float) -> bool:
        """Alive: the kernel holds a table, and no change waits too long."""
        if not self.last_updated:
            return False
        return not self.queued_since or now - self.queued_since <= self.timeout_s

    def body(self, now: float) -> dict[str, object]:
        """The JSON that kube-proxy answers, times in RFC 3339."""
        healthy = self.healthy(now)
        return {
            "lastUpdated": _rfc3339(self.last_updated),
            "currentTime": _rfc3339(now),
            "nodeEligible": self.node_eligible,
            "healthy": healthy,
            "status": {
                family: {"lastUpdated": _rfc3339(self.last_updated), "healthy": healthy}
                for family in ("IPv4", "IPv6")
            },
        }


def _rfc3339(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def split_bind(text: str) -> tuple[str, int]:
    """Host and port of ``0.0.0.0:10256`` or ``[::]:10256``; port 0 switches the server off."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"not an address and port: {text!r}")
    return host.strip("[]"), int(port)


class Endpoints:
    """The health server and the metrics server of one agent."""

    def __init__(
        self, metrics: Metrics, health: Health, configuration: Callable[[], dict[str, object]]
    ) -> None:
        self._metrics, self._health, self._configuration = metrics, health, configuration
        self._runners: list[web.AppRunner] = []
        self._asked = {
            path: Counter(
                f"kubeproxy_proxy_{path}", f"Answers of /{path}", ["code"],
                registry=metrics.registry,
            )
            for path in ("healthz", "livez")
        }  # fmt: skip

    async def start(self, healthz_bind: str, metrics_bind: str) -> None:
        """Listen on both. Raises OSError when an address is taken."""
        await self._listen(self.health_application(), healthz_bind)
        metrics = web.Application()
        metrics.router.add_get("/metrics", self._metrics_text)
        metrics.router.add_get("/healthz", self._ok)
        metrics.router.add_get("/proxyMode", self._mode)
        metrics.router.add_get("/configz", self._configz)
        await self._listen(metrics, metrics_bind)

    def health_application(self) -> web.Application:
        """What the kubelet's probes and load balancers ask."""
        health = web.Application()
        health.router.add_get("/healthz", self._healthz)
        health.router.add_get("/livez", self._livez)
        return health

    async def stop(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _listen(self, app: web.Application, bind: str) -> None:
        host, port = split_bind(bind)
        if port == 0:
            return
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, host or None, port, reuse_address=True).start()

    async def _healthz(self, _: web.Request) -> web.Response:
        now = time.time()
        return self._judge("healthz", self._health.healthy(now) and self._health.node_eligible, now)

    async def _livez(self, _: web.Request) -> web.Response:
        now = time.time()
        return self._judge("livez", self._health.healthy(now), now)

    def _judge(self, path: str, good: bool, now: float) -> web.Response:
        status = 200 if good else 503
        self._asked[path].labels(str(status)).inc()
        return web.Response(
            text=json.dumps(self._health.body(now)),
            status=status,
            content_type="application/json",
            headers={"X-Content-Type-Options": "nosniff"},
        )

    async def _metrics_text(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def _ok(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _mode(self, _: web.Request) -> web.Response:
        return web.Response(text=str(self._configuration()["datapath"]))

    async def _configz(self, _: web.Request) -> web.Response:
        return web.json_response(self._configuration())
