"""kubectl against the lab's API server: whichever kubectl is installed, without special flags.

A stand-in for the pod runtime reports every placed pod as running and ready.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from podwire.lab import tree
from podwire.lab.api.registry import DeleteOptions
from podwire.lab.api.server import ApiConfig, ApiServer
from podwire.lab.api.storage import Event
from podwire.lab.controllers import ControllerManager

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")

SHOP = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: web:1
        ports: [{name: http, containerPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{ports: [{protocol: TCP, port: 8080}]}]
"""


class Cluster:
    """The server, its controllers and a tiny runtime, on a loop in a thread."""

    def __init__(self, directory: Path) -> None:
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "KUBECONFIG": str(directory / "kubeconfig"),
        }
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        assert self.ready.wait(10)
        (directory / "kubeconfig").write_text(self.server.kubeconfig())

    async def _serve(self) -> None:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        self.server = ApiServer(ApiConfig())
        self.pods = self.server.registry.resource("Pod")
        self.server.registry.storage.observe(self._observe)
        controllers = ControllerManager(self.server.registry)
        controllers.start()
        await self.server.start()
        self.server.load(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": f"node-{i}"},
                "status": {
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "addresses": [{"type": "InternalIP", "address": f"172.30.0.{i}"}],
                },
            }
            for i in (1, 2)
        )
        self.ready.set()
        await self.over.wait()
        controllers.stop()
        await self.server.stop()

    def _observe(self, event: Event) -> None:
        if event.resource is self.pods and event.type != "DELETED":
            self.loop.call_soon(self._step, event.record.key)

    def _step(self, key: tuple[str, str]) -> None:
        record = self.server.registry.find(self.pods, *key)
        if record is None or not tree.text(record.obj, "spec", "nodeName"):
            return
        if "deletionTimestamp" in record.obj["metadata"]:
            self.server.registry.delete(self.pods, *key, DeleteOptions(grace_period_s=0))
        elif record.obj["status"]["phase"] == "Pending":
            status = {
                **record.obj["status"],
                "phase": "Running",
                "podIP": "10.244.0.9",
                "podIPs": [{"ip": "10.244.0.9"}],
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": "web", "ready": True, "restartCount": 0}],
            }
            self.server.registry.amend(self.pods, key, status=status)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)

    def kubectl(self, *arguments: str, stdin: str = "", fails: bool = False) -> str:
        done = subprocess.run(
            ["kubectl", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            env=self.env,
            check=False,
        )
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    def get(self, *arguments: str) -> dict:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("kubectl"))
    yield cluster
    cluster.stop()


@pytest.fixture
def shop(cluster):
    cluster.kubectl("apply", "-f", "-", stdin=SHOP)
    yield cluster
    cluster.kubectl("delete", "namespace", "shop", "--ignore-not-found")


def test_apply_says_what_it_did(cluster):
    try:
        first = cluster.kubectl("apply", "-f", "-", stdin=SHOP)
        assert first.splitlines() == [
            "namespace/shop created",
            "deployment.apps/web created",
            "service/web created",
            "networkpolicy.networking.k8s.io/web created",
        ]
        again = cluster.kubectl("apply", "-f", "-", stdin=SHOP)
        assert all(line.endswith(" unchanged") for line in again.splitlines())
        changed = SHOP.replace("web:1", "web:2").replace("port: 80,", "port: 81,")
        lines = cluster.kubectl("apply", "-f", "-", stdin=changed).splitlines()
        assert [line.split()[-1] for line in lines] == [
            "unchanged", "configured", "configured", "unchanged",
        ]  # fmt: skip
        ports = cluster.get("service", "web", "-n", "shop")["spec"]["ports"]
        assert [port["port"] for port in ports] == [81], "the old port is gone"
    finally:
        cluster.kubectl("delete", "--ignore-not-found", "-f", "-", stdin=SHOP)
    assert "NotFound" in cluster.kubectl("get", "namespace", "shop", fails=True)


def test_a_rollout_can_be_waited_for_and_undone(shop):
    shop.kubectl("rollout", "status", "deployment/web", "-n", "shop", "--timeout=20s")
    shop.kubectl("set", "image", "deployment/web", "web=web:2", "-n", "shop")
    out = shop.kubectl("rollout", "status", "deployment/web", "-n", "shop", "--timeout=20s")
    assert "successfully rolled out" in out
    assert "2 " in shop.kubectl("rollout", "history", "deployment/web", "-n", "shop")
    shop.kubectl("rollout", "undo", "deployment/web", "-n", "shop")
    shop.kubectl("rollout", "status", "deployment/web", "-n", "shop", "--timeout=20s")
    (container,) = shop.get("deployment", "web", "-n", "shop")["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["image"] == "web:1"


def test_tables(shop):
    shop.kubectl("rollout", "status", "deployment/web", "-n", "shop", "--timeout=20s")
    head, *rows = shop.kubectl("get", "pods", "-n", "shop", "-o", "wide").splitlines()
    assert head.split()[:7] == ["NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE"]
    assert [row.split()[1:3] for row in rows] == [["1/1", "Running"]] * 2
    assert "web    2/2" in shop.kubectl("get", "deploy", "-n", "shop")
    service = shop.kubectl("get", "svc", "-n", "shop").splitlines()[1].split()
    assert service[1] == "ClusterIP"
    assert service[4] == "80/TCP"
    assert "Ready" in shop.kubectl("get", "nodes", "-o", "wide")
    everything = shop.kubectl("get", "all", "-A")
    assert "deployment.apps/web" in everything
    assert "service/kubernetes" in everything
    by_label = shop.kubectl("get", "pods", "-n", "shop", "-l", "app in (web),app!=db", "-o", "name")
    assert len(by_label.splitlines()) == 2
    assert shop.kubectl("get", "pods", "-n", "shop", "-l", "app=db", "-o", "name") == ""
    placed = shop.kubectl(
        "get", "pods", "-A", "--field-selector", "spec.nodeName=node-1", "-o", "name"
    )
    assert len(placed.splitlines()) == 1


def test_scale_label_annotate_patch(shop):
    shop.kubectl("scale", "deployment/web", "--replicas=3", "-n", "shop")
    shop.kubectl("rollout", "status", "deployment/web", "-n", "shop", "--timeout=20s")
    assert len(shop.get("pods", "-n", "shop")["items"]) == 3
    shop.kubectl("label", "service", "web", "tier=front", "-n", "shop")
    shop.kubectl("annotate", "service", "web", "note=hello", "-n", "shop")
    port = '{"spec":{"ports":[{"port":443,"name":"https"},{"port":80,"name":"http"}]}}'
    shop.kubectl("patch", "service", "web", "-n", "shop", "-p", port)
    shop.kubectl("patch", "service", "web", "-n", "shop", "--type=merge", "-p",
                 '{"spec":{"type":"NodePort"}}')  # fmt: skip
    shop.kubectl("patch", "service", "web", "-n", "shop", "--type=json", "-p",
                 '[{"op":"add","path":"/metadata/labels/a","value":"b"}]')  # fmt: skip
    service = shop.get("service", "web", "-n", "shop")
    assert service["metadata"]["labels"] == {"tier": "front", "a": "b"}
    ports = {p["port"]: (p.get("targetPort"), p["nodePort"]) for p in service["spec"]["ports"]}
    assert ports[80][0] == "http", "strategic merge keeps what the patch does not name"
    assert all(30000 <= node_port <= 32767 for _, node_port in ports.values())


def test_describe_and_explain(shop):
    shop.kubectl("rollout", "status", "deployment/web", "-n", "shop", "--timeout=20s")
    described = shop.kubectl("describe", "service", "web", "-n", "shop")
    assert "10.244.0.9:8080" in described
    assert "Replicas:" in shop.kubectl("describe", "deployment", "web", "-n", "shop")
    assert "Node:" in shop.kubectl("describe", "pods", "-n", "shop")
    assert "PodSelector:" in shop.kubectl("describe", "networkpolicy", "web", "-n", "shop")
    resources = shop.kubectl("api-resources", "-o", "name").splitlines()
    assert {"pods", "deployments.apps", "networkpolicies.networking.k8s.io"} <= set(resources)
    assert "apps/v1" in shop.kubectl("api-versions").splitlines()


def test_server_side_apply(shop):
    manifest = SHOP.partition("---\n")[2]
    out = shop.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=manifest)
    assert out.count("serverside-applied") == 3
    entries = shop.get("deployment", "web", "-n", "shop", *_managed(shop))["metadata"]
    managers = {(e["manager"], e["operation"]) for e in entries["managedFields"]}
    assert ("kubectl", "Apply") in managers


def _managed(cluster: Cluster) -> list[str]:
    help_text = cluster.kubectl("get", "--help")
    return ["--show-managed-fields"] if "--show-managed-fields" in help_text else []


def test_dry_run_and_diff_change_nothing(shop):
    before = shop.get("deployment", "web", "-n", "shop")["metadata"]["resourceVersion"]
    changed = SHOP.replace("web:1", "web:3")
    out = shop.kubectl("apply", "--dry-run=server", "-f", "-", stdin=changed)
    assert "deployment.apps/web configured (server dry run)" in out
    after = shop.get("deployment", "web", "-n", "shop")["metadata"]["resourceVersion"]
    # the status may have moved on; the template may not
    assert shop.get("deployment", "web", "-n", "shop")["metadata"]["generation"] == 1
    assert int(after) >= int(before)


def test_refusals_name_the_field(shop):
    bad = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: bad, namespace: shop}
spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.5/8}}]}]}
"""
    error = shop.kubectl("apply", "-f", "-", stdin=bad, fails=True)
    assert "spec.ingress[0].from[0].ipBlock.cidr: Invalid value" in error
    taken = shop.get("service", "web", "-n", "shop")["spec"]["clusterIP"]
    other = SHOP.split("---")[2].replace("name: web,", "name: other,")
    other = other.replace("spec:", f"spec:\n  clusterIP: {taken}")
    assert "already allocated" in shop.kubectl("apply", "-f", "-", stdin=other, fails=True)
    assert "AlreadyExists" in shop.kubectl("create", "-f", "-", stdin=SHOP, fails=True)


def test_create_expose_run(shop):
    """Typed commands: kubectl sends these in protobuf from 1.32 on."""
    shop.kubectl("create", "deployment", "api", "--image=api:1", "--port=80", "-n", "shop")
    shop.kubectl("expose", "deployment", "api", "--port=80", "-n", "shop")
    shop.kubectl("create", "configmap", "settings", "--from-literal=a=b", "-n", "shop")
    shop.kubectl("create", "service", "clusterip", "other", "--tcp=81:8081", "-n", "shop")
    shop.kubectl("run", "tool", "--image=tool", "-n", "shop")
    shop.kubectl("rollout", "status", "deployment/api", "-n", "shop", "--timeout=20s")
    assert shop.get("configmap", "settings", "-n", "shop")["data"] == {"a": "b"}
    (port,) = shop.get("service", "other", "-n", "shop")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (81, 8081)


def test_logs_and_exec_say_where_they_are(shop):
    shop.kubectl("rollout", "status", "deployment/web", "-n", "shop", "--timeout=20s")
    (pod, *_) = shop.kubectl("get", "pods", "-n", "shop", "-o", "name").split()
    assert "podwire lab logs" in shop.kubectl("logs", pod, "-n", "shop", fails=True)


def test_custom_resources(cluster):
    definition = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: ships.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: ships, singular: ship, kind: Ship, shortNames: [sh]}
  versions: [{name: v1, served: true, storage: true}]
"""
    ship = """
apiVersion: example.com/v1
kind: Ship
metadata: {name: falcon, namespace: default}
spec: {speed: 12, holds: [{name: a}]}
"""
    cluster.kubectl("apply", "-f", "-", stdin=definition)
    try:
        cluster.kubectl("apply", "-f", "-", stdin=ship)
        assert cluster.get("sh", "falcon")["spec"]["speed"] == 12
        assert "falcon" in cluster.kubectl("get", "ships")
        cluster.kubectl("apply", "-f", "-", stdin=ship.replace("12", "13"))
        assert cluster.get("ships.example.com", "falcon")["spec"]["speed"] == 13
        cluster.kubectl("delete", "ship", "falcon")
    finally:
        cluster.kubectl("delete", "crd", "ships.example.com")


def test_deletes(shop):
    shop.kubectl("rollout", "status", "deployment/web", "-n", "shop", "--timeout=20s")
    (pod, *_) = shop.kubectl("get", "pods", "-n", "shop", "-o", "name").split()
    shop.kubectl("delete", pod, "-n", "shop")
    shop.kubectl("rollout", "status", "deployment/web", "-n", "shop", "--timeout=20s")
    assert len(shop.get("pods", "-n", "shop")["items"]) == 2
    shop.kubectl("cordon", "node-1")
    shop.kubectl("uncordon", "node-1")
    shop.kubectl("delete", "services", "--all", "-n", "shop")
    assert shop.get("endpointslices", "-n", "shop")["items"] == []
    shop.kubectl("delete", "deployment", "web", "-n", "shop")
    end = time.monotonic() + 20
    while shop.get("pods", "-n", "shop")["items"]:
        assert time.monotonic() < end
