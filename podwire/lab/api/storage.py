"""Objects in memory with versions, an event log per resource, and those who watch it.

A stored object is never changed in place: a new version is a new dict. So records, events and
list snapshots share objects freely, and each is encoded at most once for all who read it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, ValuesView
from typing import Any, TypeAlias

import msgspec

from podwire.kube.objects import Json
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.status import StatusError, expired

Key: TypeAlias = tuple[str, str]
encode = msgspec.json.Encoder().encode
decode: Callable[[bytes | str], Any] = msgspec.json.Decoder().decode


class Record:
    """One version of one object, and its encoding once somebody asked for it."""

    __slots__ = ("_body", "obj", "version")

    def __init__(self, obj: Json, version: int) -> None:
        self.obj = obj
        self.version = version
        self._body: bytes | None = None

    @property
    def body(self) -> bytes:
        if self._body is None:
            self._body = encode(self.obj)
        return self._body

    @property
    def key(self) -> Key:
        metadata = self.obj["metadata"]
        return (metadata.get("namespace", ""), metadata["name"])


class Event:
    """ADDED, MODIFIED or DELETED; a deleted record carries the version of its deletion."""

    __slots__ = ("_frame", "old", "record", "resource", "type")

    def __init__(
        self, resource: ApiResource, type: str, record: Record, old: Record | None
    ) -> None:
        self.resource = resource
        self.type = type
        self.record = record
        self.old = old
        self._frame: bytes | None = None

    @property
    def frame(self) -> bytes:
        """The event as one line of a watch stream."""
        if self._frame is None:
            self._frame = frame(self.type, self.record.body)
        return self._frame


def frame(type: str, body: bytes) -> bytes:
    return b'{"type":"%s","object":%s}\n' % (type.encode(), body)


class Watcher:
    """What one watch has still to be told. `ready` is set when there is something."""

    def __init__(self) -> None:
        self.pending: deque[Event] = deque()
        self.ready = asyncio.Event()

    def push(self, event: Event) -> None:
        self.pending.append(event)
        self.ready.set()


class Collection:
    """All objects of one resource."""

    def __init__(self, resource: ApiResource, log_length: int) -> None:
        self.resource = resource
        self.records: dict[Key, Record] = {}
        self._homes: dict[str, dict[Key, Record]] = {}
        self.log: deque[Event] = deque(maxlen=log_length)
        self.forgotten = 0  # the highest version that fell out of the log
        self.watchers: set[Watcher] = set()

    def select(self, namespace: str) -> list[Record]:
        """The records of a namespace, or of all (""), in the order of their keys."""
        records = self._homes.get(namespace, {}) if namespace else self.records
        return [records[key] for key in sorted(records)]

    def within(self, namespace: str) -> ValuesView[Record]:
        """The records of one namespace, in no order."""
        return self._homes.get(namespace, {}).values()

    def put(self, key: Key, record: Record) -> Record | None:
        """Store; returns what was there before."""
        old = self.records.get(key)
        self.records[key] = record
        self._homes.setdefault(key[0], {})[key] = record
        return old

    def pop(self, key: Key) -> Record:
        del self._homes[key[0]][key]
        return self.records.pop(key)

    def since(self, version: int) -> Iterable[Event]:
        """The events after `version`. Raises StatusError (410) when some are forgotten."""
        if version < self.forgotten:
            raise expired(f"too old resource version: {version} ({self.forgotten})")
        return [event for event in self.log if event.record.version > version]


class Storage:
    """Collections with one common version counter."""

    def __init__(self, log_length: int = 8192) -> None:
        self.version = 1
        self._log_length = log_length
        self._collections: dict[tuple[str, str], Collection] = {}
        self._snapshots: dict[int, tuple[int, list[Record]]] = {}
        self._observers: list[Callable[[Event], None]] = []

    def observe(self, observer: Callable[[Event], None]) -> None:
        """Call `observer` for every event of every resource, at the moment it happens."""
        self._observers.append(observer)

    def collection(self, resource: ApiResource) -> Collection:
        """One resource's objects; all versions of a kind share them by the first one's form."""
        key = (resource.group, resource.plural)
        found = self._collections.get(key)
        if found is None:
            found = self._collections[key] = Collection(resource, self._log_length)
        return found

    def collections(self) -> list[Collection]:
        return list(self._collections.values())

    def put(self, resource: ApiResource, obj: Json) -> Record:
        """Store a new version; sets its resourceVersion. The caller gives `obj` away."""
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        record = Record(obj, self.version)
        collection = self.collection(resource)
        old = collection.put(record.key, record)
        self._tell(collection, Event(resource, "MODIFIED" if old else "ADDED", record, old))
        return record

    def remove(self, resource: ApiResource, key: Key) -> Record:
        """Delete; returns the last state with the version of its deletion."""
        self.version += 1
        collection = self.collection(resource)
        old = collection.pop(key)
        metadata = {**old.obj["metadata"], "resourceVersion": str(self.version)}
        record = Record({**old.obj, "metadata": metadata}, self.version)
        self._tell(collection, Event(resource, "DELETED", record, old))
        return record

    def _tell(self, collection: Collection, event: Event) -> None:
        log = collection.log
        if len(log) == log.maxlen:
            collection.forgotten = log[0].record.version
        log.append(event)
        for watcher in collection.watchers:
            watcher.push(event)
        for observer in self._observers:
            observer(event)

    # --- paging: the first page keeps the whole list, so that all pages show one moment -----------

    def keep(self, version: int, records: list[Record]) -> int:
        """Keep a list for later pages; returns its token. The oldest of many are forgotten."""
        token = max(self._snapshots, default=0) + 1
        self._snapshots[token] = (version, records)
        if len(self._snapshots) > 32:
            del self._snapshots[min(self._snapshots)]
        return token

    def kept(self, token: int) -> tuple[int, list[Record]]:
        """The kept list and its version. Raises StatusError (410)."""
        try:
            return self._snapshots[token]
        except KeyError:
            raise StatusError(
                410,
                "Expired",
                "The provided continue parameter is too old to display a consistent list result. "
                "You must start a new list without the continue parameter.",
            ) from None

    def drop(self, token: int) -> None:
        self._snapshots.pop(token, None)
