"""The node's programs and maps: loaded once for all parts, pinned, attached, replaced in place.

Everything lives under ``/sys/fs/bpf/podwire/<node>`` (`pinned`). A process that starts finds what
an earlier one left, loads its own programs onto the same maps, and swaps the program of each link
in one step. Traffic goes on in between. Whoever takes over from another data path, or from maps of
another layout, fills the maps first and attaches then.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from podwire.datapath.ebpf import pinned
from podwire.datapath.ebpf.attaching import Attachments
from podwire.datapath.ebpf.connections import LIMIT, Connections
from podwire.datapath.ebpf.growing import GrowingMap
from podwire.datapath.ebpf.housekeeping import Housekeeping
from podwire.datapath.ebpf.layout import (
    BACKEND,
    CONNECTION,
    COOKIE,
    EVENTS_PER_SECOND,
    FLOW,
    FRONTEND,
    FRONTEND_KEY,
    MAGLEV,
    MEMBER_KEY,
    NUMBER,
    PREFIX_KEY,
    RANGE_KEY,
    REMOTE,
    RULE,
    RULE_KEY,
    SETTINGS,
    SUBJECT,
    TUNNEL,
    DetectBy,
    Phase,
    Reason,
    mapped,
)
from podwire.datapath.ebpf.migration import Migration
from podwire.errors import KernelError, Unsupported
from podwire.kernel import link as links
from podwire.kernel import netns
from podwire.kernel.bpf import Link, LoadedObject, Map, MapType, Program, features, objects
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import Address
from podwire.nodes import OVERLAY_DEVICES

log = logging.getLogger(__name__)

OBJECTS = Path(__file__).resolve().parents[2] / "built" / "bpf"
_REASONS = {reason.value: reason.name.lower() for reason in Reason}

_GROWING = {  # name: kind, key and value size, entries to begin with
    "frontends": (MapType.HASH, FRONTEND_KEY.size, FRONTEND.size, 1024),
    "backends": (MapType.ARRAY, 4, BACKEND.size, 2048),
    "tables": (MapType.ARRAY, 4, MAGLEV.size, 64),
    "members": (MapType.HASH, MEMBER_KEY.size, 1, 1024),
    "addresses": (MapType.HASH, 16, 4, 1024),
    "ranges": (MapType.LPM_TRIE, RANGE_KEY.size, 1, 256),
    "networks": (MapType.LPM_TRIE, PREFIX_KEY.size, 4, 64),
    "identities": (MapType.LPM_TRIE, PREFIX_KEY.size, 4, 1024),
    "rules": (MapType.LPM_TRIE, RULE_KEY.size, RULE.size, 1024),
    "subjects": (MapType.HASH, 16, SUBJECT.size, 256),
    "tunnels": (MapType.LPM_TRIE, PREFIX_KEY.size, TUNNEL.size, 64),
    "tags": (MapType.HASH, 4, 4, 256),
    "connections": (MapType.HASH, FLOW.size, CONNECTION.size, 65536),
}
POLICY_MAPS = ("rules", "identities", "tags", "subjects")
"""Those whose numbers mean something only together."""
_MADE_BY_PROGRAMS = {"connections", "affinities"}


def missing() -> list[str]:
    """What the data path needs and this kernel or machine lacks, in words. Empty: all is there."""
    lacks = features.missing()
    if not objects.has_libbpf():
        lacks.append("libbpf.so.1")
    if not any(OBJECTS.glob("*.bpf.o")):
        lacks.append(f"compiled programs in {OBJECTS} (install clang, run make setup)")
    return lacks


class _Maps(dict[str, Map]):
    """By name in C. Raises KernelError for one that the compiled programs lack."""

    def __missing__(self, name: str) -> Map:
        raise pinned.another_version(f"map {name}")


class Programs:
    """Programs of one node. Thread-safe as far as its parts are.

    `netns_fd` is the node's network namespace (default: the caller's), `node` names the folder of
    pins (default: one for the namespace). `cgroup` is the cgroup v2 directory whose processes get
    Services at the socket; None: nobody. `connections` is the room for connection entries (two
    each) to begin with; `room` the sizes of maps that do not grow, when they are made.
    """

    def __init__(
        self,
        node: str = "",
        netns_fd: int | None = None,
        *,
        cgroup: Path | None = None,
        connections: int = 131072,
        room: Mapping[str, int] | None = None,
    ) -> None:
        self._netns_fd = netns_fd
        self.node = node or f"net-{netns.inode(netns_fd)}"
        self._cgroup = cgroup
        self._capacity = connections
        self._room = room or {}
        self.held: dict[str, int] = {}
        """Entries of maps whose writers count them."""
        self._features: set[str] = set()
        self._objects: dict[str, LoadedObject] = {}
        self._attachments = Attachments(self.node, netns_fd, self._find)
        self._migration: Migration | None = None
        self.namespaces: dict[int, str] = {}
        """Paths of pods' network namespaces, by the host's end of their veths."""
        self._node: dict[int, Address] = {}
        self._detect = DetectBy.NONE
        self._overlay = 0
        self._phase = Phase.SERVING
        self._policies = 0
        self.maps: dict[str, Map] = _Maps()
        self.growing: dict[str, GrowingMap] = {}
        self._spare: dict[str, GrowingMap] = {}
        self.connections = Connections(self, self._room.get("connections", LIMIT))
        self._housekeeping = Housekeeping(netns_fd, self._keep_house, self._follow_links)
        self.lock = threading.RLock()
        """Held by whoever uses programs or maps while others may replace them."""

    @property
    def netns_fd(self) -> int | None:
        return self._netns_fd

    @property
    def folder(self) -> Path:
        """Where everything is pinned; it need not be there."""
        return pinned.folder(self.node)

    @property
    def features(self) -> frozenset[str]:
        return frozenset(self._features)

    def enable(self, *wanted: str, attach: bool = True) -> None:
        """Switch on ``services``, ``policy``, ``pods``, ``masquerade`` or ``overlay``.

        What is loaded already is loaded anew with them and replaced. Whoever needs several names
        them together: programs that judge are then never replaced by programs that do not. Without
        `attach`, programs are only put in the place of those of the same layout.
        Raises Unsupported, naming what the kernel lacks; KernelError.
        """
        new = set(wanted) - self._features
        if not new:
            return
        lacking = missing()
        if lacking:
            raise Unsupported(f"the eBPF data path needs {lacking[0]}")
        with self.lock:
            self._features |= new
            try:
                self._load()
            except BaseException:
                self._features -= new
                raise
            if attach and self.phase is not Phase.SERVING:
                self.attach(Phase.SERVING)
        self._housekeeping.start()

    def attach(self, phase: Phase) -> None:
        """Put the programs on all interfaces, in `phase`.

        Connections in maps of an older layout come with them.
        """
        with self.lock:
            if self._migration:
                self._migrate(phase)
            else:
                self.set_phase(phase)
                self._attach()

    def set_phase(self, phase: Phase) -> None:
        """Say which packets are ours, for all programs at once."""
        with self.lock:
            self._phase = phase
            self._change_settings()

    @property
    def phase(self) -> Phase | None:
        """Which packets are ours; None while nothing is attached."""
        return self._phase if self._attachments.active else None

    def reload(self) -> None:
        """Load the programs anew and put each in the place of the one that runs."""
        with self.lock:
            self._load()

    def add_pod(self, ifindex: int) -> None:
        """The host's end of a pod's veth is to be treated as one."""
        with self.lock:
            self._attachments.add_pod(ifindex)

    def accelerate(self, ifindex: int, *, generic: bool = False) -> None:
        """Run Services at the driver of an uplink (XDP), for backends on other nodes.

        `generic`: in the stack, where the driver cannot. Such packets are seen by no capture on
        this node. Raises KernelError, from the driver too (EOPNOTSUPP).
        """
        with self.lock:
            self._attachments.attach_driver(ifindex, generic=generic)

    def decelerate(self, ifindex: int) -> None:
        """Take XDP from a link again."""
        with self.lock:
            self._attachments.detach_driver(ifindex)

    def accelerated(self) -> dict[int, bool]:
        """Links that run XDP, by index; the value says whether in the stack (generic)."""
        return self._attachments.drivers()

    def sync_links(self) -> list[int]:
        """Attach to interfaces that are new and let go of those that are gone; the new ones."""
        with self.lock:
            if not self._attachments.active:
                return []
            present = self.dump_links()
            new = self._attachments.sync(present, self._forget_pod)
            self._sync_overlay(present.values())
            return new

    def _sync_overlay(self, present: Iterable[links.Link]) -> None:
        """Both ends of the device between nodes; programs check it once tunnels are known."""
        names = OVERLAY_DEVICES.values() if "overlay" in self._features else ()
        found = next((each.index for each in present if each.name in names), 0)
        if found:
            self._attachments.attach_overlay(found)
        checked = found if self.growing["tunnels"].held else 0
        if checked != self._overlay:
            self._overlay = checked
            self._change_settings()

    def _forget_pod(self, ifindex: int) -> None:
        """The interface of a pod's link is gone; what gets its index next is no pod."""
        self.maps["interfaces"].delete(NUMBER.pack(ifindex))

    def dump_links(self) -> dict[int, links.Link]:
        """The interfaces of the node's namespace, by index."""
        with NetlinkSocket(netns_fd=self._netns_fd) as netlink:
            return {found.index: found for found in links.dump(netlink)}

    def program(self, name: str) -> Program:
        """A loaded program by its name in C."""
        found = self._find(name)
        if found is None:
            raise pinned.another_version(f"program {name}")
        return found

    def attachments(self) -> Mapping[str, Link]:
        """Links by pin name: program, interface, direction."""
        return self._attachments.links

    def set_node_addresses(self, addresses: Iterable[Address]) -> None:
        """What masquerading puts as source: the first of each family."""
        self._node = {len(address): address for address in reversed(list(addresses))}
        self._write_settings()

    def offer_node_address(self, address: Address) -> None:
        """As `set_node_addresses`, for a family that has none yet."""
        self._node.setdefault(len(address), address)
        self._write_settings()

    def set_detection(self, detect: DetectBy) -> None:
        """How pods are told from others."""
        self._detect = detect
        self._write_settings()

    def _write_settings(self) -> None:
        node = [mapped(self._node[size]) if size in self._node else bytes(16) for size in (4, 16)]
        values = (*node, self._detect, self._overlay, self._phase, self._policies)
        self.maps["settings"].update(NUMBER.pack(0), SETTINGS.pack(*values))

    def _read_settings(self) -> tuple[bytes, bytes, int, int, int, int]:
        held = self.maps["settings"].lookup(NUMBER.pack(0))
        return SETTINGS.unpack(held or bytes(SETTINGS.size))

    def _change_settings(self) -> None:
        """Write what this process knows from its start, and leave the rest as it is."""
        before = self._read_settings()
        after = (*before[:3], self._overlay, self._phase, self._policies)
        self.maps["settings"].update(NUMBER.pack(0), SETTINGS.pack(*after))

    def spare_policies(self) -> dict[str, GrowingMap]:
        """The maps of the slot that is not in force, with whatever they hold."""
        if not self._spare:
            self._spare = self._growing_maps(dict.fromkeys(POLICY_MAPS, 1 - self._policies))
        return self._spare

    def turn_policies(self) -> None:
        """Judge by the other slot, from one packet to the next."""
        with self.lock:
            spare = self.spare_policies()
            self._spare = {name: self.growing[name] for name in POLICY_MAPS}
            self.growing.update(spare)
            self._policies = 1 - self._policies
            self._change_settings()

    def reserve(self, room: Mapping[str, int]) -> None:
        """Make room in maps that grow, for so many entries each: all in one grace period."""

        def grow(name: str) -> None:
            self.growing[name].reserve(room[name])

        with ThreadPoolExecutor(len(_GROWING)) as pool:
            list(pool.map(grow, room))

    def outcomes(self) -> dict[str, int]:
        """Packets by what became of them, since the maps were made."""
        return outcomes(self.maps["counters"]) if "counters" in self.maps else {}

    def close(self) -> None:
        """Let go of descriptors; what is pinned goes on working."""
        self._housekeeping.stop()
        with self.lock:
            for loaded in self._objects.values():
                loaded.close()
            self._attachments.close()
            for growing in (*self.growing.values(), *self._spare.values()):
                growing.map.close()
            self._objects, self.maps, self.growing, self._spare = {}, _Maps(), {}, {}
            self._features.clear()
            self._migration = None

    def cleanup(self) -> None:
        """Detach and forget everything of this node, whoever made it."""
        self.close()
        pinned.remove(self.node)

    def abandon(self) -> None:
        """As `close`; but what never came to serve is forgotten."""
        self.close()
        if not pinned.link_paths(self.node):
            pinned.remove(self.node)

    def close_sockets(self, remotes: Collection[tuple[Address, bytes]]) -> None:
        """Close connected UDP sockets that a Service led to one of these (address, packed port).

        In the node's namespace and those of known pods; nothing on kernels before 6.5.
        """
        if "terminate" not in self._objects or self._cgroup is None:
            return
        gone = self.maps["gone"]
        keys = [REMOTE.pack(mapped(address), port) for address, port in remotes]
        link = Link.iterator(self.program("terminate"))
        try:
            for start in range(0, len(keys), gone.info.max_entries):
                part = keys[start : start + gone.info.max_entries]
                gone.update_batch((key, b"\1") for key in part)
                self._walk_sockets(link)
                gone.delete_batch(part)
        finally:
            link.close()

    def _walk_sockets(self, link: Link) -> None:
        with netns.entered(self._netns_fd):
            link.run()
        for path in self.namespaces.values():
            _run_in(path, link)

    @property
    def reads_sockets(self) -> bool:
        """Whether `adopt` is there to find what pods have open."""
        return "adopt" in self._objects

    def run_in_pods(self, program: str, ifindexes: Iterable[int]) -> None:
        """Run an iterator program in the namespaces of known pods."""
        link = Link.iterator(self.program(program))
        try:
            for index in ifindexes:
                if index in self.namespaces:
                    _run_in(self.namespaces[index], link)
        finally:
            link.close()

    def _follow_links(self) -> None:
        with self.lock:
            self.sync_links()

    def _keep_house(self) -> bool:
        with self.lock:
            self.connections.maintain()
            return self.connections.filling

    def _load(self) -> None:
        if self._migration is None:
            if pinned.is_abandoned(self.node):
                log.warning("removed pins of a namespace that is gone: %s", self.folder)
                pinned.remove(self.node)
            self._migration = Migration(self.node)
            pinned.claim(self.node, pinned.netns_cookie(self._netns_fd))
        found = bool(pinned.link_paths(self.node))
        loaded = pinned.load_objects(
            self.node, OBJECTS, self._constants(), self._migration.shared, self._room
        )
        before, self._objects = self._objects, loaded
        self.maps = _Maps(item for each in loaded.values() for item in each.maps.items())
        *_, self._overlay, phase, self._policies = self._read_settings()
        self._phase = Phase(phase)
        for growing in (*self.growing.values(), *self._spare.values()):
            growing.map.close()
        slots = {name: self._policies if name in POLICY_MAPS else 0 for name in _GROWING}
        self.growing = self._growing_maps(slots)
        self._spare = self._growing_maps({name: 1 - slots[name] for name in self._spare})
        for name in self._migration.converted - _MADE_BY_PROGRAMS:
            self.growing[name].replace(self._migration.convert(name))
        self._resume()
        if not found:
            self.set_phase(Phase.WAITING)
        elif not self._migration:
            self._attach()
        for old in before.values():
            old.close()

    def _growing_maps(self, slots: Mapping[str, int]) -> dict[str, GrowingMap]:
        """Maps by name, each in its slot. Those that are new wait for one grace period together."""

        def growing(name: str) -> GrowingMap:
            kind, key, value, entries = _GROWING[name]
            size = self._capacity if name == "connections" else entries
            return GrowingMap(name, self.maps[name], kind, key, value, size, slots[name])

        with ThreadPoolExecutor(len(_GROWING)) as pool:
            return dict(zip(slots, pool.map(growing, slots), strict=True))

    def _resume(self) -> None:
        """Go on where a process that died stopped."""
        for name in ("doomed", "gone"):  # what it was about to end
            if name in self.maps:
                self.maps[name].delete_batch([key for key, _ in self.maps[name].items()])
        self.connections.finish_move()

    def _attach(self) -> None:
        self._attachments.adopt()
        if self._cgroup and "services" in self._features:
            self._attachments.attach_sockets(self._cgroup)
        self.sync_links()

    def _migrate(self, phase: Phase) -> None:
        """See `migration`: entries are converted before and after the links get our programs."""
        assert self._migration is not None
        self.connections.add(self._migration.convert("connections"))
        self.set_phase(Phase.MOVING)
        self._attach()
        self.growing["connections"].settle()
        self.connections.add(self._migration.convert("connections"))
        affinities = self._migration.convert("affinities")
        held = {key for key, _ in self.maps["affinities"].items()}
        self.maps["affinities"].update_batch(
            (key, value) for key, value in affinities.items() if key not in held
        )
        self.set_phase(phase)
        self._migration.finish()

    def _find(self, name: str) -> Program | None:
        for loaded in self._objects.values():
            if name in loaded.programs:
                return loaded.programs[name]
        return None

    def _constants(self) -> dict[str, bytes]:
        def flag(feature: str) -> bytes:
            return bytes([feature in self._features])

        return {
            "with_services": flag("services"),
            "with_policy": flag("policy"),
            "with_pods": flag("pods"),
            "with_masquerade": flag("masquerade"),
            "with_kernel_lookup": bytes([features.has_kfunc("bpf_skb_ct_lookup")]),
            "with_overlay": flag("overlay"),
            "events_per_second": NUMBER.pack(EVENTS_PER_SECOND),
            "node_netns_cookie": COOKIE.pack(pinned.netns_cookie(self._netns_fd)),
        }


def _run_in(path: str, link: Link) -> None:
    """Walk the sockets of the namespace at `path`; those of one that is gone are, too."""
    try:
        fd = netns.open_path(path)
    except KernelError:
        return
    try:
        with netns.entered(fd):
            link.run()
    finally:
        os.close(fd)


def outcomes(counters: Map) -> dict[str, int]:
    """The counters by their names, over all CPUs; those of another layout by their numbers."""
    out: dict[str, int] = {}
    for key, values in counters.items():
        per_cpu = struct.iter_unpack("=Q", values)
        number = NUMBER.unpack(key)[0]
        name = _REASONS.get(number, f"reason_{number}")
        out[name] = sum(n for (n,) in per_cpu)
    return out
