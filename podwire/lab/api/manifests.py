"""Whole lists of manifests at once: what `podwire lab apply` and `delete` send."""

from __future__ import annotations

from podwire.errors import PodwireError
from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.registry import APPLY_PATCH, DeleteOptions, Registry
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.status import StatusError, bad_request

_MANAGER = "podwire-lab"
_FIRST = ("Namespace", "CustomResourceDefinition")


def apply_all(registry: Registry, objects: list[Json]) -> list[Json]:
    """Apply each object; one result each, in the given order.

    A result has kind, namespace, name, `verb` (created, configured, unchanged, failed), `known`
    (false: a kind that nobody defined; it is kept as it is) and, when failed, `error`. Namespaces
    and definitions go first whatever their place; a namespace that does not exist is not made.
    """
    order = sorted(range(len(objects)), key=lambda i: objects[i].get("kind") not in _FIRST)
    results: dict[int, Json] = {i: _apply(registry, objects[i]) for i in order}
    return [results[i] for i in range(len(objects))]


def _apply(registry: Registry, obj: Json) -> Json:
    result = _result(obj)
    try:
        resource, known = _resource(registry, obj, learn=True)
        namespace = _namespace(resource, obj)
        name = str(obj["metadata"].get("name") or "")
        if not name:
            record = registry.create(resource, namespace, obj)
            return {**result, "name": record.key[1], "verb": "created", "known": known}
        before = registry.find(resource, namespace, name)
        record, created = registry.patch(
            resource, namespace, name, obj, APPLY_PATCH, manager=_MANAGER
        )
    except PodwireError as error:
        return {**result, "verb": "failed", "known": True, "error": str(error)}
    verb = "created" if created else "unchanged" if record is before else "configured"
    return {**result, "namespace": namespace, "verb": verb, "known": known}


def delete_all(registry: Registry, objects: list[Json]) -> list[Json]:
    """Delete each object, the last first; results as `apply_all` with deleted or absent."""
    results = [_delete(registry, obj) for obj in reversed(objects)]
    return results[::-1]


def _delete(registry: Registry, obj: Json) -> Json:
    result = _result(obj)
    try:
        resource, known = _resource(registry, obj, learn=False)
        namespace = _namespace(resource, obj)
        registry.delete(resource, namespace, str(obj["metadata"].get("name")), DeleteOptions())
    except StatusError as error:
        if error.status == 404:
            return {**result, "verb": "absent", "known": True}
        return {**result, "verb": "failed", "known": True, "error": str(error)}
    return {**result, "namespace": namespace, "verb": "deleted", "known": known}


def _result(obj: Json) -> Json:
    metadata = tree.mapping(obj, "metadata")
    return {
        "kind": str(obj.get("kind", "")),
        "apiVersion": str(obj.get("apiVersion", "")),
        "namespace": metadata.get("namespace", ""),
        "name": metadata.get("name", ""),
    }


def _resource(registry: Registry, obj: Json, *, learn: bool) -> tuple[ApiResource, bool]:
    kind, version = obj.get("kind"), obj.get("apiVersion")
    if not isinstance(kind, str) or not isinstance(version, str) or not kind or not version:
        raise bad_request("a manifest needs apiVersion and kind")
    if not isinstance(obj.get("metadata"), dict):
        raise bad_request(f"{kind}: metadata is missing")
    resource = registry.catalogue.of(version, kind)
    if resource is not None:
        return resource, not registry.catalogue.is_learned(resource)
    if not learn:
        raise StatusError(404, "NotFound", f'no matches for kind "{kind}" in version "{version}"')
    return registry.catalogue.learn(obj), False


def _namespace(resource: ApiResource, obj: Json) -> str:
    if not resource.namespaced:
        return ""
    return str(obj["metadata"].get("namespace") or "default")
