"""How full the maps are that do not grow without end, before they refuse anything.

Small maps are read; others are counted by whoever writes them, or by the walks that age them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from podwire.datapath.ebpf.programs import Programs

NEARLY_FULL = 0.8
_ENDS = 0.75  # so that a map that hovers does not flap
CONSEQUENCES = {
    "endpoints": "pods beyond it cannot be added",
    "interfaces": "pods beyond it cannot be added",
    "namespaces": "pods beyond it cannot be added",
    "prefixes": "Service and pod ranges beyond it cannot be set",
    "affinities": "clients beyond it are balanced anew with each connection",
    "rulings": "policies beyond it are enforced, but not counted",
    "hits": "connections of Services beyond it are not counted",
    "connections": "new connections beyond it are dropped",
}
_SMALL = ("endpoints", "interfaces", "namespaces", "prefixes")


class Fill(NamedTuple):
    """Entries that a map holds, and that it can hold at most.

    Of `hits` with ample room, `held` is those that it could hold.
    """

    name: str
    held: int
    room: int

    @property
    def share(self) -> float:
        return self.held / self.room

    def __str__(self) -> str:
        return (
            f"eBPF map {self.name} is {self.share:.0%} full ({self.held:,} of {self.room:,}): "
            f"{CONSEQUENCES[self.name]}"
        )


def measure(programs: Programs) -> list[Fill]:
    """The maps with a limit. Maps that grow have none but the machine's memory."""
    with programs.lock:
        return list(_measure(programs))


def _measure(programs: Programs) -> Iterator[Fill]:
    for name in _SMALL:
        map = programs.maps[name]
        yield Fill(name, sum(1 for _ in map.items()), map.info.max_entries)
    connections = programs.connections
    yield Fill("affinities", connections.affinities, programs.maps["affinities"].info.max_entries)
    yield Fill("connections", connections.held, connections.limit)
    hits = programs.maps["hits"]
    growing, room = programs.growing, hits.info.max_entries
    most = growing["frontends"].held + growing["backends"].capacity
    if most >= NEARLY_FULL * room:
        most = sum(1 for _ in hits.items())
    yield Fill("hits", most, room)
    for name, held in programs.held.items():
        yield Fill(name, held, programs.maps[name].info.max_entries)


class Pressure:
    """Which maps are nearly full: from `NEARLY_FULL` on, until well below it again."""

    def __init__(self) -> None:
        self.full: dict[str, Fill] = {}

    def see(self, fills: Iterable[Fill]) -> list[Fill]:
        """Take in what was measured; returns the maps that have become nearly full just now."""
        new: list[Fill] = []
        for fill in fills:
            if fill.share >= NEARLY_FULL:
                if fill.name not in self.full:
                    new.append(fill)
                self.full[fill.name] = fill
            elif fill.share < _ENDS:
                self.full.pop(fill.name, None)
            elif fill.name in self.full:
                self.full[fill.name] = fill
        return new
