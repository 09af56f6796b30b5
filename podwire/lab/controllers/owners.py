"""Who owns whom: an index over all objects, and the deletion of what nobody owns any more."""

from __future__ import annotations

from collections.abc import Iterable

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.registry import DeleteOptions, Registry
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.storage import Event, Key, Record
from podwire.lab.controllers.base import Controller, Ref, controller_of, is_going


class OwnerIndex:
    """Objects by uid, and the dependents of each uid."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.by_uid: dict[str, Ref] = {}
        self._dependents: dict[str, dict[Ref, None]] = {}
        self._strays: dict[str, dict[Key, None]] = {}  # namespace → pods without a controller
        registry.storage.observe(self.observe)
        for collection in registry.storage.collections():
            for record in collection.records.values():
                self.observe(Event(collection.resource, "ADDED", record, None))

    def observe(self, event: Event) -> None:
        ref = (event.resource, event.record.key)
        if event.old:
            for uid in _owners(event.old.obj):
                if found := self._dependents.get(uid):
                    found.pop(ref, None)
                    if not found:
                        del self._dependents[uid]
            self.by_uid.pop(event.old.obj["metadata"]["uid"], None)
        if event.resource.kind == "Pod":
            strays = self._strays.setdefault(ref[1][0], {})
            if event.type == "DELETED" or controller_of(event.record.obj):
                strays.pop(ref[1], None)
            else:
                strays[ref[1]] = None
        if event.type != "DELETED":
            self.by_uid[event.record.obj["metadata"]["uid"]] = ref
            for uid in _owners(event.record.obj):
                self._dependents.setdefault(uid, {})[ref] = None

    def dependents(self, uid: str) -> list[Ref]:
        return list(self._dependents.get(uid, ()))

    def strays(self, namespace: str) -> list[Key]:
        """The pods of a namespace that nobody controls."""
        return list(self._strays.get(namespace, ()))

    def controlled(self, owner: Record, kind: str) -> list[Record]:
        """The objects of a kind whose controller is `owner`."""
        uid = owner.obj["metadata"]["uid"]
        out: list[Record] = []
        for resource, key in self._dependents.get(uid, ()):
            if resource.kind != kind:
                continue
            record = self._registry.find(resource, *key)
            if record and controller_of(record.obj).get("uid") == uid:
                out.append(record)
        return out


def _owners(obj: Json) -> list[str]:
    return [str(one.get("uid")) for one in obj["metadata"].get("ownerReferences") or ()]


class GarbageCollector(Controller):
    """Keys are ``("", uid)`` of owners that are gone or going, and of objects with owners."""

    def __init__(self, registry: Registry, owners: OwnerIndex) -> None:
        super().__init__(registry)
        self._owners = owners

    def wants(self, event: Event) -> Iterable[Key]:
        uid = event.record.obj["metadata"]["uid"]
        if event.type == "DELETED" or is_going(event.record) or _owners(event.record.obj):
            yield ("", uid)
        if event.type == "DELETED":  # its owner may wait for it
            yield from (("", owner) for owner in _owners(event.record.obj))

    def reconcile(self, key: Key) -> None:
        uid = key[1]
        ref = self._owners.by_uid.get(uid)
        if ref is None:
            for dependent in self._owners.dependents(uid):
                self._collect(dependent)
            return
        record = self.registry.find(ref[0], *ref[1])
        if record is None:
            return
        if not is_going(record):
            if _owners(record.obj):
                self._collect(ref)
            return
        finalizers = tree.texts(record.obj, "metadata", "finalizers")
        if "orphan" in finalizers:
            for dependent in self._owners.dependents(uid):
                self._disown(dependent, {uid})
            self._finish(ref, record, "orphan")
        elif "foregroundDeletion" in finalizers:
            self._foreground(ref, record, uid)

    def _collect(self, ref: Ref) -> None:
        """Delete an object whose owners are all gone; drop the references that lead nowhere."""
        record = self.registry.find(ref[0], *ref[1])
        if record is None or is_going(record):
            return
        owners = _owners(record.obj)
        gone = {uid for uid in owners if uid not in self._owners.by_uid}
        if not gone:
            return
        if len(gone) == len(owners):
            self.delete(*ref)
        else:
            self._disown(ref, gone)

    def _disown(self, ref: Ref, uids: set[str]) -> None:
        record = self.registry.find(ref[0], *ref[1])
        if record is None:
            return
        references = tree.mappings(record.obj, "metadata", "ownerReferences")
        kept = [one for one in references if one.get("uid") not in uids]
        metadata = {**record.obj["metadata"], "ownerReferences": kept}
        self.registry.amend(*ref, metadata=metadata)

    def _foreground(self, ref: Ref, record: Record, uid: str) -> None:
        """The owner stays until the dependents that block it are gone."""
        waiting = False
        for resource, key in self._owners.dependents(uid):
            self.delete(resource, key, DeleteOptions(propagation="Foreground"))
            left = self.registry.find(resource, *key)
            waiting = waiting or (left is not None and _blocks(left, uid))
        if not waiting:
            self._finish(ref, record, "foregroundDeletion")

    def _finish(self, ref: Ref, record: Record, finalizer: str) -> None:
        kept = [one for one in tree.texts(record.obj, "metadata", "finalizers") if one != finalizer]
        metadata = {**record.obj["metadata"], "finalizers": kept}
        self.registry.amend(*ref, metadata=metadata)


def _blocks(record: Record, uid: str) -> bool:
    return any(
        one.get("uid") == uid and one.get("blockOwnerDeletion")
        for one in tree.mappings(record.obj, "metadata", "ownerReferences")
    )


class NamespaceController(Controller):
    """Empties a namespace that is to go, then lets it go; gives each one its service account."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        self._accounts: ApiResource = registry.resource("ServiceAccount")

    def wants(self, event: Event) -> Iterable[Key]:
        if event.resource == self.registry.namespaces:
            yield ("", event.record.obj["metadata"]["name"])
        elif event.type == "DELETED" and event.resource.namespaced:
            home = self.registry.find(self.registry.namespaces, "", event.record.key[0])
            if home and is_going(home):
                yield home.key

    def reconcile(self, key: Key) -> None:
        home = self.registry.find(self.registry.namespaces, *key)
        if home is None:
            return
        name = key[1]
        if not is_going(home):
            if not self.registry.find(self._accounts, name, "default"):
                self.registry.create(self._accounts, name, {"metadata": {"name": "default"}})
            return
        left = False
        for collection in self.registry.storage.collections():
            for record in list(collection.within(name)):
                self.delete(collection.resource, record.key)
            left = left or bool(collection.within(name))
        if not left:
            self.registry.amend(self.registry.namespaces, key, spec={"finalizers": []})
