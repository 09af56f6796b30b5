"""A mapping whose versions share what did not change.

A table of 30,000 Services gets a new version for every endpoint that comes or goes. Copying a
dict of that size costs a millisecond; here a version copies one of 512 small dicts, and two
versions are compared by looking at which of these are the same object.
"""

from __future__ import annotations

from collections.abc import Hashable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import Generic, TypeVar, overload

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_BUCKETS = 512


class SharedMap(Mapping[K, V], Generic[K, V]):
    """Immutable; `changed` makes the next version."""

    __slots__ = ("_buckets", "_length")

    def __init__(self) -> None:
        empty: dict[K, V] = {}
        self._buckets: tuple[dict[K, V], ...] = (empty,) * _BUCKETS
        self._length = 0

    def changed(self, changes: Iterable[tuple[K, V | None]]) -> SharedMap[K, V]:
        """This mapping with the changes made; a value of None removes the key."""
        buckets = list(self._buckets)
        copied: set[int] = set()
        length = self._length
        for key, value in changes:
            index = hash(key) % _BUCKETS
            if index not in copied:
                copied.add(index)
                buckets[index] = buckets[index].copy()
            bucket = buckets[index]
            length -= len(bucket)
            if value is None:
                bucket.pop(key, None)
            else:
                bucket[key] = value
            length += len(bucket)
        out: SharedMap[K, V] = SharedMap()
        out._buckets = tuple(buckets)
        out._length = length
        return out

    def differences(self, old: SharedMap[K, V]) -> Iterator[tuple[K, V | None, V | None]]:
        """``(key, old value, new value)`` for every key whose value is another object."""
        for before, after in zip(old._buckets, self._buckets, strict=True):
            if before is after:
                continue
            for key, value in after.items():
                if before.get(key) is not value:
                    yield key, before.get(key), value
            for key, value in before.items():
                if key not in after:
                    yield key, value, None

    def __getitem__(self, key: K) -> V:
        return self._buckets[hash(key) % _BUCKETS][key]

    @overload
    def get(self, key: K, /) -> V | None: ...

    @overload
    def get(self, key: K, /, default: V | T) -> V | T: ...

    def get(self, key: K, /, default: V | T | None = None) -> V | T | None:
        return self._buckets[hash(key) % _BUCKETS].get(key, default)

    def __iter__(self) -> Iterator[K]:
        for bucket in self._buckets:
            yield from bucket

    def items(self) -> ItemsView[K, V]:
        return _Items(self, self._buckets)

    def values(self) -> ValuesView[V]:
        return _Values(self, self._buckets)

    def __len__(self) -> int:
        return self._length


class _Items(ItemsView[K, V]):
    """Walks through the buckets, where the view that it replaces looks every key up."""

    def __init__(self, of: Mapping[K, V], buckets: Iterable[dict[K, V]]) -> None:
        super().__init__(of)
        self._buckets = buckets

    def __iter__(self) -> Iterator[tuple[K, V]]:
        for bucket in self._buckets:
            yield from bucket.items()


class _Values(ValuesView[V]):
    """As `_Items`."""

    def __init__(self, of: Mapping[K, V], buckets: Iterable[dict[K, V]]) -> None:
        super().__init__(of)
        self._buckets = buckets

    def __iter__(self) -> Iterator[V]:
        for bucket in self._buckets:
            yield from bucket.values()
