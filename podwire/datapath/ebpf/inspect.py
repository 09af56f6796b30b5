"""What the kernel holds of podwire's eBPF, read from the pins: no agent is asked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from podwire.datapath.ebpf import pinned
from podwire.datapath.ebpf.layout import NUMBER, SETTINGS
from podwire.datapath.ebpf.programs import POLICY_MAPS, outcomes
from podwire.kernel import link as links
from podwire.kernel import netns
from podwire.kernel.bpf import AttachType, Map, MapType, Program, features, pins
from podwire.kernel.bpf.programs import statistics
from podwire.kernel.netlink import NetlinkSocket

_KEYLESS = (MapType.RINGBUF, MapType.SK_STORAGE, MapType.ARRAY, MapType.PERCPU_ARRAY)
_FULL = {
    MapType.HASH: "refuses",
    MapType.PERCPU_HASH: "refuses",
    MapType.LPM_TRIE: "refuses",
    MapType.LRU_HASH: "oldest go",
    MapType.RINGBUF: "newest are lost",
}


class Place(NamedTuple):
    """A node's pins, and the network namespace in which its interfaces have their names."""

    node: str
    folder: Path
    netns: Path | None = None
    """None: the caller's."""


class LinkState(NamedTuple):
    """One attachment; `target` is an interface index, or a cgroup's id.

    `interface` is its name, or the cgroup's path; `pod` who is behind it, ``namespace/name``.
    """

    node: str
    program: str
    hook: str
    target: int
    interface: str
    pod: str
    program_id: int


class MapState(NamedTuple):
    """One map; `held` is None for kinds that have no entries to count.

    `when_full`: ``grows``, ``refuses``, ``oldest go``, ``newest are lost``; "": it cannot be.
    `memory` in bytes.
    """

    node: str
    name: str
    kind: str
    held: int | None
    capacity: int
    when_full: str
    memory: int


class ProgramState(NamedTuple):
    """One program in use; runs and time are those of the interval that was watched."""

    node: str
    name: str
    id: int
    links: int
    runs: int
    nanoseconds: float
    verified_instructions: int


def places() -> list[Place]:
    """The nodes with pins in this mount namespace: usually the one that this machine is."""
    root = pins.ROOT / "podwire"
    found = sorted(root.iterdir()) if root.is_dir() else []
    return [Place(path.name, path) for path in found]


def link_states(place: Place) -> Iterator[LinkState]:
    """What is attached where."""
    folder = place.folder / "links"
    known = _interfaces(place)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        link = pins.open_link(path)
        if link is None:
            continue
        info = link.info
        link.close()
        if not info.target:
            continue  # the interface is gone
        hook = AttachType(info.attach_type).name.lower().replace("_", " ")
        if path.name.endswith("-generic"):
            hook += " generic"
        program = path.name.split("-")[0]
        if path.name.endswith("-cgroup"):
            hook, name, pod = f"cgroup {hook}", cgroup_path(info.target), ""
        else:
            found = known.get(info.target)
            name, pod = (found.name, found.alias) if found else (str(info.target), "")
        yield LinkState(place.node, program, hook, info.target, name, pod, info.program_id)


def layout(place: Place) -> int:
    """The version of the maps' layout; 0: no maps."""
    return next(iter(pinned.layouts(place.folder)), 0)


def map_states(place: Place) -> Iterator[MapState]:
    """How full the maps are; of maps that grow, the one in force, with the memory of all."""
    folder = pinned.maps_folder(place.folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        outer = pins.open_map(path)
        if outer is None:
            continue
        if outer.info.type == MapType.ARRAY_OF_MAPS:
            slots = [slot for slot, _ in outer.items()]
            inners = {slot: inner for slot in slots if (inner := outer.inner(slot)) is not None}
            memory = sum(inner.memory for inner in inners.values())
            inner = inners.get(_slot_in_force(folder, path.name))
            if inner is not None:
                yield _map_state(place.node, path.name, inner, "grows", memory)
            for each in inners.values():
                each.close()
        else:
            full = _FULL.get(MapType(outer.info.type), "")
            yield _map_state(place.node, path.name, outer, full, outer.memory)
        outer.close()


def _slot_in_force(maps: Path, name: str) -> bytes:
    settings = pins.open_map(maps / "settings") if name in POLICY_MAPS else None
    if settings is None:
        return NUMBER.pack(0)
    held = settings.lookup(NUMBER.pack(0))
    settings.close()
    return NUMBER.pack(SETTINGS.unpack(held)[-1] if held else 0)


def _map_state(node: str, name: str, map: Map, full: str, memory: int) -> MapState:
    kind = MapType(map.info.type)
    held = None if kind in _KEYLESS else sum(1 for _ in map.items())
    return MapState(node, name, kind.name.lower(), held, map.info.max_entries, full, memory)


def program_states(place: Place, watch_s: float) -> list[ProgramState]:
    """The programs of a node, watched for `watch_s` seconds."""
    attached: dict[int, int] = {}
    for link in link_states(place):
        attached[link.program_id] = attached.get(link.program_id, 0) + 1
    programs = {id: Program.by_id(id) for id in attached}
    counting = statistics()
    try:
        before = {id: program.info for id, program in programs.items()}
        time.sleep(watch_s)
        after = {id: program.info for id, program in programs.items()}
    finally:
        os.close(counting)
        for program in programs.values():
            program.close()
    out: list[ProgramState] = []
    for id, info in after.items():
        runs = info.run_count - before[id].run_count
        spent = info.run_time_ns - before[id].run_time_ns
        each = spent / runs if runs else 0.0
        out.append(
            ProgramState(
                place.node, info.name, id, attached[id], runs, each, info.verified_instructions
            )
        )
    return sorted(out, key=lambda state: state.name)


def node_outcomes(place: Place) -> dict[str, int]:
    """Packets by what became of them."""
    counters = pins.open_map(pinned.maps_folder(place.folder) / "counters")
    if counters is None:
        return {}
    try:
        return outcomes(counters)
    finally:
        counters.close()


def cgroup_path(id: int) -> str:
    """The directory of a cgroup, by its id (the number of its inode); the id where it is gone."""
    root = features.has_cgroup2()
    if root is not None:
        if root.stat().st_ino == id:
            return "/"
        for folder, names, _ in os.walk(root):
            for name in names:
                path = Path(folder, name)
                if path.stat().st_ino == id:
                    return f"/{path.relative_to(root)}"
    return str(id)


def _interfaces(place: Place) -> dict[int, links.Link]:
    fd = netns.open_path(str(place.netns)) if place.netns else None
    try:
        with NetlinkSocket(netns_fd=fd) as netlink:
            return {found.index: found for found in links.dump(netlink)}
    finally:
        if fd is not None:
            os.close(fd)
