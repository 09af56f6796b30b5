"""A cluster without a loop: registry, controllers, and a kubelet that does what it is told."""

from __future__ import annotations

from datetime import UTC, datetime

from podwire.lab import tree
from podwire.lab.api.addresses import ServiceAddresses
from podwire.lab.api.registry import MERGE_PATCH, DeleteOptions, Registry
from podwire.lab.controllers import ControllerConfig, ControllerManager

API = {
    "Deployment": "apps/v1",
    "ReplicaSet": "apps/v1",
    "StatefulSet": "apps/v1",
    "DaemonSet": "apps/v1",
    "Job": "batch/v1",
    "CronJob": "batch/v1",
    "EndpointSlice": "discovery.k8s.io/v1",
}


class Cluster:
    def __init__(self, *, dual_stack: bool = False, nodes: int = 2) -> None:
        self.time = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
        cidrs = ["10.96.0.0/16", "fd00:96::/112"][: 1 + dual_stack]
        self.registry = Registry(ServiceAddresses(cidrs), now=lambda: self.time)
        pods = ["10.244.0.0/16", "fd00:10:244::/56"][: 1 + dual_stack]
        balancers = ["198.51.100.0/25", "fd00:198::/120"][: 1 + dual_stack]
        self.dual_stack = dual_stack
        self.controllers = ControllerManager(self.registry, ControllerConfig(pods, balancers))
        self.addresses = 0
        self.create("Namespace", {"metadata": {"name": "default"}})
        for i in range(nodes):
            self.node(f"node-{i + 1}", zone="ab"[i % 2])

    def node(self, name: str, *, zone: str = "a", ready: bool = True) -> None:
        self.registry.load(
            [
                {
                    "apiVersion": "v1",
                    "kind": "Node",
                    "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
                    "spec": {},
                    "status": {"conditions": [{"type": "Ready", "status": str(ready)}]},
                }
            ]
        )
        self.settle()

    def resource(self, kind: str):
        return self.registry.resource(kind, API.get(kind, "v1"))

    def create(self, kind: str, obj: dict, namespace: str = "default"):
        resource = self.resource(kind)
        home = namespace if resource.namespaced else ""
        record = self.registry.create(resource, home, obj)
        self.settle()
        return record

    def patch(self, kind: str, name: str, patch: dict, namespace: str = "default") -> None:
        resource = self.resource(kind)
        home = namespace if resource.namespaced else ""
        self.registry.patch(resource, home, name, patch, MERGE_PATCH)
        self.settle()

    def delete(self, kind: str, name: str, namespace: str = "default", **options) -> None:
        resource = self.resource(kind)
        home = namespace if resource.namespaced else ""
        self.registry.delete(resource, home, name, DeleteOptions(**options))
        self.settle()

    def get(self, kind: str, name: str, namespace: str = "default") -> dict:
        resource = self.resource(kind)
        return self.registry.get(resource, namespace if resource.namespaced else "", name).obj

    def all(self, kind: str, namespace: str = "default") -> list[dict]:
        collection = self.registry.storage.collection(self.resource(kind))
        return [record.obj for record in collection.select(namespace)]

    def names(self, kind: str, namespace: str = "default") -> list[str]:
        return [obj["metadata"]["name"] for obj in self.all(kind, namespace)]

    def settle(self) -> None:
        self.controllers.settle()

    # --- the kubelet -----------------------------------------------------------------------------

    def run(self, *, ready: bool = True, limit: int = 1000) -> None:
        """Start pods that were placed and end pods that are to go, until nothing moves."""
        while limit and (todo := [pod for pod in self.all("Pod", "") if self._moves(pod, ready)]):
            for pod in todo[:limit]:
                self._step(pod, ready)
                limit -= 1
            self.settle()

    def _moves(self, pod: dict, ready: bool) -> bool:
        if not tree.text(pod, "spec", "nodeName"):
            return False
        return "deletionTimestamp" in pod["metadata"] or pod["status"]["phase"] == "Pending"

    def _step(self, pod: dict, ready: bool) -> None:
        key = (pod["metadata"]["namespace"], pod["metadata"]["name"])
        if "deletionTimestamp" in pod["metadata"]:
            self.registry.delete(self.resource("Pod"), *key, DeleteOptions(grace_period_s=0))
            return
        self.addresses += 1
        ips = [{"ip": f"10.244.{9 + self.addresses // 250}.{self.addresses % 250}"}]
        if self.dual_stack:
            ips.append({"ip": f"fd00:10:244::{self.addresses:x}"})
        self.status(*key, phase="Running", podIP=ips[0]["ip"], podIPs=ips, ready=ready)

    def status(self, namespace: str, name: str, *, ready: bool | None = None, **fields) -> None:
        record = self.registry.get(self.resource("Pod"), namespace, name)
        status = {**record.obj["status"], **fields}
        if ready is not None:
            status["conditions"] = [{"type": "Ready", "status": str(ready)}]
        self.registry.amend(self.resource("Pod"), record.key, status=status)


def workload(name: str = "web", replicas: int | None = 3, image: str = "web:1", **spec) -> dict:
    body: dict = {
        "selector": {"matchLabels": {"app": name}},
        "template": {
            "metadata": {"labels": {"app": name}},
            "spec": {
                "containers": [
                    {
                        "name": "c",
                        "image": image,
                        "ports": [{"name": "http", "containerPort": 8080}],
                    }
                ]
            },
        },
        **spec,
    }
    if replicas is not None:
        body["replicas"] = replicas
    return {"metadata": {"name": name}, "spec": body}


def image(name: str) -> dict:
    """A patch to another image."""
    containers = workload(image=name)["spec"]["template"]["spec"]["containers"]
    return {"spec": {"template": {"spec": {"containers": containers}}}}
