"""OpenAPI documents: as much as kubectl needs to do its work.

kubectl up to 1.23 asks for /openapi/v2 in protobuf only: without it it will not apply, and without
a `dryRun` parameter there it refuses --dry-run=server. Newer ones ask for /openapi/v3. There are no
schemas for merging in either: kubectl then merges by the types compiled into it, which are the
right ones, and leaves judging to the server.
"""

from __future__ import annotations

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
_GVK = "x-kubernetes-group-version-kind"


# --- version 2 -----------------------------------------------------------------------------------


def version_2(catalogue: Catalogue, accept: str) -> tuple[str, bytes]:
    """Content type and body."""
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    if "protobuf" in accept and not accept.startswith(_JSON):
        return _PROTOBUF, _document(info, catalogue)
    parameter = {"name": "dryRun", "in": "query", "type": "string"}
    paths = {
        _path_of(resource): {"patch": {"parameters": [parameter], _GVK: _kind(resource)}}
        for resource in catalogue
    }
    document = {"swagger": "2.0", "info": info, "paths": paths, "definitions": {}}
    return _JSON, encode(document)


def _document(info: dict[str, str], catalogue: Catalogue) -> bytes:
    """gnostic's openapi.v2.Document; the field numbers are those of its OpenAPIv2.proto."""
    titled = _field(1, info["title"].encode()) + _field(2, info["version"].encode())
    paths = b"".join(_field(2, _named_path(resource)) for resource in catalogue)
    return _field(1, b"2.0") + _field(2, titled) + _field(8, paths)


def _named_path(resource: ApiResource) -> bytes:
    parameter = _field(2, b"query") + _field(4, b"dryRun") + _field(6, b"string")
    # ParametersItem.parameter → Parameter.non_body_parameter → .query_parameter_sub_schema
    item = _field(1, _field(2, _field(3, parameter)))
    extension = _field(1, _GVK.encode()) + _field(2, _field(2, encode(_kind(resource))))
    operation = _field(8, item) + _field(13, extension)
    return _field(1, _path_of(resource).encode()) + _field(2, _field(8, operation))


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, length = b"", len(value)
    while length > 127:
        size += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + value


# --- version 3 -----------------------------------------------------------------------------------


def version_3(catalogue: Catalogue, parts: list[str]) -> Json | None:
    """The index of documents, or one of them; None when there is none such."""
    if not parts:
        versions = {(r.group, r.version) for r in catalogue}
        paths = [f"apis/{g}/{v}" if g else f"api/{v}" for g, v in sorted(versions)]
        return {"paths": {path: {"serverRelativeURL": f"/openapi/v3/{path}"} for path in paths}}
    group, version = (parts[1], parts[2]) if parts[0] == "apis" and len(parts) > 2 else ("", "v1")
    found = [r for r in catalogue if (r.group, r.version) == (group, version)]
    if not found:
        return None
    return {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": VERSION["gitVersion"]},
        "paths": dict(map(_path, found)),
        "components": {"schemas": dict(map(_schema, found))},
    }


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
        _GVK: [_kind(resource)],
    }


def _kind(resource: ApiResource) -> Json:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _path_of(resource: ApiResource) -> str:
    base = f"/apis/{resource.group}" if resource.group else "/api"
    home = "/namespaces/{namespace}" if resource.namespaced else ""
    return f"{base}/{resource.version}{home}/{resource.plural}/{{name}}"


def _path(resource: ApiResource) -> tuple[str, Json]:
    schema = {"$ref": f"#/components/schemas/{_schema_name(resource)}"}
    answer = {"description": "OK", "content": {_JSON: {"schema": schema}}}
    get = {"responses": {"200": answer}, "x-kubernetes-action": "get", _GVK: _kind(resource)}
    return _path_of(resource), {"get": get}
