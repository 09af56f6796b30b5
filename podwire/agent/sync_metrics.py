"""Metrics that are read where they are kept, when somebody scrapes: nothing is counted twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from podwire.agent.sync import Sync
from podwire.services import ServiceTable

_VERDICTS = {"packets_rejected": "reject", "packets_dropped": "drop"}


class SyncCollector(Collector):
    """Failures, entries in the kernel, and what was set aside, of all parts that run."""

    def __init__(
        self,
        syncs: Callable[[], Sequence[Sync[Any]]],
        undecoded: Callable[[], Iterable[str]],
    ) -> None:
        self._syncs, self._undecoded = syncs, undecoded

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        failures = CounterMetricFamily(
            "podwire_sync_failures", "Syncs that the kernel refused", labels=["part"]
        )
        entries = GaugeMetricFamily(
            "podwire_entries", "What the kernel holds of a part", labels=["part", "what"]
        )
        packets = CounterMetricFamily(
            "podwire_service_packets", "Packets refused or dropped", labels=["verdict", "family"]
        )
        aside = Counter(self._undecoded())
        for sync in self._syncs():
            failures.add_metric([sync.name], sync.failures)
            aside.update(name.partition(" ")[0] for name in sync.problems)
            for path, value in flatten(sync.kernel_status()):
                *family, what = path
                if what in _VERDICTS:
                    packets.add_metric([_VERDICTS[what], " ".join(family)], value)
                else:
                    entries.add_metric([sync.name, " ".join(path)], value)
            if isinstance(sync.table, ServiceTable):
                yield _no_local_endpoints(sync.table)
        set_aside = GaugeMetricFamily(
            "podwire_objects_set_aside", "Objects that make no sense", labels=["kind"]
        )
        for kind, count in aside.items():
            set_aside.add_metric([kind], count)
        yield from (failures, entries, packets, set_aside)


def flatten(
    status: Mapping[str, object], path: tuple[str, ...] = ()
) -> Iterable[tuple[tuple[str, ...], float]]:
    """The numbers of a part's status, each with its names from the outside in."""
    for name, value in status.items():
        if isinstance(value, Mapping):
            yield from flatten(cast("Mapping[str, object]", value), (*path, name))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*path, name), value


def _no_local_endpoints(table: ServiceTable) -> GaugeMetricFamily:
    """Service ports whose policy is Local and whose endpoints are all elsewhere."""
    family = GaugeMetricFamily(
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "Service ports with a Local policy and endpoints elsewhere only",
        labels=["traffic_policy"],
    )
    totals = Counter({"internal": 0, "external": 0})
    for (_, policy), count in table.without_local.items():
        totals[policy] += count
    for policy, count in totals.items():
        family.add_metric([policy], count)
    return family
