"""What clients ask before they start: groups, resources, version, health, OpenAPI.

kubectl up to 1.2x asks for /openapi/v2 in protobuf only and, without it, refuses to apply; newer
ones ask for /openapi/v3. Both are served without schemas for the built-in kinds: kubectl then
merges by the types compiled into it, which are the right ones, and leaves judging to the server.
"""

from __future__ import annotations

from collections.abc import Iterable

from podwire.kube.objects import Json
from podwire.lab.api.resources import ApiResource, Catalogue
from podwire.lab.api.storage import encode

VERSION: Json = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.0-podwire",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "",
    "compiler": "python",
    "platform": "linux/amd64",
}
_JSON = "application/json"
# clients ask for …spec.v2@v1.0…, which is no valid media type to answer with
_PROTOBUF = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]


class Discovery:
    """Answers for everything under no resource: `answer` gives content type and body."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def answer(self, parts: list[str], accept: str) -> tuple[str, bytes] | None:
        """None when there is nothing at this path."""
        match parts:
            case [""]:
                return _JSON, encode({"paths": ["/api", "/apis", "/healthz", "/version"]})
            case ["healthz" | "livez" | "readyz", *_]:
                return "text/plain", b"ok"
            case ["version"]:
                return _JSON, encode(VERSION)
            case ["openapi", "v2"]:
                return self._openapi_v2(accept)
            case ["openapi", "v3", *rest]:
                found = self._openapi_v3(rest)
            case ["api"]:
                found = {"kind": "APIVersions", "versions": ["v1"]}
            case ["api", "v1"]:
                found = self._resources("", "v1")
            case ["apis"]:
                groups = [self._group(name) for name in self._catalogue.groups()]
                found = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
            case ["apis", group] if group in self._catalogue.groups():
                found = {"kind": "APIGroup", "apiVersion": "v1", **self._group(group)}
            case ["apis", group, version]:
                found = self._resources(group, version)
            case _:
                return None
        return None if found is None else (_JSON, encode(found))

    def _group(self, name: str) -> Json:
        versions = [
            {"groupVersion": f"{name}/{version}", "version": version}
            for version in self._catalogue.groups()[name]
        ]
        return {"name": name, "versions": versions, "preferredVersion": versions[0]}

    def _resources(self, group: str, version: str) -> Json | None:
        found = [r for r in self._catalogue if (r.group, r.version) == (group, version)]
        if not found:
            return None
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": f"{group}/{version}" if group else version,
            "resources": [entry for resource in found for entry in _entries(resource)],
        }

    # --- OpenAPI ---------------------------------------------------------------------------------

    def _openapi_v2(self, accept: str) -> tuple[str, bytes]:
        info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
        if "protobuf" not in accept or accept.startswith(_JSON):
            return _JSON, encode({"swagger": "2.0", "info": info, "paths": {}, "definitions": {}})
        # gnostic's Document: swagger = 1, info = 2 (title = 1, version = 2), paths = 8
        titled = _field(1, info["title"].encode()) + _field(2, info["version"].encode())
        return _PROTOBUF, _field(1, b"2.0") + _field(2, titled) + _field(8, b"")

    def _openapi_v3(self, parts: list[str]) -> Json | None:
        if not parts:
            versions = {(r.group, r.version) for r in self._catalogue}
            paths = [f"apis/{g}/{v}" if g else f"api/{v}" for g, v in sorted(versions)]
            return {"paths": {path: {"serverRelativeURL": f"/openapi/v3/{path}"} for path in paths}}
        group, version = (
            (parts[1], parts[2]) if parts[0] == "apis" and len(parts) > 2 else ("", "v1")
        )
        found = [r for r in self._catalogue if (r.group, r.version) == (group, version)]
        if not found:
            return None
        return {
            "openapi": "3.0.0",
            "info": {"title": "Kubernetes", "version": VERSION["gitVersion"]},
            "paths": dict(map(_path, found)),
            "components": {"schemas": dict(map(_schema, found))},
        }


def _entries(resource: ApiResource) -> Iterable[Json]:
    entry: Json = {
        "name": resource.plural,
        "singularName": resource.kind.lower(),
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": _VERBS,
    }
    if resource.short_names:
        entry["shortNames"] = list(resource.short_names)
    if resource.categories:
        entry["categories"] = list(resource.categories)
    yield entry
    for name, kind, given in (
        ("status", resource.kind, resource.has_status),
        ("scale", "Scale", resource.has_scale),
    ):
        if given:
            below: Json = {
                "name": f"{resource.plural}/{name}",
                "singularName": "",
                "namespaced": resource.namespaced,
                "kind": kind,
                "verbs": ["get", "patch", "update"],
            }
            if name == "scale":
                below.update(group="autoscaling", version="v1")
            yield below


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited protobuf field of at most 127 bytes."""
    return bytes([number << 3 | 2, len(value)]) + value


def _schema_name(resource: ApiResource) -> str:
    group = ".".join(reversed(resource.group.split("."))) if resource.group else "core"
    return f"podwire.{group}.{resource.version}.{resource.kind}"


def _schema(resource: ApiResource) -> tuple[str, Json]:
    """The outline that `kubectl explain` shows: what every object has."""
    anything: Json = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    properties: Json = {
        "apiVersion": {"type": "string", "description": f"Always {resource.api_version}."},
        "kind": {"type": "string", "description": f"Always {resource.kind}."},
        "metadata": {"description": "Name, labels, owners and versions.", **anything},
        "spec": {"description": "What is wanted.", **anything},
    }
    if resource.has_status:
        properties["status"] = {"description": "What was found.", **anything}
    return _schema_name(resource), {
        "type": "object",
        "description": f"{resource.kind} as the lab stores it.",
        "properties": properties,
        "x-kubernetes-group-version-kind": [_kind(resource)],
    }


def _kind(resource: ApiResource) -> Json:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _path(resource: ApiResource) -> tuple[str, Json]:
    base = f"/apis/{resource.group}" if resource.group else "/api"
    home = "/namespaces/{namespace}" if resource.namespaced else ""
    schema = {"$ref": f"#/components/schemas/{_schema_name(resource)}"}
    answer = {"description": "OK", "content": {_JSON: {"schema": schema}}}
    return f"{base}/{resource.version}{home}/{resource.plural}/{{name}}", {
        "get": {
            "responses": {"200": answer},
            "x-kubernetes-action": "get",
            "x-kubernetes-group-version-kind": _kind(resource),
        }
    }
