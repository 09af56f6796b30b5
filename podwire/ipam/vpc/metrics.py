"""Metrics under the names that dashboards of the AWS VPC CNI use, and how long ADDs wait."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from podwire.ipam.vpc.limits import InstanceLimits
from podwire.ipam.vpc.pool import PoolStats

WAIT_BUCKETS_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 60)
LATENCY_BUCKETS_MS = (10, 25, 50, 100, 200, 500, 1000, 2500, 5000, 15000)


class Metrics:
    """One set per agent, in the agent's registry."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.registry = registry

        def gauge(name: str, text: str) -> Gauge:
            return Gauge("awscni_" + name, text, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter("awscni_" + name, text, labels, registry=registry)

        self.enis = gauge("eni_allocated", "ENIs attached")
        self.eni_max = gauge("eni_max", "ENIs the instance type allows")
        self.ip_max = gauge("ip_max", "Addresses for pods the instance type allows")
        self.total = gauge("total_ip_addresses", "Addresses for pods on attached ENIs")
        self.assigned = gauge("assigned_ip_addresses", "Addresses that pods have")
        self.cooling = gauge("cooling_ip_addresses", "Freed addresses that rest")
        self.waiting = gauge("waiting_pods", "ADDs that wait for an address")
        self.prefixes = gauge("total_ipv4_prefixes", "Delegated prefixes")
        self.add_requests = counter("add_ip_req_count", "ADDs that asked for an address")
        self.del_requests = counter("del_ip_req_count", "DELs that freed an address")
        self.no_address = counter("no_available_ip_addresses", "ADDs that got no address")
        self.reconciles = counter("reconcile_count", "Comparisons with EC2", "fn")
        self.forced_enis = counter("force_removed_enis", "ENIs that vanished in EC2")
        self.forced_ips = counter("force_removed_ips", "Addresses or prefixes that vanished")
        self.errors = counter("ipamd_error_count", "Steps that failed", "fn")
        self.api_requests = counter("ec2api_req_count", "EC2 requests", "fn")
        self.api_errors = counter("aws_api_error_count", "EC2 errors", "api", "error")
        self.api_latency = Histogram(
            "awscni_aws_api_latency_ms",
            "Time of an EC2 request in ms",
            ["api", "error"],
            registry=registry,
            buckets=LATENCY_BUCKETS_MS,
        )
        self.wait = Histogram(
            "awscni_add_wait_seconds",
            "Time an ADD waited for its address",
            registry=registry,
            buckets=WAIT_BUCKETS_S,
        )

    def observe_call(self, operation: str, seconds: float, error: str) -> None:
        """One EC2 request; `error` is its code or empty."""
        self.api_requests.labels(operation).inc()
        self.api_latency.labels(operation, str(bool(error)).lower()).observe(seconds * 1000)
        if error:
            self.api_errors.labels(operation, error).inc()

    def show(self, enis: int, stats: PoolStats, limits: InstanceLimits) -> None:
        """Set the gauges."""
        self.enis.set(enis)
        self.eni_max.set(limits.enis)
        self.ip_max.set(limits.enis * limits.slots_per_eni)
        self.total.set(stats.total)
        self.assigned.set(stats.assigned)
        self.cooling.set(stats.cooling)
        self.waiting.set(stats.waiting)
        self.prefixes.set(stats.prefixes)
