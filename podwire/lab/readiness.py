"""Whether a lab is ready: nodes, workloads, pods, and what the agents have programmed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from podwire.errors import ApiError
from podwire.kube.labels import SERVICE_NAME
from podwire.lab.state import LabDir, Record

Json: TypeAlias = dict[str, Any]

_WORKLOADS = (
    ("Deployment", "/apis/apps/v1/deployments"),
    ("StatefulSet", "/apis/apps/v1/statefulsets"),
    ("DaemonSet", "/apis/apps/v1/daemonsets"),
    ("ReplicaSet", "/apis/apps/v1/replicasets"),
)

# what agents program, less what they rightly leave alone
_PROGRAMMED = {
    "Node": "/api/v1/nodes",
    "Service": "/api/v1/services?labelSelector=%21service.kubernetes.io/service-proxy-name",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/endpointslices"
    "?labelSelector=%21service.kubernetes.io/headless",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/networkpolicies",
}


class Lab(Protocol):
    """What is asked of a `cluster.Lab`."""

    dir: LabDir
    record: Record

    def items(self, path: str) -> list[Json]: ...
    def agent(self, node: str, path: str) -> Any: ...
    def runtime_summary(self) -> Json: ...


@dataclass(frozen=True)
class Readiness:
    """A look at the lab. `missing` says what is not ready, one line each."""

    nodes: tuple[int, int] = (0, 0)  # ready, all
    pods: tuple[int, int] = (0, 0)
    missing: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        return f"nodes {self.nodes[0]}/{self.nodes[1]}  pods {self.pods[0]}/{self.pods[1]}"

    @classmethod
    def of(cls, lab: Lab) -> Readiness:
        """Ask the lab. Cheap questions first: pods are listed once the workloads say so."""
        nodes = lab.items("/api/v1/nodes")
        missing = [
            f"node {name}: {_why(node)}{_complaint(lab, name)}"
            for node in nodes
            for name in (node["metadata"]["name"],)
            if not is_ready(node)
        ]
        missing += [f"node {name}: not registered" for name in _unregistered(lab, nodes)]
        counts = (sum(map(is_ready, nodes)), len(lab.record.nodes))
        if missing:
            return cls(counts, (0, 0), tuple(missing))
        wanted = ready = 0
        for kind, path in _WORKLOADS:
            for workload in lab.items(path):
                want, have = replicas(kind, workload)
                wanted, ready = wanted + want, ready + min(have, want)
                if have < want or not _observed(workload):
                    missing.append(f"{kind} {_name(workload)}: {have} of {want} pods ready")
        if missing:
            return cls(counts, (ready, wanted), tuple(missing + _unready_pods(lab)))
        pods = lab.items("/api/v1/pods")
        missing = [f"pod {_name(p)}: {_why(p)}" for p in pods if not is_ready(p)]
        if not missing:
            missing = _unlisted(lab, pods) or _behind(lab)
        return cls(counts, (sum(map(is_ready, pods)), len(pods)), tuple(missing))


def _complaint(lab: Lab, node: str) -> str:
    """The last error in the log of a node's agent, if it has one."""
    try:
        lines = lab.dir.log(f"agent-{node}").read_text().splitlines()
    except OSError:
        return ""
    errors = [line for line in lines if "level=error" in line]
    return f" (its agent: {errors[-1].partition(' event=')[2]})" if errors else ""


def _unregistered(lab: Lab, nodes: Iterable[Json]) -> list[str]:
    return sorted(set(lab.record.nodes) - {node["metadata"]["name"] for node in nodes})


def _unready_pods(lab: Lab) -> list[str]:
    """The pods behind the unready workloads, for the list that a timeout prints."""
    summary = lab.runtime_summary()
    return [f"pod {line}" for line in summary["waiting"][:20]]


def _unlisted(lab: Lab, pods: Iterable[Json]) -> list[str]:
    """Services whose EndpointSlices do not yet name all ready pods: the controller follows."""
    named: dict[tuple[str, str], set[str]] = {}
    for endpoint_slice in lab.items("/apis/discovery.k8s.io/v1/endpointslices"):
        labels: Json = endpoint_slice["metadata"].get("labels") or {}
        owner: str = labels.get(SERVICE_NAME, "")
        names = named.setdefault((endpoint_slice["metadata"]["namespace"], owner), set())
        endpoints: list[Json] = endpoint_slice.get("endpoints") or []
        for endpoint in endpoints:
            conditions: Json = endpoint.get("conditions") or {}
            target: Json = endpoint.get("targetRef") or {}
            if conditions.get("ready", True):
                names.add(target.get("name", ""))
    by_namespace: dict[str, list[Json]] = {}
    for pod in pods:
        if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]:
            by_namespace.setdefault(pod["metadata"]["namespace"], []).append(pod)
    missing: list[str] = []
    for service in lab.items("/api/v1/services"):
        selector = service["spec"].get("selector")
        if not selector:
            continue
        namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
        wanted = {
            pod["metadata"]["name"]
            for pod in by_namespace.get(namespace, ())
            if selector.items() <= (pod["metadata"].get("labels") or {}).items()
        }
        if wanted - named.get((namespace, name), set()):
            missing.append(f"Service {namespace}/{name}: endpoints of ready pods are missing")
    return missing


def _behind(lab: Lab) -> list[str]:
    """Agents whose kernels do not yet hold what the API holds (resource versions compare as
    numbers, KEP-5504).
    """
    missing: list[str] = []
    newest: dict[str, int] = {}
    for node in lab.record.nodes:
        try:
            synced = lab.agent(node, "/v1/synced")
        except ApiError as error:
            missing.append(f"node {node}: {error}")
            continue
        if synced["waiting"]:
            missing.append(f"node {node}: changes are being programmed")
            continue
        for kind, version in synced["versions"].items():
            if kind in _PROGRAMMED and kind not in newest:
                versions = (o["metadata"]["resourceVersion"] for o in lab.items(_PROGRAMMED[kind]))
                newest[kind] = max(map(int, versions), default=0)
            if version < newest.get(kind, 0):
                missing.append(f"node {node}: the newest {kind} is not programmed yet")
    return missing


def replicas(kind: str, workload: Json) -> tuple[int, int]:
    """How many pods a workload wants, and how many are ready."""
    status: Json = workload.get("status") or {}
    if kind == "DaemonSet":
        return status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
    if any(owner.get("controller") for owner in workload["metadata"].get("ownerReferences", ())):
        return 0, 0  # its owner counts
    wanted = workload["spec"].get("replicas")
    return 1 if wanted is None else wanted, status.get("readyReplicas", 0)


def _observed(workload: Json) -> bool:
    status: Json = workload.get("status") or {}
    return status.get("observedGeneration", 0) >= workload["metadata"].get("generation", 0)


def is_ready(obj: Json) -> bool:
    """Whether a node or pod is ready; a pod that has succeeded is."""
    status: Json = obj.get("status") or {}
    if status.get("phase") == "Succeeded":
        return True
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ()))


def _why(obj: Json) -> str:
    status: Json = obj.get("status") or {}
    for condition in status.get("conditions", ()):
        if condition["type"] == "Ready":
            return condition.get("message") or condition.get("reason") or "not ready"
    return status.get("phase") or "nothing is known yet"


def _name(obj: Json) -> str:
    return f"{obj['metadata']['namespace']}/{obj['metadata']['name']}"
