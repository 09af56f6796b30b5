"""Maps that grow: an outer array of maps, one slot of which holds the map in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from podwire.datapath.ebpf.layout import NUMBER
from podwire.errors import KernelError
from podwire.kernel.bpf import Map, MapFlag, MapType


class GrowingMap:
    """The map in force behind `outer`, made at first use with room for `capacity` entries.

    It is in slot `slot`.
    """

    def __init__(
        self,
        name: str,
        outer: Map,
        type: MapType,
        key: int,
        value: int,
        capacity: int,
        slot: int = 0,
    ) -> None:
        self.name = name
        self._slot = NUMBER.pack(slot)
        self._outer = outer
        self._shape = (type, key, value)
        self._flags = MapFlag.INNER_MAP if type == MapType.ARRAY else MapFlag.NO_PREALLOC
        found = outer.inner(self._slot)
        self.map = found or self.make(capacity)
        if found is None:
            self._put()
        self._count = len(self.read()) if found and type != MapType.ARRAY else 0

    @property
    def capacity(self) -> int:
        return self.map.info.max_entries

    def read(self) -> dict[bytes, bytes]:
        return dict(self.map.items())

    def reserve(self, count: int) -> None:
        """Make room for `count` entries in all: at least doubles when it grows."""
        if count <= self.capacity:
            return
        larger = self.make(max(count + count // 4, 2 * self.capacity))
        try:
            larger.update_batch(self.map.items())
        except KernelError:
            larger.close()
            raise
        self.exchange(larger).close()

    def exchange(self, new: Map) -> Map:
        """Put another map in place; returns the one that was."""
        old, self.map = self.map, new
        self._put()
        return old

    def write(self, entries: Mapping[bytes, bytes], added: int) -> None:
        """Write entries, of which `added` have keys that the map does not hold yet."""
        if entries:
            self._count += added
            self.reserve(self._count)
            self.map.update_batch(entries.items())

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove entries that the map holds."""
        if keys:
            self.map.delete_batch(keys)
            self._count -= len(keys)

    def replace(self, wanted: Mapping[bytes, bytes]) -> int:
        """Make the map hold exactly `wanted`; how many entries that changed or removed."""
        found = self.read()
        self._count = len(found)
        changed = {key: value for key, value in wanted.items() if found.get(key) != value}
        extra = list(found.keys() - wanted.keys())
        self.write(changed, len(wanted.keys() - found.keys()))
        self.delete(extra)
        return len(changed) + len(extra)

    @property
    def held(self) -> int:
        """Entries of those kinds that have a number of entries; 0 for arrays."""
        return self._count

    def settle(self) -> None:
        """Wait until no program reads what was there before (a grace period).

        The kernel waits for one whenever a slot of a map of maps is written.
        """
        self._put()

    def make(self, capacity: int) -> Map:
        """An empty map of this kind, not in force yet."""
        return Map.create(*self._shape, capacity, flags=self._flags, name=self.name)

    def _put(self) -> None:
        self._outer.update(self._slot, NUMBER.pack(self.map.fd))
