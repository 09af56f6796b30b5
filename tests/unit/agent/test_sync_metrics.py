from prometheus_client import CollectorRegistry, generate_latest

from podwire.agent.main import triggers
from podwire.agent.sync import Sync
from podwire.agent.sync_metrics import SyncCollector, flatten
from podwire.kube.objects import EndpointSlice, Metadata
from podwire.kube.store import Store
from podwire.services import NodeFacts, ProxyConfig, ServiceCompiler


class Path:
    requirements = ()

    def start(self) -> None: ...
    def apply(self, table: object) -> None: ...
    def flush(self) -> None: ...
    def cleanup(self) -> None: ...

    def verify(self) -> list[str]:
        return []

    def status(self) -> dict[str, object]:
        return {"ip": {"frontends": 3, "packets_dropped": 2}, "name": "text"}


def test_a_scrape_reads_what_the_parts_know() -> None:
    compiler = ServiceCompiler(NodeFacts("n1"), ProxyConfig())
    sync = Sync("services", (EndpointSlice,), compiler.update, Path())
    sync.run(Store().take())
    sync.failures = 4
    registry = CollectorRegistry()
    registry.register(SyncCollector(lambda: [sync], lambda: ["Pod", "Pod"]))
    lines = generate_latest(registry).decode().splitlines()
    assert 'podwire_sync_failures_total{part="services"} 4.0' in lines
    assert 'podwire_entries{part="services",what="ip frontends"} 3.0' in lines
    assert 'podwire_service_packets_total{family="ip",verdict="drop"} 2.0' in lines
    assert 'podwire_objects_set_aside{kind="Pod"} 2.0' in lines
    name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
    assert f'{name}{{traffic_policy="internal"}} 0.0' in lines


def test_a_status_is_flattened_to_its_numbers() -> None:
    assert list(flatten({"a": {"b": 1, "c": True}, "d": 2.5, "e": "x"})) == [
        (("a", "b"), 1),
        (("d",), 2.5),
    ]


def test_triggers_are_read_where_they_make_sense() -> None:
    store = Store()
    key = "endpoints.kubernetes.io/last-change-trigger-time"
    for name, text in (("a", "1970-01-01T00:01:00.5Z"), ("b", "soon"), ("c", "")):
        store.put(EndpointSlice(metadata=Metadata(name=name, annotations={key: text})))
    assert list(triggers(store.take())) == [("IPv4", 60.5)]
