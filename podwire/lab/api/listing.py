"""Lists and watches: selection, pages, the stream of events, and the forms they go out in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from aiohttp import web

from podwire.kube.objects import Json
from podwire.lab.api import status as errors
from podwire.lab.api.registry import Registry
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.selectors import parse_fields, parse_labels
from podwire.lab.api.status import StatusError
from podwire.lab.api.storage import Event, Record, Storage, Watcher, encode, frame
from podwire.lab.api.tables import table

_BOOKMARK_EVERY_S = 30.0
_PENDING_LIMIT = 200_000  # a reader this far behind is cut off and lists again


@dataclass(frozen=True, slots=True)
class Query:
    """What one list or watch asks for."""

    resource: ApiResource
    namespace: str
    matches: Callable[[Json], bool] | None
    limit: int
    token: str
    version: str
    watch: bool
    bookmarks: bool
    initial_events: bool
    timeout_s: float

    def select(self, storage: Storage) -> list[Record]:
        records = storage.collection(self.resource).select(self.namespace)
        if self.matches:
            records = [record for record in records if self.matches(record.obj)]
        return records

    def envelope(
        self, version: int, bodies: list[bytes], token: str = "", remaining: int = 0
    ) -> bytes:
        metadata: Json = {"resourceVersion": str(version)}
        if token:
            metadata["continue"] = token
            if self.matches is None:
                metadata["remainingItemCount"] = remaining
        head = encode(
            {
                "kind": self.resource.list_kind,
                "apiVersion": self.resource.api_version,
                "metadata": metadata,
            }
        )
        return b'%s,"items":[%s]}' % (head[:-1], b",".join(bodies))


def parse_query(resource: ApiResource, namespace: str, query: Mapping[str, str]) -> Query:
    """Raises StatusError (400)."""
    tests: list[Callable[[Json], bool]] = []
    if labels := query.get("labelSelector"):
        match = parse_labels(labels)
        tests.append(lambda obj: match(obj["metadata"].get("labels") or {}))
    if fields := query.get("fieldSelector"):
        tests.append(parse_fields(resource, fields))
    try:
        limit = int(query.get("limit") or 0)
        timeout = float(query.get("timeoutSeconds") or 0)
        if version := query.get("resourceVersion", ""):
            int(version)
    except ValueError as error:
        raise errors.bad_request(str(error)) from None
    return Query(
        resource=resource,
        namespace=namespace,
        matches=(lambda obj: all(test(obj) for test in tests)) if tests else None,
        limit=limit,
        token=query.get("continue", ""),
        version=version,
        watch=query.get("watch", "") in ("1", "true"),
        bookmarks=query.get("allowWatchBookmarks", "") in ("1", "true"),
        initial_events=query.get("sendInitialEvents", "") in ("1", "true"),
        timeout_s=timeout or 3600.0,
    )


class Shape:
    """In which form objects go out: whole, as a Table, or only their metadata."""

    def __init__(self, form: str) -> None:
        self.form = form

    @classmethod
    def of(cls, accept: str) -> Shape:
        """The first form of the Accept header that we speak. Raises StatusError (406)."""
        for choice in accept.split(",") if accept else ["*/*"]:
            media, *parameters = [part.strip() for part in choice.split(";")]
            if media not in ("application/json", "*/*", "application/*"):
                continue
            wanted = dict(p.split("=", 1) for p in parameters if "=" in p)
            form = wanted.get("as", "")
            if form in ("", "Table", "PartialObjectMetadata", "PartialObjectMetadataList"):
                return cls(form.removesuffix("List"))
        raise StatusError(
            406, "NotAcceptable", "only the following media types are accepted: application/json"
        )

    def one(self, resource: ApiResource, record: Record, now: datetime) -> bytes:
        obj = record.obj
        if self.form == "Table":
            return encode(table(resource, [obj], now, obj["metadata"]))
        if self.form:
            return encode(_only_metadata(obj))
        if obj.get("apiVersion") == resource.api_version:
            return record.body
        return encode({**obj, "apiVersion": resource.api_version})


def _only_metadata(obj: Json) -> Json:
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": obj["metadata"],
    }


def list_body(registry: Registry, query: Query, shape: Shape) -> bytes:
    """One page (or all) of a list, encoded. Raises StatusError (400, 410)."""
    version, records, token, remaining = _page(registry.storage, query)
    if shape.form == "Table":
        metadata = {"resourceVersion": str(version)}
        if token:
            metadata["continue"] = token
        objects = [record.obj for record in records]
        return encode(table(query.resource, objects, registry.now(), metadata))
    bodies = [shape.one(query.resource, record, registry.now()) for record in records]
    if not shape.form:
        return query.envelope(version, bodies, token, remaining)
    whole = query.envelope(version, bodies, token, remaining)
    kinds = (query.resource.list_kind, query.resource.api_version)
    head = encode({"kind": kinds[0], "apiVersion": kinds[1]})[:-1]
    return whole.replace(
        head, b'{"kind":"PartialObjectMetadataList","apiVersion":"meta.k8s.io/v1"', 1
    )


def _page(storage: Storage, query: Query) -> tuple[int, list[Record], str, int]:
    """Version, records, token of the next page, number of records after this page."""
    version, start, token = storage.version, 0, 0
    if query.token:
        try:
            token, start = (int(part) for part in query.token.split("-"))
        except ValueError:
            raise errors.bad_request("continue key is not valid") from None
        version, records = storage.kept(token)
    else:
        records = query.select(storage)
        if query.limit and len(records) > query.limit:
            token = storage.keep(version, records)
    end = start + query.limit if query.limit else len(records)
    if end >= len(records):
        storage.drop(token)
        return version, records[start:], "", 0
    return version, records[start:end], f"{token}-{end}", len(records) - end


# --- watch ---------------------------------------------------------------------------------------


async def stream(
    registry: Registry, request: web.BaseRequest, query: Query, shape: Shape
) -> web.StreamResponse:
    """Events as they happen, until the reader leaves or its time is over."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    watch = _Watch(registry, query, shape)
    try:
        first = watch.first_frames()
    except StatusError as error:
        await response.write(frame("ERROR", encode(error.body())))
        return response
    collection = registry.storage.collection(query.resource)
    collection.watchers.add(watch.watcher)
    try:
        if first:
            await response.write(first)
        async for chunk in watch.chunks():
            await response.write(chunk)
    except ConnectionError:
        pass  # the reader went away: that is how most watches end
    finally:
        collection.watchers.discard(watch.watcher)
    return response


class _Watch:
    def __init__(self, registry: Registry, query: Query, shape: Shape) -> None:
        self.registry = registry
        self.query = query
        self.shape = shape
        self.watcher = Watcher()

    def first_frames(self) -> bytes:
        """What the reader must be told of the past. Raises StatusError (410, 504)."""
        storage, query = self.registry.storage, self.query
        if query.initial_events or query.version in ("", "0"):
            frames = [frame("ADDED", self._body(record)) for record in query.select(storage)]
            if query.initial_events:
                done = {"k8s.io/initial-events-end": "true"}
                frames.append(self._bookmark(done))
            return b"".join(frames)
        version = int(query.version)
        if version > storage.version:
            raise StatusError(
                504,
                "Timeout",
                f"Too large resource version: {version}, current: {storage.version}",
                details={"causes": [{"reason": "ResourceVersionTooLarge", "message": ""}]},
            )
        events = storage.collection(query.resource).since(version)
        return b"".join(map(self._frame, events))

    async def chunks(self):
        """Frames of pending events, many in one piece; bookmarks in quiet times."""
        end = time.monotonic() + self.query.timeout_s
        watcher = self.watcher
        while (left := end - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(min(left, _BOOKMARK_EVERY_S)):
                    await watcher.ready.wait()
            except TimeoutError:
                if self.query.bookmarks:
                    yield self._bookmark()
                continue
            watcher.ready.clear()
            if len(watcher.pending) > _PENDING_LIMIT:
                return
            events = list(watcher.pending)
            watcher.pending.clear()
            if chunk := b"".join(map(self._frame, events)):
                yield chunk

    def _bookmark(self, annotations: dict[str, str] | None = None) -> bytes:
        resource = self.query.resource
        metadata: Json = {"resourceVersion": str(self.registry.storage.version)}
        if annotations:
            metadata["annotations"] = annotations
        obj: Json = {
            "kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata
        }  # fmt: skip
        if self.shape.form == "Table":
            obj = table(resource, [], self.registry.now(), metadata)
        return frame("BOOKMARK", encode(obj))

    def _frame(self, event: Event) -> bytes:
        """The event as this reader sees it: a change can bring an object in or out of view."""
        query = self.query
        if query.namespace and event.record.key[0] != query.namespace:
            return b""
        type = event.type
        if query.matches:
            now = query.matches(event.record.obj)
            before = event.old is not None and query.matches(event.old.obj)
            if type == "DELETED":
                if not before:
                    return b""
            elif now != before:
                type = "ADDED" if now else "DELETED"
            elif not now:
                return b""
        version = event.record.obj.get("apiVersion")
        if (type, self.shape.form, version) == (event.type, "", query.resource.api_version):
            return event.frame
        return frame(type, self._body(event.record))

    def _body(self, record: Record) -> bytes:
        return self.shape.one(self.query.resource, record, self.registry.now())
