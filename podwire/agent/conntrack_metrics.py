"""The connection table for Prometheus, also under the names of node_exporter's collector.

Labels are bounded: this node's pods (by address, so not more than it has), the `MOST_SERVICES`
largest Services with the rest as one, kinds, states, and the `MOST_SNAT` targets that use most.

Source of the node_nf_conntrack_ names: prometheus/node_exporter, collector/conntrack_linux.go.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from podwire.conntrack.attribution import Tally
from podwire.conntrack.inspector import Inspector
from podwire.conntrack.names import Role
from podwire.conntrack.rows import snat_rows
from podwire.conntrack.stale import Removal
from podwire.errors import KernelError

MOST_PODS = 250
MOST_SERVICES = 50
MOST_SNAT = 10

_EXPORTER = ("found", "invalid", "ignore", "insert", "insert_failed", "drop", "early_drop",
             "search_restart")  # fmt: skip
_OWN = ("clash_resolve", "chaintoolong", "connections_full", "ports_exhausted")


class ConntrackCollector(Collector):
    """Reads count and counters when it is asked; the rest is of the last whole reading.

    The node_ names are always the kernel's table; ours are `shown`'s, perhaps the data path's own.
    """

    def __init__(self, kernel: Inspector, shown: Inspector) -> None:
        self._kernel, self._inspector = kernel, shown
        self._shown: list[Metric] = []
        self._deleted = {4: 0, 6: 0}
        registry = CollectorRegistry()  # a histogram wants one; the real one asks us
        self._duration = Histogram(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Finding and deleting stale entries",
            registry=registry,
            buckets=tuple(0.001 * 2**power for power in range(15)),
        )
        self._histogram = registry

    def removed(self, removal: Removal) -> None:
        """Count a pass that deleted stale entries."""
        self._duration.observe(removal.seconds)
        for family in self._deleted:
            self._deleted[family] += removal.deleted(family)

    def show(self, tally: Tally, local_ports: tuple[int, int]) -> None:
        """Keep the figures of a whole reading."""
        self._shown = [
            _labelled("podwire_conntrack_kind_entries", "Entries by who talks to whom", ["kind"],
                      {(kind.value,): count for kind, count in tally.kinds.items()}),
            _labelled("podwire_conntrack_state_entries", "Entries by protocol and state",
                      ["protocol", "state"], tally.by_state()),
            _pods(tally),
            _services(tally),
            *_snat(tally, local_ports),
            _gauge("podwire_conntrack_gone_pod_entries",
                   "Entries of addresses in pod ranges that no pod has", tally.gone_pods()),
        ]  # fmt: skip

    def collect(self) -> Iterator[Metric]:
        """All families; nothing while the table cannot be read."""
        try:
            kernel = self._kernel.sample()
            sample = kernel if self._inspector is self._kernel else self._inspector.sample()
        except KernelError:
            return
        forecast = self._inspector.history.forecast()
        yield _gauge("node_nf_conntrack_entries", "Entries in the table", kernel.used)
        yield _gauge("node_nf_conntrack_entries_limit", "Entries that fit", kernel.limit)
        for name in _EXPORTER:
            if name in kernel.counters:
                yield _gauge(f"node_nf_conntrack_stat_{name}", f"Counter {name} of the table",
                             kernel.counters[name])  # fmt: skip
        for name in _OWN:
            if name in sample.counters:
                yield _counter(f"podwire_conntrack_{name}", f"Counter {name} of the table",
                               sample.counters[name])  # fmt: skip
        yield _gauge("podwire_conntrack_entries", "Entries in the data path's table", sample.used)
        yield _gauge("podwire_conntrack_entries_limit", "Entries that fit there", sample.limit)
        yield _gauge("podwire_conntrack_peak_entries", "Most entries since the agent's start",
                     self._inspector.history.peak)  # fmt: skip
        yield _gauge("podwire_conntrack_growth_entries_per_second", "Median growth of five minutes",
                     forecast.growth)  # fmt: skip
        full_in_s = float("inf") if forecast.full_in_s is None else forecast.full_in_s
        yield _gauge(
            "podwire_conntrack_full_in_seconds",
            "Until the table is full if it grows on; +Inf: it does not",
            full_in_s,
        )
        yield from self._deletions()
        yield from self._shown

    def _deletions(self) -> Iterator[Metric]:
        for name in (
            "kubeproxy_conntrack_reconciler_deleted_entries",
            "podwire_conntrack_stale_deleted",
        ):
            family = CounterMetricFamily(name, "Stale UDP entries deleted", labels=["ip_family"])
            for version, count in self._deleted.items():
                family.add_metric([f"IPv{version}"], count)
            yield family
        yield from self._histogram.collect()


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=value)


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(name, help, value=value)


def _labelled(
    name: str, help: str, labels: list[str], values: dict[tuple[str, ...], int]
) -> Metric:
    family = GaugeMetricFamily(name, help, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _pods(tally: Tally) -> Metric:
    """Pods with most entries, at most `MOST_PODS`."""
    peers = [(name, peer) for name, peer in tally.by_name(Role.POD).items() if "/" in name]
    peers.sort(key=lambda item: -item[1].entries)
    values: dict[tuple[str, ...], int] = {}
    for name, peer in peers[:MOST_PODS]:
        namespace, _, pod = name.partition("/")
        values[namespace, pod, "opened"] = peer.opened
        values[namespace, pod, "answered"] = peer.answered
    return _labelled("podwire_conntrack_pod_entries", "Entries by pod, opened and answered",
                     ["namespace", "pod", "side"], values)  # fmt: skip


def _services(tally: Tally) -> Metric:
    ordered = sorted(tally.by_service().items(), key=lambda item: -item[1].answered)
    values: dict[tuple[str, ...], int] = {}
    for name, peer in ordered[:MOST_SERVICES]:
        namespace, _, service = name.partition("/")
        values[namespace, service] = peer.answered
    rest = sum(peer.answered for _, peer in ordered[MOST_SERVICES:])
    if rest:
        values["", "others"] = rest
    return _labelled("podwire_conntrack_service_entries", "Entries through a Service",
                     ["namespace", "service"], values)  # fmt: skip


def _snat(tally: Tally, local_ports: tuple[int, int]) -> Iterator[Metric]:
    rows = snat_rows(tally, local_ports)
    yield _gauge("podwire_conntrack_snat_ports_used_ratio_max",
                 "Largest share of the local port range in use for one destination",
                 rows[0]["ratio"] if rows else 0)  # fmt: skip
    values = {
        (row["node_address"], row["destination"], str(row["destination_port"]), row["protocol"]):
            row["entries"]
        for row in rows[:MOST_SNAT]
    }  # fmt: skip
    labels = ["node_address", "destination", "port", "protocol"]
    yield _labelled(
        "podwire_conntrack_snat_ports_used",
        "Source ports in use towards the destinations that use most",
        labels,
        values,
    )
