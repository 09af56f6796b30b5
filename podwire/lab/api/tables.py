"""Objects as the rows that `kubectl get` prints.

Source: pkg/printers/internalversion/printers.go of Kubernetes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeAlias

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.resources import ApiResource

Row: TypeAlias = Callable[[Json, datetime], list[Any]]


class Columns(NamedTuple):
    """Column names; those after `wide` only show with ``-o wide``."""

    names: Sequence[str]
    wide: Sequence[str]
    row: Row


def table(resource: ApiResource, objects: list[Json], now: datetime, metadata: Json) -> Json:
    """A meta.k8s.io/v1 Table of objects; each row carries its object's metadata."""
    columns = _COLUMNS.get(resource.kind, _DEFAULT) if resource.builtin else _DEFAULT
    names = [(name, 0) for name in columns.names] + [(name, 1) for name in columns.wide]
    kept = ("resourceVersion", "continue", "remainingItemCount")
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {key: metadata[key] for key in kept if key in metadata},
        "columnDefinitions": [
            {
                "name": name,
                "type": "string",
                "format": "name" if name == "Name" else "",
                "description": "",
                "priority": priority,
            }
            for name, priority in names
        ],
        "rows": [
            {
                "cells": columns.row(obj, now),
                "object": {
                    "kind": "PartialObjectMetadata",
                    "apiVersion": "meta.k8s.io/v1",
                    "metadata": obj["metadata"],
                },
            }
            for obj in objects
        ],
    }


# --- cells ---------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """As kubectl writes ages: ``42s``, ``3m20s``, ``5h``, ``2d3h``."""
    total = int(seconds)
    if total < -1:
        return "<invalid>"
    total = max(total, 0)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if total < 120:
        return f"{total}s"
    if minutes < 10:
        return f"{minutes}m{total % 60}s" if total % 60 else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"
    if days < 730:
        return f"{days}d"
    return f"{days // 365}y{days % 365}d" if days < 2920 else f"{days // 365}y"


def _since(time: str, now: datetime) -> str:
    if not time:
        return "<unknown>"
    then = datetime.strptime(time[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
    return duration((now - then).total_seconds())


def _age(obj: Json, now: datetime) -> str:
    return _since(tree.text(obj, "metadata", "creationTimestamp"), now)


def _name(obj: Json) -> str:
    return obj["metadata"]["name"]


def _count(obj: Json, *path: str) -> int:
    return tree.value(obj, *path) or 0


def _joined(items: Sequence[str], none: str = "<none>") -> str:
    return ",".join(items) or none


def _labels(labels: Json) -> str:
    return _joined([f"{key}={value}" for key, value in sorted(labels.items())])


def _selector(selector: Json) -> str:
    terms = [
        f"{key}={value}" for key, value in sorted(tree.mapping(selector, "matchLabels").items())
    ]
    for term in tree.mappings(selector, "matchExpressions"):
        key, values = term["key"], ",".join(tree.texts(term, "values"))
        terms.append(
            {
                "In": f"{key} in ({values})",
                "NotIn": f"{key} notin ({values})",
                "Exists": key,
                "DoesNotExist": f"!{key}",
            }.get(term["operator"], key)
        )
    return _joined(terms)


def _containers(obj: Json, *path: str) -> list[str]:
    containers = tree.mappings(obj, *path, "spec", "containers")
    return [
        _joined([c.get("name", "") for c in containers]),
        _joined([c.get("image", "") for c in containers]),
    ]


def _pod_status(pod: Json) -> tuple[int, int, int, str]:
    """Ready containers, containers, restarts and the word in the STATUS column."""
    statuses = tree.mappings(pod, "status", "containerStatuses")
    reason = tree.text(pod, "status", "reason") or tree.text(pod, "status", "phase")
    for status in reversed(statuses):
        waiting = tree.text(status, "state", "waiting", "reason")
        ended = tree.text(status, "state", "terminated", "reason")
        reason = waiting or ended or reason
    if tree.value(pod, "metadata", "deletionTimestamp"):
        reason = "Terminating"
    ready = sum(1 for status in statuses if status.get("ready"))
    restarts = sum(status.get("restartCount", 0) for status in statuses)
    return ready, len(tree.mappings(pod, "spec", "containers")), restarts, reason


def _pod(pod: Json, now: datetime) -> list[Any]:
    ready, total, restarts, reason = _pod_status(pod)
    ips = [one.get("ip", "") for one in tree.mappings(pod, "status", "podIPs")]
    gates = tree.mappings(pod, "spec", "readinessGates")
    met = {
        one.get("type")
        for one in tree.mappings(pod, "status", "conditions")
        if one.get("status") == "True"
    }
    passed = sum(1 for gate in gates if gate.get("conditionType") in met)
    return [
        _name(pod),
        f"{ready}/{total}",
        reason,
        str(restarts),
        _age(pod, now),
        ips[0] if ips else tree.text(pod, "status", "podIP") or "<none>",
        tree.text(pod, "spec", "nodeName") or "<none>",
        tree.text(pod, "status", "nominatedNodeName") or "<none>",
        f"{passed}/{len(gates)}" if gates else "<none>",
    ]


def _service(service: Json, now: datetime) -> list[Any]:
    spec = tree.mapping(service, "spec")
    kind = tree.text(spec, "type")
    ports = [
        f"{port['port']}:{port['nodePort']}/{port.get('protocol', 'TCP')}"
        if port.get("nodePort")
        else f"{port.get('port')}/{port.get('protocol', 'TCP')}"
        for port in tree.mappings(spec, "ports")
    ]
    return [
        _name(service),
        kind,
        tree.text(spec, "clusterIP") or "<none>",
        _external(service, kind),
        _joined(ports),
        _age(service, now),
        _labels(tree.mapping(spec, "selector")),
    ]


def _external(service: Json, kind: str) -> str:
    given = tree.texts(service, "spec", "externalIPs")
    if kind == "ExternalName":
        return tree.text(service, "spec", "externalName")
    if kind != "LoadBalancer":
        return _joined(given)
    ingress = tree.mappings(service, "status", "loadBalancer", "ingress")
    found = [one.get("ip") or one.get("hostname") or "" for one in ingress]
    return _joined([*found, *given], "<pending>")


def _node(node: Json, now: datetime) -> list[Any]:
    conditions = {c.get("type"): c for c in tree.mappings(node, "status", "conditions")}
    ready = conditions.get("Ready", {}).get("status")
    status = {"True": "Ready", "False": "NotReady"}.get(ready or "", "Unknown")
    if tree.value(node, "spec", "unschedulable"):
        status += ",SchedulingDisabled"
    prefix = "node-role.kubernetes.io/"
    roles = [
        key.removeprefix(prefix)
        for key in sorted(tree.mapping(node, "metadata", "labels"))
        if key.startswith(prefix)
    ]
    addresses = {
        a.get("type"): a.get("address") for a in tree.mappings(node, "status", "addresses")
    }
    info = tree.mapping(node, "status", "nodeInfo")
    return [
        _name(node),
        status,
        _joined(roles),
        _age(node, now),
        info.get("kubeletVersion", ""),
        addresses.get("InternalIP") or "<none>",
        addresses.get("ExternalIP") or "<none>",
        info.get("osImage") or "<unknown>",
        info.get("kernelVersion") or "<unknown>",
        info.get("containerRuntimeVersion") or "<unknown>",
    ]


def _deployment(obj: Json, now: datetime) -> list[Any]:
    return [
        _name(obj),
        f"{_count(obj, 'status', 'readyReplicas')}/{_count(obj, 'spec', 'replicas')}",
        str(_count(obj, "status", "updatedReplicas")),
        str(_count(obj, "status", "availableReplicas")),
        _age(obj, now),
        *_containers(obj, "spec", "template"),
        _selector(tree.mapping(obj, "spec", "selector")),
    ]


def _replica_set(obj: Json, now: datetime) -> list[Any]:
    return [
        _name(obj),
        str(_count(obj, "spec", "replicas")),
        str(_count(obj, "status", "replicas")),
        str(_count(obj, "status", "readyReplicas")),
        _age(obj, now),
        *_containers(obj, "spec", "template"),
        _selector(tree.mapping(obj, "spec", "selector")),
    ]


def _stateful_set(obj: Json, now: datetime) -> list[Any]:
    return [
        _name(obj),
        f"{_count(obj, 'status', 'readyReplicas')}/{_count(obj, 'spec', 'replicas')}",
        _age(obj, now),
        *_containers(obj, "spec", "template"),
    ]


def _daemon_set(obj: Json, now: datetime) -> list[Any]:
    counts = (
        "desiredNumberScheduled",
        "currentNumberScheduled",
        "numberReady",
        "updatedNumberScheduled",
        "numberAvailable",
    )
    return [
        _name(obj),
        *(str(_count(obj, "status", name)) for name in counts),
        _labels(tree.mapping(obj, "spec", "template", "spec", "nodeSelector")),
        _age(obj, now),
        *_containers(obj, "spec", "template"),
        _selector(tree.mapping(obj, "spec", "selector")),
    ]


def _job(obj: Json, now: datetime) -> list[Any]:
    done = {
        c.get("type")
        for c in tree.mappings(obj, "status", "conditions")
        if c.get("status") == "True"
    }
    status = "Complete" if "Complete" in done else "Failed" if "Failed" in done else "Running"
    return [
        _name(obj),
        status,
        f"{_count(obj, 'status', 'succeeded')}/{_count(obj, 'spec', 'completions')}",
        _age(obj, now),
        *_containers(obj, "spec", "template"),
    ]


def _cron_job(obj: Json, now: datetime) -> list[Any]:
    last = tree.text(obj, "status", "lastScheduleTime")
    return [
        _name(obj),
        tree.text(obj, "spec", "schedule"),
        str(bool(tree.value(obj, "spec", "suspend"))),
        str(len(tree.mappings(obj, "status", "active"))),
        _since(last, now) if last else "<none>",
        _age(obj, now),
    ]


def _namespace(obj: Json, now: datetime) -> list[Any]:
    return [_name(obj), tree.text(obj, "status", "phase"), _age(obj, now)]


def _endpoint_slice(obj: Json, now: datetime) -> list[Any]:
    ports = [str(port.get("port", "*")) for port in tree.mappings(obj, "ports")]
    addresses = [a for e in tree.mappings(obj, "endpoints") for a in tree.texts(e, "addresses")]
    shown = _joined(addresses[:3], "<unset>")
    if len(addresses) > 3:
        shown += f" + {len(addresses) - 3} more..."
    family = tree.text(obj, "addressType")
    return [_name(obj), family, _joined(ports, "<unset>"), shown, _age(obj, now)]


def _network_policy(obj: Json, now: datetime) -> list[Any]:
    return [_name(obj), _selector(tree.mapping(obj, "spec", "podSelector")), _age(obj, now)]


def _data(obj: Json, now: datetime) -> list[Any]:
    size = len(tree.mapping(obj, "data")) + len(tree.mapping(obj, "binaryData"))
    return [_name(obj), str(size), _age(obj, now)]


def _secret(obj: Json, now: datetime) -> list[Any]:
    name, size, age = _data(obj, now)
    return [name, tree.text(obj, "type"), size, age]


def _service_account(obj: Json, now: datetime) -> list[Any]:
    return [_name(obj), str(len(tree.mappings(obj, "secrets"))), _age(obj, now)]


def _event(obj: Json, now: datetime) -> list[Any]:
    about = tree.mapping(obj, "involvedObject")
    seen = tree.text(obj, "lastTimestamp") or tree.text(obj, "metadata", "creationTimestamp")
    return [
        _since(seen, now),
        tree.text(obj, "type"),
        tree.text(obj, "reason"),
        f"{str(about.get('kind', '')).lower()}/{about.get('name', '')}",
        tree.text(obj, "message"),
        _name(obj),
    ]


def _plain(obj: Json, now: datetime) -> list[Any]:
    return [_name(obj), _age(obj, now)]


_DEFAULT = Columns(("Name", "Age"), (), _plain)
_OF_TEMPLATE = ("Containers", "Images")
_COLUMNS: dict[str, Columns] = {
    "Pod": Columns(
        ("Name", "Ready", "Status", "Restarts", "Age"),
        ("IP", "Node", "Nominated Node", "Readiness Gates"),
        _pod,
    ),
    "Service": Columns(
        ("Name", "Type", "Cluster-IP", "External-IP", "Port(s)", "Age"), ("Selector",), _service
    ),
    "Node": Columns(
        ("Name", "Status", "Roles", "Age", "Version"),
        ("Internal-IP", "External-IP", "OS-Image", "Kernel-Version", "Container-Runtime"),
        _node,
    ),
    "Deployment": Columns(
        ("Name", "Ready", "Up-to-date", "Available", "Age"),
        (*_OF_TEMPLATE, "Selector"),
        _deployment,
    ),
    "ReplicaSet": Columns(
        ("Name", "Desired", "Current", "Ready", "Age"), (*_OF_TEMPLATE, "Selector"), _replica_set
    ),
    "StatefulSet": Columns(("Name", "Ready", "Age"), _OF_TEMPLATE, _stateful_set),
    "DaemonSet": Columns(
        (
            "Name",
            "Desired",
            "Current",
            "Ready",
            "Up-to-date",
            "Available",
            "Node Selector",
            "Age",
        ),
        (*_OF_TEMPLATE, "Selector"),
        _daemon_set,
    ),
    "Job": Columns(("Name", "Status", "Completions", "Age"), _OF_TEMPLATE, _job),
    "CronJob": Columns(
        ("Name", "Schedule", "Suspend", "Active", "Last Schedule", "Age"), (), _cron_job
    ),
    "Namespace": Columns(("Name", "Status", "Age"), (), _namespace),
    "EndpointSlice": Columns(
        ("Name", "AddressType", "Ports", "Endpoints", "Age"), (), _endpoint_slice
    ),
    "NetworkPolicy": Columns(("Name", "Pod-Selector", "Age"), (), _network_policy),
    "ConfigMap": Columns(("Name", "Data", "Age"), (), _data),
    "Secret": Columns(("Name", "Type", "Data", "Age"), (), _secret),
    "ServiceAccount": Columns(("Name", "Secrets", "Age"), (), _service_account),
    "Event": Columns(("Last Seen", "Type", "Reason", "Object", "Message"), ("Name",), _event),
}
