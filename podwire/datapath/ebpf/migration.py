"""From maps of an older layout to ours, under traffic.

Programs of ours are loaded beside those that run, onto maps of their own; maps that did not change
are shared by both. Whatever the parts write is written to ours, and connections are converted. Then
the links get the new programs, one after the other, and the connections that began meanwhile are
converted too; until then a TCP packet without an entry waits for its sender to repeat it.

Whoever changes the meaning of a pinned map raises `layout.VERSION` and says in `STEPS` what becomes
of the map; what is not named is shared, so nothing else has to be done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from podwire.datapath.ebpf import pinned
from podwire.datapath.ebpf.layout import VERSION
from podwire.errors import KernelError
from podwire.kernel.bpf import Map, MapType, pins

Convert: TypeAlias = Callable[[bytes, bytes], tuple[bytes, bytes]]
"""An entry of the next layout from one of this."""

STEPS: Mapping[int, Mapping[str, Convert | None]] = {
    3: dict.fromkeys(("rules", "identities", "subjects", "tags")),  # got a second slot
    4: {"counters": None},  # one reason more
}
"""By the version that is left: the maps that the next one changed. None: made anew, empty, for the
parts to fill from their tables. A function converts: `connections` and `affinities`, which no table
knows, and `frontends`, whose numbers those two refer to."""
_OWN = {"settings"}  # the phase of the newer programs is none of the older ones'


class Migration:
    """What is to be done for one node; nothing, when there is no older layout.

    Raises KernelError when the pins are of a layout newer than ours.
    """

    def __init__(self, node: str) -> None:
        found = list(pinned.layouts(pinned.folder(node)))
        newer = [version for version in found if version > VERSION]
        if newer:
            raise KernelError(
                f"{pinned.folder(node)} holds maps of layout {newer[-1]}, this podwire knows up to "
                f"{VERSION}: start the newer one again, or run `podwire agent --cleanup` first, "
                "which ends connections through Services"
            )
        self._folder = pinned.folder(node)
        older = [version for version in found if version < VERSION]
        self._chain = list(range(older[-1], VERSION)) if older else []
        self._changed: set[str] = {name for step in self._chain for name in STEPS.get(step, {})}

    def __bool__(self) -> bool:
        return bool(self._chain)

    @property
    def shared(self) -> dict[str, Path]:
        """Pins of maps that are the same in both layouts."""
        if not self._chain:
            return {}
        folder = pinned.layouts(self._folder)[self._chain[0]]
        own = self._changed | _OWN
        return {path.name: path for path in folder.iterdir() if path.name not in own}

    @property
    def converted(self) -> set[str]:
        """Maps whose entries come along although they changed."""
        steps = [STEPS.get(step, {}) for step in self._chain]
        return {n for n in self._changed if all(each.get(n, _same) is not None for each in steps)}

    def convert(self, name: str) -> dict[bytes, bytes]:
        """The entries of an older map as our layout has them; none where it is made anew."""
        if name not in self.converted:
            return {}
        steps = [STEPS.get(step, {}).get(name) or _same for step in self._chain]
        found = pins.open_map(pinned.layouts(self._folder)[self._chain[0]] / name)
        entries = _entries(found) if found is not None else {}
        for step in steps:
            entries = dict(step(key, value) for key, value in entries.items())
        return entries

    def finish(self) -> None:
        """Drop the older layouts: nothing runs on them any more."""
        for version, path in pinned.layouts(self._folder).items():
            if version < VERSION:
                pins.remove(path)
        self._chain, self._changed = [], set()


def _same(key: bytes, value: bytes) -> tuple[bytes, bytes]:
    return key, value


def _entries(outer: Map) -> dict[bytes, bytes]:
    """All entries, of both maps of one that is growing; closes `outer`."""
    out: dict[bytes, bytes] = {}
    if outer.info.type != MapType.ARRAY_OF_MAPS:
        out.update(outer.items())
    else:
        for slot in sorted((slot for slot, _ in outer.items()), reverse=True):
            inner = outer.inner(slot)  # the one in force last: its entries are the newer ones
            if inner is not None:
                out.update(inner.items())
                inner.close()
    outer.close()
    return out
