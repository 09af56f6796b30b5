"""What every controller is made of."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import TypeAlias

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.registry import DeleteOptions, Registry, timestamp
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.status import StatusError
from podwire.lab.api.storage import Event, Key, Record

_log = logging.getLogger(__name__)
_SLICE_S = 0.01  # HTTP requests get their turn after this long
_RETRY_S = 1.0
_REST = 4  # after a round of work a controller rests for so many times as long
_LONGEST_REST_S = 0.25

Ref: TypeAlias = tuple[ApiResource, Key]


class Controller(ABC):
    """`wants` names the keys that an event makes dirty; `reconcile` handles one of them.

    A key is handled once for any number of events before that. Everything runs in one thread, so
    `reconcile` sees a store that nobody else is changing.
    """

    kinds: Collection[str] = ()  # whose events it looks at; none means all
    delay_s = 0.0  # events are gathered this long before the first key is handled

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._dirty: dict[Key, None] = {}
        self._scheduled = False
        self._stopped = False
        self._took_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    @abstractmethod
    def wants(self, event: Event) -> Iterable[Key]: ...

    @abstractmethod
    def reconcile(self, key: Key) -> None: ...

    def observe(self, event: Event) -> None:
        for key in self.wants(event):
            self.enqueue(key)

    def enqueue(self, key: Key) -> None:
        self._dirty[key] = None
        if not self._scheduled and self._loop:
            self._scheduled = True
            # what costs long is done less often: a thousand pods that come ready one by one must
            # not mean a thousand looks at a thousand pods
            rest_s = min(_REST * self._took_s, _LONGEST_REST_S)
            self._took_s = 0.0
            self._loop.call_later(max(self.delay_s, rest_s), self._work)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        if self._dirty:
            self._scheduled = True
            loop.call_soon(self._work)

    def stop(self) -> None:
        self._stopped = True

    def settle(self) -> int:
        """Handle all dirty keys now, without a loop; returns how many."""
        done = 0
        while self._dirty:
            self._handle(next(iter(self._dirty)))
            done += 1
        return done

    def _work(self) -> None:
        began = time.monotonic()
        while self._dirty and not self._stopped and time.monotonic() < began + _SLICE_S:
            self._handle(next(iter(self._dirty)))
        self._took_s += time.monotonic() - began
        self._scheduled = bool(self._dirty) and not self._stopped
        if self._scheduled:
            assert self._loop
            self._loop.call_soon(self._work)

    def _handle(self, key: Key) -> None:
        del self._dirty[key]
        try:
            self.reconcile(key)
        except StatusError as error:
            self._retry(key, error)
        except Exception as error:
            # one bad object must not stop the controller for all others
            _log.exception("%s %s/%s", type(self).__name__, *key)
            self._retry(key, error)

    def _retry(self, key: Key, error: Exception) -> None:
        _log.info("%s %s/%s will be tried again: %s", type(self).__name__, *key, error)
        if self._loop and not self._stopped:
            self._loop.call_later(_RETRY_S, self.enqueue, key)

    # --- what most of them do --------------------------------------------------------------------

    def delete(self, resource: ApiResource, key: Key, options: DeleteOptions | None = None) -> None:
        """Delete what may be gone already."""
        if self.registry.find(resource, *key):
            self.registry.delete(resource, *key, options or DeleteOptions())


def metadata(record: Record) -> Json:
    return record.obj["metadata"]


def labels(record: Record) -> Json:
    return record.obj["metadata"].get("labels") or {}


def is_going(record: Record) -> bool:
    """Marked for deletion."""
    return "deletionTimestamp" in record.obj["metadata"]


def owner_reference(resource: ApiResource, owner: Record) -> Json:
    """The reference that makes `owner` the controller of what it creates."""
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "name": owner.obj["metadata"]["name"],
        "uid": owner.obj["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def controller_of(obj: Json) -> Json:
    """The owner reference of the controlling owner, or ``{}``."""
    for reference in obj["metadata"].get("ownerReferences") or ():
        if reference.get("controller"):
            return reference
    return {}


def condition(obj: Json, type: str) -> Json:
    """The condition of a type, or ``{}``."""
    for found in tree.mappings(obj, "status", "conditions"):
        if found.get("type") == type:
            return found
    return {}


def is_ready(pod: Json) -> bool:
    return condition(pod, "Ready").get("status") == "True"


def is_done(pod: Json) -> bool:
    """The pod will never run again."""
    return tree.text(pod, "status", "phase") in ("Succeeded", "Failed")


def with_condition(registry: Registry, obj: Json, new: Json) -> list[Json]:
    """The object's conditions with `new` put in; its transition time moves with its status."""
    old = condition(obj, new["type"])
    now = timestamp(registry.now())
    moved = old.get("status") != new["status"] or "lastTransitionTime" not in old
    entry = {**new, "lastTransitionTime": now if moved else old["lastTransitionTime"]}
    conditions = tree.mappings(obj, "status", "conditions")
    if not old:
        return [*conditions, entry]
    return [entry if found is old else found for found in conditions]
