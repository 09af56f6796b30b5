"""Subresources other than status: scale, binding, eviction, finalize, and those we refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api import patch as patches
from podwire.lab.api import status as errors
from podwire.lab.api.registry import JSON_PATCH, Registry, clone
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.status import StatusError
from podwire.lab.api.storage import Record

Handler: TypeAlias = Callable[[Registry, str, ApiResource, str, str, Any, str], tuple[int, Json]]

_SUCCESS: Json = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}


def _scale(
    registry: Registry,
    method: str,
    resource: ApiResource,
    namespace: str,
    name: str,
    body: Any,
    content_type: str,
) -> tuple[int, Json]:
    if not resource.has_scale:
        raise errors.no_such_path()
    record = registry.get(resource, namespace, name)
    scale = _scale_of(record)
    if method == "GET":
        return 200, scale
    if method == "PATCH":
        patch = patches.json_patch if content_type == JSON_PATCH else patches.merge_patch
        body = patch(scale, body)
    if body.get("metadata", {}).get("resourceVersion") not in (
        None,
        "",
        record.obj["metadata"]["resourceVersion"],
    ):
        raise errors.conflict(resource, name)
    new = clone(record.obj)
    new.setdefault("spec", {})["replicas"] = int(tree.value(body, "spec", "replicas") or 0)
    return 200, _scale_of(registry.update(resource, namespace, new))


def _scale_of(record: Record) -> Json:
    obj = record.obj
    metadata = obj["metadata"]
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    labels = tree.mapping(obj, "spec", "selector", "matchLabels")
    selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {key: metadata[key] for key in kept if key in metadata},
        "spec": {"replicas": tree.value(obj, "spec", "replicas") or 0},
        "status": {
            "replicas": tree.value(obj, "status", "replicas") or 0,
            "selector": selector,
        },
    }


def _binding(
    registry: Registry,
    method: str,
    resource: ApiResource,
    namespace: str,
    name: str,
    body: Any,
    content_type: str,
) -> tuple[int, Json]:
    pod = registry.get(resource, namespace, name)
    node = tree.text(body or {}, "target", "name")
    if not node:
        raise errors.bad_request("a binding names a node in target.name")
    if tree.text(pod.obj, "spec", "nodeName"):
        why = f"pod {name} is already assigned to node {pod.obj['spec']['nodeName']!r}"
        raise errors.conflict(resource, name, why)
    new = {**pod.obj, "spec": {**pod.obj["spec"], "nodeName": node}}
    registry.update(resource, namespace, clone(new))
    return 201, _SUCCESS


def _eviction(
    registry: Registry,
    method: str,
    resource: ApiResource,
    namespace: str,
    name: str,
    body: Any,
    content_type: str,
) -> tuple[int, Json]:
    registry.delete(resource, namespace, name)
    return 201, _SUCCESS


def _finalize(
    registry: Registry,
    method: str,
    resource: ApiResource,
    namespace: str,
    name: str,
    body: Any,
    content_type: str,
) -> tuple[int, Json]:
    if resource != registry.namespaces or method != "PUT":
        raise errors.no_such_path()
    return 200, registry.update(resource, "", body).obj


def _refused(
    registry: Registry,
    method: str,
    resource: ApiResource,
    namespace: str,
    name: str,
    body: Any,
    content_type: str,
) -> tuple[int, Json]:
    registry.get(resource, namespace, name)
    raise StatusError(
        501,
        "NotImplemented",
        f"the lab's API server does not reach into pods; use `podwire lab logs {name}` or "
        f"`podwire lab exec {name} -- COMMAND`",
    )


SUBRESOURCES: dict[str, Handler] = {
    "scale": _scale,
    "binding": _binding,
    "eviction": _eviction,
    "finalize": _finalize,
    "log": _refused,
    "exec": _refused,
    "attach": _refused,
    "portforward": _refused,
    "proxy": _refused,
}
