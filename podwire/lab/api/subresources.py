"""Subresources other than status: scale, binding, eviction, finalize, and those we refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api import patch as patches
from podwire.lab.api import status as errors
from podwire.lab.api.registry import JSON_PATCH, Registry, clone
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.status import StatusError
from podwire.lab.api.storage import Record


class Call(NamedTuple):
    """A request for the subresource of one object; `body` is decoded, None where there is none."""

    registry: Registry
    method: str
    resource: ApiResource
    namespace: str
    name: str
    body: Any
    content_type: str

    def record(self) -> Record:
        """The object. Raises StatusError (404)."""
        return self.registry.get(self.resource, self.namespace, self.name)

    def update(self, obj: Json) -> Record:
        return self.registry.update(self.resource, self.namespace, obj)


Handler: TypeAlias = Callable[[Call], tuple[int, Json]]
"""Returns the HTTP status and the answer. Raises StatusError."""

_SUCCESS: Json = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}


def _scale(call: Call) -> tuple[int, Json]:
    if not call.resource.has_scale:
        raise errors.no_such_path()
    record = call.record()
    scale, body = _scale_of(record), call.body
    if call.method == "GET":
        return 200, scale
    if call.method == "PATCH":
        patch = patches.json_patch if call.content_type == JSON_PATCH else patches.merge_patch
        body = patch(scale, body)
    version = body.get("metadata", {}).get("resourceVersion")
    if version and version != record.obj["metadata"]["resourceVersion"]:
        raise errors.conflict(call.resource, call.name)
    new = clone(record.obj)
    new.setdefault("spec", {})["replicas"] = int(tree.value(body, "spec", "replicas") or 0)
    return 200, _scale_of(call.update(new))


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


def _binding(call: Call) -> tuple[int, Json]:
    pod = call.record()
    node = tree.text(call.body or {}, "target", "name")
    if not node:
        raise errors.bad_request("a binding names a node in target.name")
    if tree.text(pod.obj, "spec", "nodeName"):
        why = f"pod {call.name} is already assigned to node {pod.obj['spec']['nodeName']!r}"
        raise errors.conflict(call.resource, call.name, why)
    call.update(clone({**pod.obj, "spec": {**pod.obj["spec"], "nodeName": node}}))
    return 201, _SUCCESS


def _eviction(call: Call) -> tuple[int, Json]:
    call.registry.delete(call.resource, call.namespace, call.name)
    return 201, _SUCCESS


def _finalize(call: Call) -> tuple[int, Json]:
    if call.resource != call.registry.namespaces or call.method != "PUT":
        raise errors.no_such_path()
    return 200, call.update(call.body).obj


def _refused(call: Call) -> tuple[int, Json]:
    call.record()
    raise StatusError(
        501,
        "NotImplemented",
        f"the lab's API server does not reach into pods; use `podwire lab logs {call.name}` or "
        f"`podwire lab exec {call.name} -- COMMAND`",
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
