"""The agent's Prometheus metrics, under kube-proxy's names where one exists.

Names and meanings of the ``kubeproxy_`` metrics: kubernetes pkg/proxy/metrics/metrics.go.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SYNC_BUCKETS_S = tuple(0.001 * 2**power for power in range(15))  # 1 ms .. 16.384 s
PROGRAMMING_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One registry per agent: nothing global, so that tests and labs do not meet in it."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        sync = "kubeproxy_sync_proxy_rules_"
        self.sync_duration = Histogram(
            sync + "duration_seconds",
            "Time of one sync of Services into the kernel",
            ["ip_family"],
            registry=registry,
            buckets=SYNC_BUCKETS_S,
        )
        self.network_programming = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "From the change of an endpoint (last-change-trigger-time) to the kernel holding it",
            ["ip_family"],
            registry=registry,
            buckets=PROGRAMMING_BUCKETS_S,
        )
        self.last_sync = Gauge(
            sync + "last_timestamp_seconds", "Last finished sync", ["ip_family"], registry=registry
        )
        self.last_queued = Gauge(
            sync + "last_queued_timestamp_seconds",
            "Last time a sync was asked for",
            ["ip_family"],
            registry=registry,
        )
        self.service_changes = Counter(
            sync + "service_changes", "Service changes seen", registry=registry
        )
        self.endpoint_changes = Counter(
            sync + "endpoint_changes", "EndpointSlice changes seen", registry=registry
        )
        self.service_pending = Gauge(
            sync + "service_changes_pending", "Service changes not yet applied", registry=registry
        )
        self.endpoint_pending = Gauge(
            sync + "endpoint_changes_pending",
            "EndpointSlice changes not yet applied",
            registry=registry,
        )
        self.repairs = Counter(
            "podwire_repairs",
            "Foreign or missing kernel state put right, by part",
            ["part"],
            registry=registry,
        )
        self.cni_duration = Histogram(
            "podwire_cni_duration_seconds",
            "CNI calls",
            ["command", "code"],
            registry=registry,
            buckets=SYNC_BUCKETS_S,
        )
        self.policy_duration = Histogram(
            "podwire_policy_sync_duration_seconds",
            "Time of one sync of policies into the kernel",
            registry=registry,
            buckets=SYNC_BUCKETS_S,
        )

    def text(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
