"""Where a node's maps and links are pinned, and loading programs onto them.

``/sys/fs/bpf/podwire/<node>`` holds ``links/``, ``owner`` (the cookie of the network namespace) and
one folder of maps per layout, ``maps-<version>``. Two: an upgrade is under way (`migration`).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from podwire.datapath.ebpf.layout import COOKIE, NUMBER, VERSION
from podwire.errors import KernelError, Unsupported
from podwire.kernel import netns
from podwire.kernel.bpf import LoadedObject, Map, MapType, ObjectSpec, features, pins

_SO_NETNS_COOKIE = 71
_NEEDS = {"terminate": "bpf_sock_destroy", "adopt": "bpf_iter_tcp"}  # what not all kernels have


def nodes() -> list[str]:
    """Names of the folders of pins: of all nodes that share this BPF file system."""
    root = pins.ROOT / "podwire"
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


def folder(node: str) -> Path:
    """All that is pinned of a node; it need not be there."""
    return pins.place(node)


def layouts(place: Path) -> dict[int, Path]:
    """Folders of maps in a node's folder by their layout's version, the oldest first."""
    found = {int(path.name.split("-")[1]): path for path in place.glob("maps-*")}
    return dict(sorted(found.items()))


def maps_folder(place: Path) -> Path:
    """The maps that programs use; of two layouts the older, until the newer is in force."""
    return next(iter(layouts(place).values()), place / f"maps-{VERSION}")


def link_paths(node: str) -> list[Path]:
    links = folder(node) / "links"
    return sorted(links.iterdir()) if links.is_dir() else []


def is_abandoned(node: str) -> bool:
    """Whether the pins are those of a namespace that is gone: even its lo has no link left."""
    found = [pins.open_link(path) for path in link_paths(node) if path.name.endswith("-egress")]
    alive = any(link.info.target for link in found if link is not None)
    for link in found:
        if link is not None:
            link.close()
    return bool(found) and not alive


def remove(node: str) -> None:
    """Detach and forget everything of a node; nothing, when there is nothing."""
    place = folder(node)
    if place.is_dir():
        pins.remove(place)
    with contextlib.suppress(OSError):  # others are left
        place.parent.rmdir()


def owner(node: str) -> int:
    """The cookie of the network namespace whose pins these are; 0: not known."""
    found = pins.open_map(folder(node) / "owner")
    if found is None:
        return 0
    try:
        return COOKIE.unpack(found.lookup(NUMBER.pack(0)) or bytes(8))[0]
    finally:
        found.close()


def claim(node: str, cookie: int) -> None:
    """Write down whose pins these are."""
    path = pins.directory(node) / "owner"
    found = pins.open_map(path)
    if found is None:
        found = Map.create(MapType.ARRAY, 4, 8, 1, name="owner")
        pins.pin(found, path)
    found.update(NUMBER.pack(0), COOKIE.pack(cookie))
    found.close()


def netns_cookie(netns_fd: int | None) -> int:
    """The number by which socket programs know a namespace; 0 where the kernel has none (5.14)."""
    with netns.socket(netns_fd, socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return COOKIE.unpack(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0]
        except OSError:
            return 0


def another_version(what: str) -> KernelError:
    """The error of compiled programs that lack something Python counts on."""
    return KernelError(
        f"the compiled eBPF programs have no {what}: they were made for another version of podwire "
        "(run tools/setup)"
    )


def load_objects(
    node: str,
    objects: Path,
    constants: Mapping[str, bytes],
    older: Mapping[str, Path],
    room: Mapping[str, int],
) -> dict[str, LoadedObject]:
    """All programs, on the pinned maps of this layout; missing ones are made and pinned.

    `objects` is where the compiled ones are. `older` names pins of an older layout to go on with
    where there is none of ours yet, `room` the sizes of new maps. Raises Unsupported without
    compiled programs, KernelError.
    """
    paths = {path.name.removesuffix(".bpf.o"): path for path in sorted(objects.glob("*.bpf.o"))}
    if not paths:
        raise Unsupported(f"no compiled eBPF programs in {objects}: run tools/setup with clang")
    specs = {name: ObjectSpec(path) for name, path in paths.items() if _is_for_here(name)}
    for unknown in constants.keys() - {name for spec in specs.values() for name in spec.constants}:
        raise another_version(f"constant {unknown}")
    loaded: dict[str, LoadedObject] = {}
    try:
        for name, spec in specs.items():
            loaded[name] = _load_object(node, spec, constants, older, room)
    except BaseException:
        for each in loaded.values():
            each.close()
        raise
    return loaded


def _is_for_here(name: str) -> bool:
    return name not in _NEEDS or features.has_kfunc(_NEEDS[name])


def _load_object(
    node: str,
    spec: ObjectSpec,
    constants: Mapping[str, bytes],
    older: Mapping[str, Path],
    room: Mapping[str, int],
) -> LoadedObject:
    place = pins.directory(node, f"maps-{VERSION}")
    shared = [name for name in spec.maps if "." not in name]
    kept: dict[str, Map] = {}
    for name in shared:
        found = pins.open_map(place / name)
        if found is None and name in older:
            found = pins.open_map(older[name])
            if found is not None:
                pins.pin(found, place / name)
        if found is not None:
            kept[name] = found
            spec.use_map(name, found)
        elif name in room:
            spec.set_max_entries(name, room[name])
    spec.set_constants({k: v for k, v in constants.items() if k in spec.constants})
    try:
        loaded = spec.load()
    finally:
        for map in kept.values():
            map.close()
    for name in shared:
        if name not in kept:
            pins.pin(loaded.maps[name], place / name)
    return loaded


class PinnedMaps:
    """Maps of a node opened by name, without its programs: for whoever takes over from it.

    Raises KernelError when they are of another layout.
    """

    def __init__(self, node: str) -> None:
        self._folder = maps_folder(folder(node))
        if list(layouts(folder(node))) != [VERSION]:
            raise KernelError(f"{folder(node)} holds maps of another layout than {VERSION}")
        self._open: dict[str, Map] = {}

    def __enter__(self) -> PinnedMaps:
        return self

    def __exit__(self, *_: object) -> None:
        for map in self._open.values():
            map.close()

    def __getitem__(self, name: str) -> Map:
        if name not in self._open:
            found = pins.open_map(self._folder / name)
            if found is None:
                raise KernelError(f"{self._folder / name} is missing")
            self._open[name] = found
        return self._open[name]

    def items(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        """The entries of a map that grows, of the one in force and of one that is being left."""
        for slot, _ in self[name].items():
            inner = self[name].inner(slot)
            if inner is not None:
                yield from inner.items()
                inner.close()
