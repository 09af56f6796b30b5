"""What the API server fills in, for the kinds that matter to the network and to kubectl.

Each function completes an object in place; applying it twice changes nothing. Addresses and node
ports are not here (`addresses.py`). Source: pkg/apis/*/v1/defaults.go of Kubernetes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from podwire.kube.objects import Json
from podwire.lab import tree


def _protocols(ports: Iterable[Json] | None) -> None:
    for port in ports or ():
        port.setdefault("protocol", "TCP")


def _pod_spec(spec: Json) -> None:
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("schedulerName", "default-scheduler")
    spec.setdefault("securityContext", {})
    if spec.get("serviceAccountName"):
        spec.setdefault("serviceAccount", spec["serviceAccountName"])
    for container in [*tree.mappings(spec, "initContainers"), *tree.mappings(spec, "containers")]:
        _container(container, host_network=bool(spec.get("hostNetwork")))


def _container(container: Json, *, host_network: bool) -> None:
    image = str(container.get("image", ""))
    floating = image.endswith(":latest") or ":" not in image.rpartition("/")[2]
    container.setdefault("imagePullPolicy", "Always" if floating else "IfNotPresent")
    container.setdefault("terminationMessagePath", "/dev/termination-log")
    container.setdefault("terminationMessagePolicy", "File")
    container.setdefault("resources", {})
    _protocols(container.get("ports"))
    if host_network:
        for port in tree.mappings(container, "ports"):
            port.setdefault("hostPort", port.get("containerPort"))
    for name in ("readinessProbe", "livenessProbe", "startupProbe"):
        if probe := container.get(name):
            _probe(probe)


def _probe(probe: Json) -> None:
    if http := probe.get("httpGet"):
        http.setdefault("path", "/")
        http.setdefault("scheme", "HTTP")
    if grpc := probe.get("grpc"):
        grpc.setdefault("service", "")
    probe.setdefault("timeoutSeconds", 1)
    probe.setdefault("periodSeconds", 10)
    probe.setdefault("successThreshold", 1)
    probe.setdefault("failureThreshold", 3)


def _pod(pod: Json) -> None:
    spec = pod.setdefault("spec", {})
    _pod_spec(spec)
    spec.setdefault("serviceAccountName", "default")
    spec.setdefault("serviceAccount", spec["serviceAccountName"])
    spec.setdefault("enableServiceLinks", True)
    spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
    spec.setdefault("priority", 0)
    status = pod.setdefault("status", {})
    status.setdefault("phase", "Pending")
    status.setdefault("qosClass", _quality(spec))


def _quality(spec: Json) -> str:
    resources = [tree.mapping(c, "resources") for c in tree.mappings(spec, "containers")]
    if not any(r.get("requests") or r.get("limits") for r in resources):
        return "BestEffort"
    for resource in resources:
        limits, requests = tree.mapping(resource, "limits"), tree.mapping(resource, "requests")
        if not {"cpu", "memory"} <= limits.keys() or (requests and requests != limits):
            return "Burstable"
    return "Guaranteed"


def _template(workload: Json) -> Json:
    spec = workload.setdefault("spec", {})
    template = spec.setdefault("template", {})
    template.setdefault("metadata", {})
    _pod_spec(template.setdefault("spec", {}))
    return spec


def _deployment(deployment: Json) -> None:
    spec = _template(deployment)
    spec.setdefault("replicas", 1)
    spec.setdefault("revisionHistoryLimit", 10)
    spec.setdefault("progressDeadlineSeconds", 600)
    strategy = spec.setdefault("strategy", {})
    if strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        rolling.setdefault("maxSurge", "25%")
        rolling.setdefault("maxUnavailable", "25%")


def _replicas(workload: Json) -> None:
    _template(workload).setdefault("replicas", 1)


def _stateful_set(workload: Json) -> None:
    spec = _template(workload)
    spec.setdefault("replicas", 1)
    spec.setdefault("podManagementPolicy", "OrderedReady")
    spec.setdefault("revisionHistoryLimit", 10)
    strategy = spec.setdefault("updateStrategy", {})
    if strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
        strategy.setdefault("rollingUpdate", {}).setdefault("partition", 0)


def _daemon_set(workload: Json) -> None:
    spec = _template(workload)
    spec.setdefault("revisionHistoryLimit", 10)
    strategy = spec.setdefault("updateStrategy", {})
    if strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        rolling.setdefault("maxSurge", 0)
        rolling.setdefault("maxUnavailable", 1)


def _job(job: Json) -> None:
    spec = _template(job)
    spec.setdefault("completions", spec.get("parallelism", 1))
    spec.setdefault("parallelism", 1)
    spec.setdefault("backoffLimit", 6)
    spec.setdefault("completionMode", "NonIndexed")
    spec.setdefault("suspend", False)


def _cron_job(job: Json) -> None:
    spec = job.setdefault("spec", {})
    spec.setdefault("concurrencyPolicy", "Allow")
    spec.setdefault("suspend", False)
    spec.setdefault("successfulJobsHistoryLimit", 3)
    spec.setdefault("failedJobsHistoryLimit", 1)


def _service(service: Json) -> None:
    spec = service.setdefault("spec", {})
    kind = spec.setdefault("type", "ClusterIP")
    if spec.setdefault("sessionAffinity", "None") == "ClientIP":
        config = spec.setdefault("sessionAffinityConfig", {})
        config.setdefault("clientIP", {}).setdefault("timeoutSeconds", 10800)
    else:
        spec.pop("sessionAffinityConfig", None)
    for port in tree.mappings(spec, "ports"):
        port.setdefault("protocol", "TCP")
        port.setdefault("targetPort", port.get("port"))
    if kind != "ExternalName":
        spec.setdefault("internalTrafficPolicy", "Cluster")
    if kind in ("NodePort", "LoadBalancer") or (kind == "ClusterIP" and spec.get("externalIPs")):
        spec.setdefault("externalTrafficPolicy", "Cluster")
    if kind == "LoadBalancer":
        spec.setdefault("allocateLoadBalancerNodePorts", True)
    service.setdefault("status", {}).setdefault("loadBalancer", {})


def _network_policy(policy: Json) -> None:
    spec = policy.setdefault("spec", {})
    spec.setdefault("podSelector", {})
    if not spec.get("policyTypes"):
        spec["policyTypes"] = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]
    for rule in [*tree.mappings(spec, "ingress"), *tree.mappings(spec, "egress")]:
        _protocols(rule.get("ports"))


def _endpoint_slice(piece: Json) -> None:
    for port in tree.mappings(piece, "ports"):
        port.setdefault("name", "")
        port.setdefault("protocol", "TCP")


def _endpoints(endpoints: Json) -> None:
    for subset in tree.mappings(endpoints, "subsets"):
        _protocols(subset.get("ports"))


def _namespace(namespace: Json) -> None:
    metadata = namespace["metadata"]
    labels = tree.mapping(metadata, "labels")
    if metadata.get("name"):
        metadata["labels"] = {**labels, "kubernetes.io/metadata.name": metadata["name"]}
    namespace.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
    namespace.setdefault("status", {}).setdefault("phase", "Active")


def _node(node: Json) -> None:
    metadata = node["metadata"]
    if metadata.get("name"):
        labels = tree.mapping(metadata, "labels")
        metadata["labels"] = {"kubernetes.io/hostname": metadata["name"], **labels}
    node.setdefault("spec", {})
    node.setdefault("status", {})


def _secret(secret: Json) -> None:
    secret.setdefault("type", "Opaque")


DEFAULTS: dict[str, Callable[[Json], None]] = {
    "Pod": _pod,
    "Service": _service,
    "Namespace": _namespace,
    "Node": _node,
    "Secret": _secret,
    "Endpoints": _endpoints,
    "EndpointSlice": _endpoint_slice,
    "NetworkPolicy": _network_policy,
    "Deployment": _deployment,
    "ReplicaSet": _replicas,
    "ReplicationController": _replicas,
    "StatefulSet": _stateful_set,
    "DaemonSet": _daemon_set,
    "Job": _job,
    "CronJob": _cron_job,
}
