"""What the kernel holds of podwire's eBPF, read from the pins: no agent is asked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from podwire.datapath.ebpf.layout import NUMBER
from podwire.datapath.ebpf.programs import outcomes
from podwire.kernel.bpf import AttachType, Map, MapType, Program, pins
from podwire.kernel.bpf.programs import statistics

_KEYLESS = (MapType.RINGBUF, MapType.SK_STORAGE)
_WHOLE = (MapType.ARRAY, MapType.PERCPU_ARRAY)


class LinkState(NamedTuple):
    """One attachment; `target` is an interface index, or a cgroup's id."""

    node: str
    program: str
    hook: str
    target: int
    program_id: int


class MapState(NamedTuple):
    """One map; `held` is None for kinds that have no entries to count."""

    node: str
    name: str
    kind: str
    held: int | None
    capacity: int


class ProgramState(NamedTuple):
    """One program in use; runs and time are those of the interval that was watched."""

    node: str
    name: str
    id: int
    links: int
    runs: int
    nanoseconds: float
    verified_instructions: int


def nodes() -> list[str]:
    """Names of the folders of pins."""
    root = pins.ROOT / "podwire"
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


def link_states(node: str) -> Iterator[LinkState]:
    """What is attached where."""
    folder = pins.ROOT / "podwire" / node / "links"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        link = pins.open_link(path)
        if link is not None:
            info = link.info
            link.close()
            hook = AttachType(info.attach_type).name.lower().replace("_", " ")
            if path.name.endswith("-generic"):
                hook += " generic"
            program = path.name.split("-")[0]
            yield LinkState(node, program, hook, info.target, info.program_id)


def map_states(node: str) -> Iterator[MapState]:
    """How full the maps are; of maps that grow, the one in force."""
    folder = pins.ROOT / "podwire" / node / "maps"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        outer = pins.open_map(path)
        if outer is None:
            continue
        inner = outer.inner(NUMBER.pack(0)) if outer.info.type == MapType.ARRAY_OF_MAPS else outer
        if inner is not None:
            yield MapState(
                node,
                path.name,
                MapType(inner.info.type).name.lower(),
                _held(inner),
                inner.info.max_entries,
            )
            inner.close()
        outer.close()


def program_states(node: str, watch_s: float) -> list[ProgramState]:
    """The programs of a node, watched for `watch_s` seconds."""
    links: dict[int, int] = {}
    for link in link_states(node):
        links[link.program_id] = links.get(link.program_id, 0) + 1
    programs = {id: Program.by_id(id) for id in links}
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
            ProgramState(node, info.name, id, links[id], runs, each, info.verified_instructions)
        )
    return sorted(out, key=lambda state: state.name)


def node_outcomes(node: str) -> dict[str, int]:
    """Packets by what became of them."""
    counters = pins.open_map(pins.ROOT / "podwire" / node / "maps" / "counters")
    if counters is None:
        return {}
    try:
        return outcomes(counters)
    finally:
        counters.close()


def _held(map: Map) -> int | None:
    if map.info.type in _KEYLESS:
        return None
    if map.info.type in _WHOLE:
        return map.info.max_entries
    return sum(1 for _ in map.items())
