"""The node's programs and maps: loaded once for all parts, pinned, attached, replaced in place.

Everything lives under ``/sys/fs/bpf/podwire/<node>``: ``maps/`` and ``links/``. A process that
starts finds what an earlier one left, loads its own programs onto the same maps, and swaps the
program of each link in one step. Traffic goes on in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from podwire.datapath.ebpf.connections import LIMIT, Connections
from podwire.datapath.ebpf.growing import GrowingMap
from podwire.datapath.ebpf.housekeeping import Housekeeping
from podwire.datapath.ebpf.layout import (
    BACKEND,
    CONNECTION,
    COOKIE,
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
    VERSION,
    DetectBy,
    Reason,
    mapped,
)
from podwire.errors import KernelError, Unsupported
from podwire.kernel import link as links
from podwire.kernel import netns
from podwire.kernel.bpf import (
    AttachType,
    Link,
    LoadedObject,
    Map,
    MapType,
    ObjectSpec,
    Program,
    features,
    objects,
    pins,
)
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import Address
from podwire.nodes import OVERLAY_DEVICES

OBJECTS = Path(__file__).resolve().parents[2] / "built" / "bpf"
_LOOPBACK = 1
_REASONS = {reason.value: reason.name.lower() for reason in Reason}
_HAVE_PORTS = ("bridge", "bond", "team")
_SO_NETNS_COOKIE = 71

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
_SOCKET_HOOKS = {
    f"{hook.lower()}{family}": AttachType[f"{hook}{family}"]
    for hook in ("CONNECT", "SENDMSG", "RECVMSG", "GETPEERNAME")
    for family in (4, 6)
}
_NEEDS = {"terminate": "bpf_sock_destroy", "adopt": "bpf_iter_tcp"}  # what not all kernels have
_TCX = {"ingress": AttachType.TCX_INGRESS, "egress": AttachType.TCX_EGRESS}


def missing() -> list[str]:
    """What the data path needs and this kernel or machine lacks, in words. Empty: all is there."""
    lacks = features.missing()
    if not objects.has_libbpf():
        lacks.append("libbpf.so.1")
    if not any(OBJECTS.glob("*.bpf.o")):
        lacks.append(f"compiled programs in {OBJECTS} (install clang, run make setup)")
    return lacks


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
        self.node = node or f"net-{_namespace(netns_fd)}"
        self._cgroup = cgroup
        self._capacity = connections
        self._room = room or {}
        self.held: dict[str, int] = {}
        """Entries of maps whose writers count them."""
        self._features: set[str] = set()
        self._objects: dict[str, LoadedObject] = {}
        self._links: dict[str, Link] = {}
        self._pods: set[int] = set()
        self.namespaces: dict[int, str] = {}
        """Paths of pods' network namespaces, by the host's end of their veths."""
        self._node: dict[int, Address] = {}
        self._detect = DetectBy.NONE
        self._overlay = 0
        self.maps: dict[str, Map] = {}
        self.growing: dict[str, GrowingMap] = {}
        self.connections = Connections(self, self._room.get("connections", LIMIT))
        self._housekeeping = Housekeeping(netns_fd, self._keep_house, self._follow_links)
        self.lock = threading.RLock()
        """Held by whoever uses programs or maps while others may replace them."""

    @property
    def netns_fd(self) -> int | None:
        return self._netns_fd

    @property
    def folder(self) -> Path:
        """Where the pins are; made with the first of them."""
        return pins.place(self.node)

    @property
    def features(self) -> frozenset[str]:
        return frozenset(self._features)

    def enable(self, *wanted: str) -> None:
        """Switch on ``services``, ``policy``, ``pods``, ``masquerade``, ``overlay`` or ``dsr``.

        What is loaded already is loaded anew with them and replaced. Whoever needs several names
        them together: programs that judge are then never replaced by programs that do not.
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
            self.sync_links()
        self._housekeeping.start()

    def reload(self) -> None:
        """Load the programs anew and put each in the place of the one that runs."""
        with self.lock:
            self._load()

    def add_pod(self, ifindex: int) -> None:
        """The host's end of a pod's veth is to be treated as one."""
        with self.lock:
            self._pods.add(ifindex)
            self._attach_interface(ifindex)

    def remove_pod(self, ifindex: int) -> None:
        """The veth is gone or is going."""
        with self.lock:
            self._pods.discard(ifindex)
            for name in list(self._names(ifindex)):
                self._detach(name)

    def accelerate(self, ifindex: int, *, generic: bool = False) -> None:
        """Run Services at the driver of an uplink (XDP), for backends on other nodes.

        `generic`: in the stack, where the driver cannot. Such packets are seen by no capture on
        this node. Raises KernelError, from the driver too (EOPNOTSUPP).
        """
        with self.lock:
            with netns.entered(self._netns_fd):
                link = Link.xdp(self.program("from_driver"), ifindex, generic=generic)
            self._keep(f"from_driver-{ifindex}-{'generic' if generic else 'native'}", link)

    def decelerate(self, ifindex: int) -> None:
        """Take XDP from a link again."""
        with self.lock:
            for kind in ("generic", "native"):
                name = f"from_driver-{ifindex}-{kind}"
                if name in self._links:
                    self._links[name].detach()  # at once: the kernel lets go of pins later
                    self._detach(name)

    def accelerated(self) -> dict[int, bool]:
        """Links that run XDP, by index; the value says whether in the stack (generic)."""
        names = [name.split("-") for name in self._links if name.startswith("from_driver-")]
        return {int(ifindex): kind == "generic" for _, ifindex, kind in names}

    def sync_links(self) -> list[int]:
        """Attach to interfaces that are new and let go of those that are gone; the new ones.

        An interface may be gone again before its turn comes.
        """
        with self.lock:
            present = self.dump_links()
            for name in list(self._links):
                if self._links[name].info.target == 0:
                    self._detach(name)
                    self._forget_pod(name)
            new = [index for index in present if not any(self._names(index))]
            for index in new:
                try:
                    self._attach_interface(index, has_ports=present[index].kind in _HAVE_PORTS)
                except KernelError as error:
                    if error.errno != errno.ENODEV:
                        raise
            self._sync_overlay(present.values())
            return new

    def _sync_overlay(self, present: Iterable[links.Link]) -> None:
        """Both ends of the device between nodes; programs check it once tunnels are known."""
        names = OVERLAY_DEVICES.values() if "overlay" in self._features else ()
        found = next((each.index for each in present if each.name in names), 0)
        if found:
            try:
                self._attach_tcx("from_overlay", found, "ingress", first=True)
                self._attach_tcx("to_overlay", found, "egress")
            except KernelError as error:
                if error.errno != errno.ENODEV:
                    raise
        checked = found if self.growing["tunnels"].held else 0
        if checked != self._overlay:
            self._overlay = checked
            held = self.maps["settings"].lookup(NUMBER.pack(0)) or bytes(SETTINGS.size)
            settings = (*SETTINGS.unpack(held)[:-1], checked)
            self.maps["settings"].update(NUMBER.pack(0), SETTINGS.pack(*settings))

    def _forget_pod(self, name: str) -> None:
        """The interface of a pod's link is gone; what gets its index next is no pod."""
        program, index, *_ = name.split("-")
        if program == "from_pod":
            self._pods.discard(int(index))
            self.maps["interfaces"].delete(NUMBER.pack(int(index)))

    def dump_links(self) -> dict[int, links.Link]:
        """The interfaces of the node's namespace, by index."""
        with NetlinkSocket(netns_fd=self._netns_fd) as netlink:
            return {found.index: found for found in links.dump(netlink)}

    def program(self, name: str) -> Program:
        """A loaded program by its name in C."""
        for loaded in self._objects.values():
            if name in loaded.programs:
                return loaded.programs[name]
        raise KeyError(name)

    def attachments(self) -> Mapping[str, Link]:
        """Links by pin name: program, interface, direction."""
        return self._links

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
        self.maps["settings"].update(
            NUMBER.pack(0), SETTINGS.pack(*node, self._detect, self._overlay)
        )

    def outcomes(self) -> dict[str, int]:
        """Packets by what became of them, since the maps were made."""
        return outcomes(self.maps["counters"]) if "counters" in self.maps else {}

    def close(self) -> None:
        """Let go of descriptors; what is pinned goes on working."""
        self._housekeeping.stop()
        with self.lock:
            for loaded in self._objects.values():
                loaded.close()
            for link in self._links.values():
                link.close()
            for growing in self.growing.values():
                growing.map.close()
            self._objects, self._links, self.maps, self.growing = {}, {}, {}, {}
            self._features.clear()

    def cleanup(self) -> None:
        """Detach and forget everything of this node, whoever made it."""
        self.close()
        pins.remove(self.folder)

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
            if self._objects:
                self.sync_links()

    def _keep_house(self) -> None:
        with self.lock:
            self.connections.maintain()

    def _load(self) -> None:
        if not self._objects and self.is_abandoned():
            pins.remove(self.folder)
        self._check_layout()
        loaded: dict[str, LoadedObject] = {}
        for path in sorted(OBJECTS.glob("*.bpf.o")):
            name = path.name.removesuffix(".bpf.o")
            if name in _NEEDS and not features.has_kfunc(_NEEDS[name]):
                continue
            loaded[name] = self._load_object(path)
        before, self._objects = self._objects, loaded
        self.maps = {name: map for o in loaded.values() for name, map in o.maps.items()}
        for name, (kind, key, value, entries) in _GROWING.items():
            size = self._capacity if name == "connections" else entries
            if name in self.growing:
                self.growing[name].map.close()
            self.growing[name] = GrowingMap(name, self.maps[name], kind, key, value, size)
        self._adopt_links()
        if self._cgroup and "services" in self._features:
            self._attach_sockets(self._cgroup)
        for old in before.values():
            old.close()

    def _load_object(self, path: Path) -> LoadedObject:
        spec = ObjectSpec(path)
        folder = pins.directory(self.node, "maps")
        shared = [name for name in spec.maps if "." not in name]
        kept: dict[str, Map] = {}
        for name in shared:
            found = pins.open_map(folder / name)
            if found:
                kept[name] = found
                spec.use_map(name, found)
            elif name in self._room:
                spec.set_max_entries(name, self._room[name])
        spec.set_constants({k: v for k, v in self._constants().items() if k in spec.constants})
        try:
            loaded = spec.load()
        finally:
            for map in kept.values():
                map.close()
        for name in shared:
            if name not in kept:
                pins.pin(loaded.maps[name], folder / name)
        return loaded

    def _constants(self) -> dict[str, bytes]:
        def flag(feature: str) -> bytes:
            return bytes([feature in self._features])

        return {
            "with_services": flag("services"),
            "with_policy": flag("policy"),
            "with_pods": flag("pods"),
            "with_masquerade": flag("masquerade"),
            "with_overlay": flag("overlay"),
            "with_dsr": flag("dsr"),
            "node_netns_cookie": COOKIE.pack(netns_cookie(self._netns_fd)),
        }

    def _check_layout(self) -> None:
        path = pins.directory(self.node) / "layout"
        found = pins.open_map(path)
        if found is None:
            found = Map.create(MapType.ARRAY, 4, 4, 1, name="layout")
            found.update(NUMBER.pack(0), NUMBER.pack(VERSION))
            pins.pin(found, path)
        version = NUMBER.unpack(found.lookup(NUMBER.pack(0)) or bytes(4))[0]
        found.close()
        if version != VERSION:
            raise KernelError(
                f"{self.folder} holds maps of layout {version}, this podwire uses {VERSION}: run "
                "`podwire agent --cleanup` first, which ends connections through Services"
            )

    def is_abandoned(self) -> bool:
        """Whether the pins are those of a namespace that is gone: even its lo has no link left."""
        found = [pins.open_link(path) for path in (self.folder / "links").glob("*-egress")]
        alive = any(link.info.target for link in found if link is not None)
        for link in found:
            if link is not None:
                link.close()
        return bool(found) and not alive

    def _adopt_links(self) -> None:
        folder = pins.directory(self.node, "links")
        for path in folder.iterdir():
            link = self._links.pop(path.name, None) or pins.open_link(path)
            if link is None:
                continue
            program = path.name.split("-")[0]
            if link.info.target == 0 or not self._has(program):
                link.close()
                path.unlink(missing_ok=True)
                continue
            link.update(self.program(program))
            self._links[path.name] = link
            if program == "from_pod":
                self._pods.add(link.info.target)

    def _has(self, program: str) -> bool:
        return any(program in loaded.programs for loaded in self._objects.values())

    def _attach_interface(self, ifindex: int, *, has_ports: bool = False) -> None:
        """What came in by a port was seen there; on the interface that has it, it looks new."""
        ingress = "from_pod" if ifindex in self._pods else "from_network"
        if ifindex != _LOOPBACK and not has_ports:
            self._attach_tcx(ingress, ifindex, "ingress")
            for other in {"from_pod", "from_network"} - {ingress}:
                self._detach(f"{other}-{ifindex}-ingress")
        self._attach_tcx("from_node", ifindex, "egress")

    def _attach_tcx(
        self, program: str, ifindex: int, direction: str, *, first: bool = False
    ) -> None:
        name = f"{program}-{ifindex}-{direction}"
        if name not in self._links:
            with netns.entered(self._netns_fd):
                link = Link.tcx(self.program(program), ifindex, _TCX[direction], first=first)
            self._keep(name, link)

    def _attach_sockets(self, cgroup: Path) -> None:
        for program, where in _SOCKET_HOOKS.items():
            name = f"{program}-cgroup"
            if name not in self._links:
                self._keep(name, Link.cgroup(self.program(program), str(cgroup), where))

    def _keep(self, name: str, link: Link) -> None:
        try:
            pins.pin(link, pins.directory(self.node, "links") / name)
        except BaseException:
            link.close()
            raise
        self._links[name] = link

    def _detach(self, name: str) -> None:
        link = self._links.pop(name, None)
        if link:
            # at once, so that another may come here; without, the kernel does it some time later
            with contextlib.suppress(KernelError):
                link.detach()
            link.close()
            (self.folder / "links" / name).unlink(missing_ok=True)

    def _names(self, ifindex: int) -> Iterable[str]:
        return (name for name in self._links if name.split("-")[1] == str(ifindex))


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


def _namespace(netns_fd: int | None) -> int:
    """The number of the namespace, also the caller's own."""
    if netns_fd is not None:
        return netns.inode(netns_fd)
    own = netns.current()
    try:
        return netns.inode(own)
    finally:
        os.close(own)


def netns_cookie(netns_fd: int | None) -> int:
    """The number by which socket programs know a namespace; 0 where the kernel has none (5.14)."""
    with netns.socket(netns_fd, socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return COOKIE.unpack(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0]
        except OSError:
            return 0
