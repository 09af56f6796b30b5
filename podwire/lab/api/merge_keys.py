"""How lists of the built-in kinds merge: by which keys, as sets, or (not listed here) as a whole.

The keys are those of server-side apply (`x-kubernetes-list-map-keys`); strategic merge uses the
first of them (`x-kubernetes-patch-merge-key`). Source: the field tags in k8s.io/api.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ListMap:
    """A list whose items are told apart by `keys`."""

    keys: tuple[str, ...]
    item: Schema


@dataclass(frozen=True, slots=True)
class Set:
    """A list of plain values without order or repetition."""


Schema: TypeAlias = "dict[str, Schema | ListMap | Set]"

NOTHING: Schema = {}


def _by(*keys: str, item: Schema | None = None) -> ListMap:
    return ListMap(keys, item or {})


_METADATA: Schema = {"ownerReferences": _by("uid"), "finalizers": Set()}
_CONDITIONS: Schema = {"conditions": _by("type")}
_CONTAINER: Schema = {
    "ports": _by("containerPort", "protocol"),
    "env": _by("name"),
    "volumeMounts": _by("mountPath"),
    "volumeDevices": _by("devicePath"),
}
_POD_SPEC: Schema = {
    "containers": _by("name", item=_CONTAINER),
    "initContainers": _by("name", item=_CONTAINER),
    "ephemeralContainers": _by("name", item=_CONTAINER),
    "volumes": _by("name"),
    "imagePullSecrets": _by("name"),
    "hostAliases": _by("ip"),
    "topologySpreadConstraints": _by("topologyKey", "whenUnsatisfiable"),
    "resourceClaims": _by("name"),
    "schedulingGates": _by("name"),
}
_TEMPLATE: Schema = {"metadata": _METADATA, "spec": _POD_SPEC}
_WORKLOAD: Schema = {"spec": {"template": _TEMPLATE}, "status": _CONDITIONS}
_WEBHOOKS: Schema = {"webhooks": _by("name")}

_SCHEMAS: dict[str, Schema] = {
    "Pod": {"spec": _POD_SPEC, "status": {**_CONDITIONS, "podIPs": _by("ip")}},
    "Service": {"spec": {"ports": _by("port", "protocol")}, "status": _CONDITIONS},
    "Node": {
        "spec": {"podCIDRs": Set()},
        "status": {**_CONDITIONS, "addresses": _by("type")},
    },
    "Namespace": {"status": _CONDITIONS},
    "ServiceAccount": {"secrets": _by("name"), "imagePullSecrets": _by("name")},
    "PodTemplate": {"template": _TEMPLATE},
    "Deployment": _WORKLOAD,
    "ReplicaSet": _WORKLOAD,
    "ReplicationController": _WORKLOAD,
    "StatefulSet": _WORKLOAD,
    "DaemonSet": _WORKLOAD,
    "Job": _WORKLOAD,
    "CronJob": {"spec": {"jobTemplate": {"spec": {"template": _TEMPLATE}}}},
    "ValidatingWebhookConfiguration": _WEBHOOKS,
    "MutatingWebhookConfiguration": _WEBHOOKS,
}


def schema_of(kind: str, *, builtin: bool) -> Schema:
    """The merge schema of a kind; custom kinds only know the metadata's lists."""
    return {"metadata": _METADATA, **(_SCHEMAS.get(kind, NOTHING) if builtin else NOTHING)}
