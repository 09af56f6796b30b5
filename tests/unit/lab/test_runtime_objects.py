"""What a pod's echo server listens on, and the status that is reported. Pure."""

from __future__ import annotations

import msgspec
import pytest

from podwire.lab import files
from podwire.lab.runtime.objects import Pod, TargetService, served_ports
from podwire.lab.runtime.status import PodState, pod_status


def pod(**spec: object) -> Pod:
    meta = {"name": "web-1", "namespace": "shop", "uid": "u", "labels": {"app": "web"}}
    spec.setdefault("containers", [{"name": "c"}])
    return msgspec.convert({"metadata": meta, "spec": spec}, Pod)


def service(namespace: str = "shop", selector: object = None, **port: object) -> TargetService:
    spec = {"selector": selector or {"app": "web"}, "ports": [{"port": 80, **port}]}
    meta = {"name": "s", "namespace": namespace}
    return msgspec.convert({"metadata": meta, "spec": spec}, TargetService)


def test_declared_ports_service_targets_and_probe_ports_are_served() -> None:
    containers = [
        {
            "name": "c",
            "ports": [{"containerPort": 53, "protocol": "UDP"}],
            "readinessProbe": {"httpGet": {"port": 8081}},
        }
    ]
    sidecar = {"name": "s", "restartPolicy": "Always", "ports": [{"containerPort": 9}]}
    plain = {"name": "i", "ports": [{"containerPort": 10}]}
    found = served_ports(
        pod(containers=containers, initContainers=[sidecar, plain]),
        [service(targetPort=8080), service(), service("other"), service(targetPort="http")],
    )
    assert found == {("UDP", 53), ("TCP", 8081), ("TCP", 9), ("TCP", 8080), ("TCP", 80)}


def test_a_pod_is_ready_when_every_container_is() -> None:
    two = pod(containers=[{"name": "a"}, {"name": "b"}])
    state = PodState(phase="Running", addresses=["10.0.0.1", "fd00::1"], ready={"a"})
    conditions = {c["type"]: c["status"] for c in pod_status(two, state, "now")["conditions"]}
    assert conditions["Ready"] == "False"
    state.ready.add("b")
    status = pod_status(two, state, "now")
    assert {c["type"]: c["status"] for c in status["conditions"]}["Ready"] == "True"
    assert status["podIP"] == "10.0.0.1"
    assert status["podIPs"] == [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            {},
            "nameserver 10.96.0.10\n"
            "search shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n",
        ),
        ({"hostNetwork": True}, "nameserver 9.9.9.9\n"),
        ({"dnsPolicy": "Default"}, "nameserver 9.9.9.9\n"),
        (
            {
                "dnsPolicy": "None",
                "dnsConfig": {
                    "nameservers": ["1.1.1.1"],
                    "searches": ["a.b"],
                    "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}],
                },
            },
            "nameserver 1.1.1.1\nsearch a.b\noptions ndots:2 edns0\n",
        ),
    ],
)
def test_resolv_conf_follows_the_dns_policy(spec: dict[str, object], text: str) -> None:
    assert files.resolv_conf(spec, "shop", ["10.96.0.10"], "nameserver 9.9.9.9\n") == text


def test_hosts_names_the_pod_under_its_subdomain() -> None:
    spec = {"hostname": "db-0", "subdomain": "db", "hostAliases": [{"ip": "1.2.3.4"}]}
    text = files.hosts("x", "shop", spec, ["10.0.0.1"])
    assert "10.0.0.1\tdb-0.db.shop.svc.cluster.local\tdb-0\n" in text
    assert "1.2.3.4\t\n" in text
