"""The HTTP door: who may enter, which resource a path names, in which form the answer goes out."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from typing import Any, NamedTuple, cast

import msgspec
import yaml
from aiohttp import web

from podwire.errors import PodwireError
from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api import protobuf
from podwire.lab.api import status as errors
from podwire.lab.api.discovery import Discovery
from podwire.lab.api.listing import Shape, list_body, parse_query, stream
from podwire.lab.api.manifests import apply_all, delete_all
from podwire.lab.api.registry import (
    APPLY_PATCH,
    JSON_PATCH,
    MERGE_PATCH,
    DeleteOptions,
    Registry,
)
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.status import StatusError
from podwire.lab.api.storage import Record, decode, encode
from podwire.lab.api.subresources import SUBRESOURCES, Call

_JSON = "application/json"


class Target(NamedTuple):
    """What a path names. `name` is empty for a whole collection."""

    resource: ApiResource
    namespace: str
    name: str
    subresource: str


class HttpDoor:
    """An aiohttp handler; everything asks for one of `tokens`, which may change while it runs."""

    def __init__(self, registry: Registry, tokens: Collection[str]) -> None:
        self.registry = registry
        self.tokens = tokens
        self._discovery = Discovery(registry.catalogue)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            self._authenticate(request)
            return await self._route(request)
        except StatusError as error:
            return _json(encode(error.body()), error.status)
        except PodwireError as error:
            return _json(encode(errors.bad_request(str(error)).body()), 400)

    def _authenticate(self, request: web.BaseRequest) -> None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme == "Bearer":
            given = token.strip().encode()
            if any(hmac.compare_digest(given, known.encode()) for known in self.tokens):
                return
        raise StatusError(401, "Unauthorized", "Unauthorized")

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        match parts:
            case ["api", version, *rest] if rest:
                return await self._resource(request, "", version, rest)
            case ["apis", group, version, *rest] if rest:
                return await self._resource(request, group, version, rest)
            case ["podwire", action] if request.method == "POST":
                return await self._bulk(request, action)
            case _:
                found = self._discovery.answer(parts, request.headers.get("Accept", ""))
                if found is None:
                    raise errors.no_such_path()
                content_type, body = found
                return web.Response(body=body, content_type=content_type)

    async def _bulk(self, request: web.BaseRequest, action: str) -> web.StreamResponse:
        """``/podwire/apply`` and ``/podwire/delete``: a list of manifests in one request."""
        door = {"apply": apply_all, "delete": delete_all}.get(action)
        if door is None:
            raise errors.no_such_path()
        objects = await _body(request)
        if not isinstance(objects, list):
            raise errors.bad_request("a list of objects is expected")
        results = door(self.registry, cast("list[Json]", objects))
        return _json(encode(results))

    # --- resources -------------------------------------------------------------------------------

    def _target(self, group: str, version: str, parts: list[str]) -> Target:
        namespace = ""
        if parts[0] == "namespaces" and len(parts) > 2 and parts[2] not in ("status", "finalize"):
            namespace, parts = parts[1], parts[2:]
        if parts[0] == "watch":  # the old form, without query
            raise errors.no_such_path()
        resource = self.registry.catalogue.at(group, version, parts[0])
        if resource is None or len(parts) > 3 or (namespace and not resource.namespaced):
            raise errors.no_such_path()
        name = parts[1] if len(parts) > 1 else ""
        if name and resource.namespaced and not namespace:
            raise errors.no_such_path()
        return Target(resource, namespace, name, parts[2] if len(parts) > 2 else "")

    async def _resource(
        self, request: web.BaseRequest, group: str, version: str, parts: list[str]
    ) -> web.StreamResponse:
        target = self._target(group, version, parts)
        if target.subresource and target.subresource != "status":
            return await self._subresource(request, target)
        if target.subresource and not target.resource.has_status:
            raise errors.no_such_path()
        match request.method, bool(target.name):
            case "GET", False:
                return await self._list(request, target)
            case "GET", True:
                return self._get(request, target)
            case "POST", False:
                return await self._create(request, target)
            case "PUT", True:
                return await self._update(request, target)
            case "PATCH", True:
                return await self._patch(request, target)
            case "DELETE", True:
                return await self._delete(request, target)
            case "DELETE", False:
                return await self._delete_all(request, target)
            case _:
                raise errors.StatusError(
                    405,
                    "MethodNotAllowed",
                    "the server does not allow this method on the requested resource",
                )

    async def _list(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        query = parse_query(target.resource, target.namespace, request.query)
        shape = Shape.of(request.headers.get("Accept", ""))
        if query.watch:
            return await stream(self.registry, request, query, shape)
        return _json(list_body(self.registry, query, shape))

    def _get(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        record = self.registry.get(target.resource, target.namespace, target.name)
        return self._answer(request, target.resource, record)

    def _answer(
        self, request: web.BaseRequest, resource: ApiResource, record: Record, code: int = 200
    ) -> web.StreamResponse:
        accept = request.headers.get("Accept", "")
        if "as=" not in accept and record.obj.get("apiVersion") == resource.api_version:
            return _json(record.body, code)
        shape = Shape.of(accept)
        return _json(shape.one(resource, record, self.registry.now()), code)

    async def _create(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        obj = await _object(request)
        namespace = target.namespace
        if target.resource.namespaced and not namespace:
            raise errors.bad_request("an empty namespace may not be set during creation")
        dry_run = _dry_run(request)
        record = self.registry.create(target.resource, namespace, obj, dry_run=dry_run)
        return self._answer(request, target.resource, record, 201)

    async def _update(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        obj = await _object(request)
        if obj.setdefault("metadata", {}).setdefault("name", target.name) != target.name:
            raise errors.bad_request(
                f"the name of the object ({obj['metadata']['name']}) does not match the name on "
                f"the URL ({target.name})"
            )
        record = self.registry.update(
            target.resource,
            target.namespace,
            obj,
            subresource=target.subresource,
            dry_run=_dry_run(request),
        )
        return self._answer(request, target.resource, record)

    async def _patch(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        record, created = self.registry.patch(
            target.resource,
            target.namespace,
            target.name,
            await _body(request),
            request.content_type.replace("apply-patch+json", "apply-patch+yaml"),
            subresource=target.subresource,
            manager=request.query.get("fieldManager", ""),
            dry_run=_dry_run(request),
        )
        return self._answer(request, target.resource, record, 201 if created else 200)

    async def _delete(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        options = await _delete_options(request)
        record, gone = self.registry.delete(
            target.resource, target.namespace, target.name, options, dry_run=_dry_run(request)
        )
        if not gone:
            return self._answer(request, target.resource, record)
        details = {
            "name": target.name,
            "kind": target.resource.plural,
            "uid": record.obj["metadata"]["uid"],
        }
        if target.resource.group:
            details["group"] = target.resource.group
        answer: Json = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return _json(encode({**answer, "details": details}))

    async def _delete_all(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        query = parse_query(target.resource, target.namespace, request.query)
        options = await _delete_options(request)
        bodies: list[bytes] = []
        for record in query.select(self.registry.storage):
            name, home = record.obj["metadata"]["name"], record.key[0]
            done, _ = self.registry.delete(
                target.resource, home, name, options, dry_run=_dry_run(request)
            )
            bodies.append(done.body)
        return _json(query.envelope(self.registry.storage.version, bodies))

    async def _subresource(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        handler = SUBRESOURCES.get(target.subresource)
        if handler is None:
            raise errors.no_such_path()
        body = await _body(request) if request.can_read_body else None
        code, answer = handler(
            Call(
                self.registry,
                request.method,
                target.resource,
                target.namespace,
                target.name,
                body,
                request.content_type,
            )
        )
        return _json(encode(answer), code)


def _json(body: bytes, code: int = 200) -> web.Response:
    return web.Response(body=body, status=code, content_type=_JSON)


def _dry_run(request: web.BaseRequest) -> bool:
    return request.query.get("dryRun", "") != ""


async def _body(request: web.BaseRequest) -> Any:
    """The decoded body. Raises StatusError: 415 for forms we do not speak, 400 for bad ones."""
    content_type = request.content_type
    raw = await request.content.read()  # not request.read(): a bulk apply has no size limit
    if content_type == protobuf.MEDIA_TYPE:
        return protobuf.decode(raw)
    try:
        if content_type in (APPLY_PATCH, "application/yaml"):
            return yaml.load(raw, Loader=_YAML)
        if content_type in (_JSON, JSON_PATCH, MERGE_PATCH, "application/octet-stream") or (
            content_type.startswith("application/") and content_type.endswith("+json")
        ):
            return decode(raw)
    except (msgspec.DecodeError, yaml.YAMLError) as error:
        raise errors.bad_request(f"the body does not decode: {error}") from None
    raise errors.unsupported_media(
        f"the body of the request was in an unknown format ({content_type}) - accepted media "
        "types include: application/json, application/yaml"
    )


_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


async def _object(request: web.BaseRequest) -> Json:
    body = await _body(request)
    if not isinstance(body, dict):
        raise errors.bad_request("the body must be one object")
    return cast("Json", body)


async def _delete_options(request: web.BaseRequest) -> DeleteOptions:
    body: Json = {}
    if request.can_read_body:
        read = await _body(request)
        body = cast("Json", read) if isinstance(read, dict) else {}
    query = request.query
    grace = body.get("gracePeriodSeconds", query.get("gracePeriodSeconds"))
    conditions = tree.mapping(body, "preconditions")
    return DeleteOptions(
        grace_period_s=None if grace is None else int(grace),
        propagation=body.get("propagationPolicy", query.get("propagationPolicy")),
        uid=conditions.get("uid"),
        resource_version=conditions.get("resourceVersion"),
    )
