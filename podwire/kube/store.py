"""The last known objects of the cluster, and what changed since somebody last asked.

The store is filled by a `Reflector` (or by hand in tests) and read by the compilers. It is not
thread-safe: fill and take it from one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, cast

from podwire.kube.objects import Resource

Key: TypeAlias = tuple[str, str]
Kind: TypeAlias = type[Resource]
R = TypeVar("R", bound=Resource)


class Change(NamedTuple, Generic[R]):
    """One object's step: `old` is None when it is new, `new` is None when it is gone."""

    old: R | None
    new: R | None


class ChangeSet:
    """What changed between two calls of `Store.take`, each object at most once. Immutable."""

    def __init__(self, changes: Mapping[Kind, Mapping[Key, Change[Any]]]) -> None:
        self._changes = changes

    def of(self, kind: type[R]) -> Mapping[Key, Change[R]]:
        """The changes of one kind; empty when there are none."""
        return cast("Mapping[Key, Change[R]]", self._changes.get(kind, _NOTHING))

    def __bool__(self) -> bool:
        return bool(self._changes)

    def __iter__(self) -> Iterator[Kind]:
        """The kinds that changed."""
        return iter(self._changes)

    def __len__(self) -> int:
        return sum(map(len, self._changes.values()))

    def __repr__(self) -> str:
        counts = (f"{kind.__name__}: {len(some)}" for kind, some in self._changes.items())
        return f"ChangeSet({', '.join(counts)})"


_NOTHING: Mapping[Key, Any] = MappingProxyType({})


class Store:
    """Objects by kind and ``(namespace, name)``.

    `get` and `all` show what is known now, `take` what changed since the last `take`. An object
    that could not be decoded is named in `set_aside` until it is replaced or removed; its last
    good version, if there was one, stays, so that a policy does not open by a bad edit.
    """

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[Key, Resource]] = {}
        self._before: dict[Kind, dict[Key, Resource | None]] = {}
        self._set_aside: dict[tuple[Kind, Key], str] = {}

    def get(self, kind: type[R], key: Key) -> R | None:
        return cast("R | None", self._objects.get(kind, _NOTHING).get(key))

    def all(self, kind: type[R]) -> Mapping[Key, R]:
        """A read-only view that follows the store."""
        return cast("Mapping[Key, R]", MappingProxyType(self._objects.setdefault(kind, {})))

    @property
    def set_aside(self) -> Mapping[tuple[Kind, Key], str]:
        """Objects that did not decode, and why."""
        return MappingProxyType(self._set_aside)

    def put(self, obj: Resource) -> None:
        """Add or change one object; the same resourceVersion again changes nothing."""
        kind, key = type(obj), obj.key
        if self._set_aside:
            self._set_aside.pop((kind, key), None)
        objects = self._objects.setdefault(kind, {})
        old = objects.get(key)
        if old is not None and _same(old, obj):
            return
        self._before.setdefault(kind, {}).setdefault(key, old)
        objects[key] = obj

    def remove(self, kind: Kind, key: Key) -> None:
        """Forget one object; an unknown one is no error."""
        self._set_aside.pop((kind, key), None)
        old = self._objects.get(kind, {}).pop(key, None)
        if old is not None:
            self._before.setdefault(kind, {}).setdefault(key, old)

    def refuse(self, kind: Kind, key: Key, reason: str) -> None:
        """Name an object that did not decode."""
        self._set_aside[kind, key] = reason

    def replace(
        self, kind: type[R], objects: Iterable[R], refused: Mapping[Key, str] = _NOTHING
    ) -> None:
        """Make `objects` all there is of this kind; `refused` exist too but did not decode."""
        present: set[Key] = set(refused)
        for obj in objects:
            present.add(obj.key)
            self.put(obj)
        for key in [key for key in self._objects.get(kind, {}) if key not in present]:
            self.remove(kind, key)
        for stale in [k for k in self._set_aside if k[0] is kind and k[1] not in present]:
            del self._set_aside[stale]
        for key, reason in refused.items():
            self.refuse(kind, key, reason)

    def take(self) -> ChangeSet:
        """Everything that changed since the last call, each object as one old → new step."""
        before, self._before = self._before, {}
        changes: dict[Kind, dict[Key, Change[Any]]] = {}
        for kind, olds in before.items():
            objects = self._objects.get(kind, {})
            steps = {
                key: Change(old, new)
                for key, old in olds.items()
                if (new := objects.get(key)) is not old
            }
            if steps:
                changes[kind] = steps
        return ChangeSet(changes)


def _same(old: Resource, new: Resource) -> bool:
    """The API promises equal content for equal versions; objects made by hand have none."""
    mine, theirs = old.metadata, new.metadata
    if mine.resource_version:
        return mine.resource_version == theirs.resource_version and mine.uid == theirs.uid
    return old == new
