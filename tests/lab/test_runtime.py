"""What the pod runtime does with pods of all sorts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from podwire.lab import connect, manifests, topology
from podwire.lab.cluster import Lab
from podwire.lab.proofs import dns_over_tcp
from tests.lab.conftest import wait_for

PODS = """
apiVersion: batch/v1
kind: Job
metadata: {name: job}
spec:
  template:
    spec: {restartPolicy: Never, containers: [{name: c, ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: host}
spec:
  nodeName: node2
  hostNetwork: true
  containers: [{name: c, ports: [{containerPort: 8888}, {containerPort: 8888, protocol: UDP}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: mapped}
spec:
  nodeName: node1
  initContainers: [{name: init}, {name: side, restartPolicy: Always, ports: [{containerPort: 81}]}]
  containers:
  - name: c
    ports: [{name: web, containerPort: 8080, hostPort: 8081}]
    readinessProbe: {httpGet: {path: /healthz, port: web}}
---
apiVersion: v1
kind: Pod
metadata: {name: plain, labels: {app: plain}}
spec: {nodeName: node1, restartPolicy: Never, containers: [{name: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: slow}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 30
  containers:
  - name: c
    ports: [{containerPort: 80}]
    lifecycle: {preStop: {sleep: {seconds: 3}}}
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: plain}
spec: {selector: {app: plain}, ports: [{name: http, port: 80, targetPort: 7000}]}
---
apiVersion: v1
kind: Service
metadata: {name: nodes}
spec: {clusterIP: None, selector: {app: plain}, ports: [{name: http, port: 7000}]}
"""


@pytest.fixture(scope="module")
def lab(module_lab: Callable[..., Lab]) -> Lab:
    lab = module_lab()
    results = lab.apply(manifests.parse(PODS, "pods"))
    assert [r for r in results if r["verb"] != "created"] == []
    lab.wait()
    return lab


def ask(lab: Lab, source: str, address: str, port: int, **more: Any) -> connect.Answer:
    fd = lab.netns_fd(source)
    try:
        return connect.ask(fd, address, port, **more)
    finally:
        os.close(fd)


def address_of(lab: Lab, pod: str) -> str:
    return lab.pod(pod)["status"]["podIP"]


def test_a_jobs_pod_succeeds_and_gives_its_network_back(lab: Lab) -> None:
    jobs = "/apis/batch/v1/namespaces/default/jobs/job"
    wait_for(lambda: lab.api("GET", jobs)["status"].get("succeeded") == 1)
    (pod,) = lab.items("/api/v1/namespaces/default/pods?labelSelector=job-name%3Djob")
    assert pod["status"]["phase"] == "Succeeded"
    assert not lab.dir.netns(f"pod-{pod['metadata']['uid']}").exists()


def test_host_network_pods_serve_in_their_nodes_namespace(lab: Lab) -> None:
    node = lab.record.nodes["node2"].addresses[0]
    assert address_of(lab, "host") == node
    for protocol in ("TCP", "UDP"):
        answer = ask(lab, "outside", node, 8888, protocol=protocol)
        assert (answer.outcome, answer.seen.get("pod")) == ("ok", "host")
    assert lab.run("host", "hostname").stdout == "node2\n"


def test_host_ports_sidecars_and_named_probe_ports(lab: Lab) -> None:
    node = lab.record.nodes["node1"].addresses[0]
    assert ask(lab, "outside", node, 8081).seen["pod"] == "mapped"
    assert ask(lab, "plain", address_of(lab, "mapped"), 81).seen["pod"] == "mapped"
    status = lab.pod("mapped")["status"]
    assert [c["ready"] for c in status["initContainerStatuses"]] == [True, True]


def test_target_ports_of_later_services_are_served(lab: Lab) -> None:
    assert ask(lab, "slow", address_of(lab, "plain"), 7000).outcome == "refused"
    lab.apply(manifests.parse(SERVICE, "service"))
    lab.wait()
    address = lab.api("GET", "/api/v1/namespaces/default/services/plain")["spec"]["clusterIP"]
    assert ask(lab, "slow", address, 80).seen["pod"] == "plain"


def test_names_resolve_over_udp_and_tcp_and_unknown_ones_do_not(lab: Lab) -> None:
    lab.apply(manifests.parse(SERVICE, "service"))
    lab.wait()
    pod = address_of(lab, "plain")
    found = lab.run("slow", "getent ahostsv4 nodes").stdout.split()
    assert found[0] == pod
    assert lab.run("slow", "getent hosts no-such-service").returncode == 2
    server = lab.api("GET", "/api/v1/namespaces/kube-system/services/kube-dns")["spec"]["clusterIP"]
    fd = lab.netns_fd("slow")
    try:
        assert dns_over_tcp(fd, server, "nodes.default.svc.cluster.local") == pod
    finally:
        os.close(fd)


def test_a_deleted_pod_serves_on_through_its_pre_stop_sleep(lab: Lab) -> None:
    path = "/api/v1/namespaces/default/pods/slow"
    address = address_of(lab, "slow")
    began = time.monotonic()
    lab.api("DELETE", path)
    assert ask(lab, "plain", address, 80).outcome == "ok"
    assert lab.api("GET", path)["metadata"]["deletionTimestamp"]
    names = "/api/v1/namespaces/default/pods"
    wait_for(lambda: "slow" not in [p["metadata"]["name"] for p in lab.items(names)])
    assert time.monotonic() - began >= 3
    assert ask(lab, "plain", address, 80, timeout_s=0.5).outcome != "ok"


def test_large_delayed_and_raw_requests(lab: Lab) -> None:
    address = address_of(lab, "mapped")
    large = ask(lab, "plain", address, 8080, path="/size/3000000", timeout_s=10)
    assert len(large.body) == 3_000_000
    slow = ask(lab, "plain", address, 8080, path="/?delay=300&status=503")
    assert slow.status == 503
    assert slow.latency_s >= 0.3
    script = f"exec 3<>/dev/tcp/{address}/8080; echo PING >&3; head -2 <&3"
    raw = lab.run("plain", ["bash", "-c", script], timeout_s=10).stdout.splitlines()
    assert '"data": "PING' in raw[0]
    assert raw[1] == "PING"


def test_pods_wait_for_an_agent_that_is_away(lab: Lab) -> None:
    lab.control("stop", process="agent-node1")
    pod = "{apiVersion: v1, kind: Pod, metadata: {name: late}, spec: {nodeName: node1, %s}}"
    lab.apply(manifests.parse(pod % "containers: [{name: c}]", "late"))
    wait_for(lambda: "late" in str(lab.runtime_summary()["waiting"]))
    lab.control("start", process="agent-node1")
    lab.wait()
    assert address_of(lab, "late")


def test_the_kubernetes_service_leads_to_the_api_server(lab: Lab) -> None:
    address = lab.api("GET", "/api/v1/namespaces/default/services/kubernetes")["spec"]["clusterIP"]
    answer = ask(lab, "plain", address, 443, timeout_s=5)
    assert (answer.outcome, answer.body) != ("refused", b"")
    assert answer.outcome in ("ok", "broken")  # TLS answers plain HTTP in its own way


def test_underlay_has_no_way_back_to_pods(lab: Lab) -> None:
    answer = ask(lab, "outside", address_of(lab, "mapped"), 8080, timeout_s=0.5)
    assert answer.outcome == "timeout"
    seen = ask(lab, "mapped", topology.OUTSIDE[0], 80).seen
    assert seen["client"].startswith(f"{lab.record.nodes['node1'].addresses[0]}:")
