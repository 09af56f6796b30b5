"""A RouteTable made true in the kernel: routes to the other nodes' pods, and the overlay's device.

Ours are the routes with `ROUTE_PROTOCOL` in the main table and everything on that device. What
others made is never touched: a route of theirs in the way is a problem to be named, not replaced.

Every change reconciles with what the kernel holds, and `concerns` tells from a notification
whether somebody interfered, so nothing is listed while all is quiet.

The device (VXLAN, or Geneve where the kernel has it) is one for all nodes and all VNIs: it collects
metadata. Where a packet goes is said by the route's encapsulation, or by eBPF, which puts the
sender's identity in the VNI; so nodes on different data paths understand each other. VXLAN uses UDP
port 8472, which the firewalls of most clusters let through for flannel and Cilium. The device
learns nothing and has no link-local address: all its entries are permanent and ours. Forwarding
entries move no packet on it: they tell people and tools that ask `bridge fdb` which node a MAC is.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator

from podwire.kernel import address, geneve, link, neighbour, route, vxlan
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.geneve import Geneve
from podwire.kernel.link import End, Link
from podwire.kernel.monitor import LOST, Event
from podwire.kernel.neighbour import Forward, Neighbour
from podwire.kernel.netlink import NetlinkSocket, Request
from podwire.kernel.route import Encapsulation, Route
from podwire.kernel.vxlan import Vxlan
from podwire.net import Address, Prefix, format_address
from podwire.nodes import (
    OVERLAY_DEVICES,
    OVERLAY_ID,
    OVERLAY_PORTS,
    NodeRoute,
    RouteTable,
    TunnelProtocol,
)

ROUTE_PROTOCOL = 80
_VXLAN = Vxlan(0, OVERLAY_PORTS["vxlan"], collect_metadata=True)
_GENEVE = Geneve(OVERLAY_PORTS["geneve"])

_DEFAULT_MTU = 1500
_HINTS = {
    errno.EADDRINUSE: " (its UDP port is taken, as by a VXLAN device of flannel or Cilium)",
    errno.EEXIST: " (one that is not podwire's is in the way)",
    errno.ENETUNREACH: " (direct routing needs nodes that share a link; else use vxlan)",
    errno.EHOSTUNREACH: " (direct routing needs nodes that share a link; else use vxlan)",
}


class NodeRoutes:
    """Applies RouteTables in one network namespace. Implements `datapath.Part[RouteTable]`.

    `guard` is called between the making of the device and its going up: no packet comes in by it
    before whoever judges them is there.
    """

    requirements = ()

    def __init__(
        self, netns_fd: int | None = None, *, guard: Callable[[], object] = lambda: None
    ) -> None:
        self._sock = NetlinkSocket(netns_fd=netns_fd)
        self._guard = guard
        self._table: RouteTable | None = None
        self._problems: dict[str, str] = {}
        self._underlay: Link | None = None
        self._device = 0

    def close(self) -> None:
        self._sock.close()

    def start(self) -> None:
        """Nothing to prepare: what an earlier process left is found by its marks."""

    def apply(self, table: RouteTable) -> None:
        """Make the kernel hold `table`; what it refuses is in `status` until `verify` succeeds."""
        if table != self._table:
            self._table = table
            self._reconcile(table)

    def flush(self) -> None:
        """Nothing waits."""

    def verify(self) -> list[str]:
        """Compare with the kernel and repair; each repair in words."""
        return self._reconcile(self._table) if self._table else []

    def cleanup(self) -> None:
        """Remove the devices and all our routes."""
        for device in OVERLAY_DEVICES.values():
            if link.find(self._sock, device):
                self._sock.run(link.delete(device).tolerating(errno.ENODEV))
        routes = route.dump(self._sock, protocol=ROUTE_PROTOCOL)
        self._sock.run(*(route.delete(each).tolerating(errno.ESRCH) for each in routes))
        self._table = None

    def status(self) -> dict[str, object]:
        table = self._table
        return {
            "routing": table.routing if table else "",
            "routes": len(table.routes) if table else 0,
            "mtu": self.pod_mtu(),
            "problems": dict(self._problems),
        }

    def pod_mtu(self) -> int:
        """The largest packet that a pod may send to pods of other nodes in one piece."""
        overhead = self._table.overhead if self._table else 0
        return (self._underlay.mtu if self._underlay else _DEFAULT_MTU) - overhead

    def concerns(self, event: Event) -> bool:
        """Whether a notification of `kernel.monitor` is a reason to `verify`."""
        if event == LOST:
            return True
        if event.type in (link.RTM_NEWLINK, link.RTM_DELLINK):
            seen, underlay = link.parse(event.body), self._underlay
            if underlay and seen.index == underlay.index:
                gone = event.type == link.RTM_DELLINK
                return gone or (seen.mtu, seen.up) != (underlay.mtu, underlay.up)
            return seen.name in OVERLAY_DEVICES.values()
        if event.type in (route.RTM_NEWROUTE, route.RTM_DELROUTE):
            changed = route.parse(event.body)
            return changed.protocol == ROUTE_PROTOCOL and changed.kind == route.UNICAST
        if event.type in (neighbour.RTM_NEWNEIGH, neighbour.RTM_DELNEIGH):
            return neighbour.parse(event.body).link == self._device
        return event.type in (address.RTM_NEWADDR, address.RTM_DELADDR)

    def _reconcile(self, table: RouteTable) -> list[str]:
        self._problems = {}
        self._underlay = self._find_underlay(table)
        repairs: list[str] = []
        self._device = 0
        overlay = bool(table.tunnel_mac and self._underlay)
        for protocol, device in OVERLAY_DEVICES.items():
            if not (overlay and protocol == table.protocol) and link.find(self._sock, device):
                self._do([link.delete(device)], repairs)
        if overlay and self._underlay:
            self._device = self._ensure_device(table, self._underlay.mtu, repairs)
            self._fill_device(table, repairs)
        self._ensure_routes(table, repairs)
        return repairs

    def _find_underlay(self, table: RouteTable) -> Link | None:
        """The link that carries this node's InternalIP."""
        for entry in address.dump(self._sock):
            if entry.address == table.underlay:
                return link.find(self._sock, entry.link)
        if table.underlay:
            text = format_address(table.underlay)
            self._problems["underlay"] = f"this node's InternalIP {text} is on none of its links"
        return None

    def _ensure_device(self, table: RouteTable, underlay_mtu: int, repairs: list[str]) -> int:
        name, mtu = OVERLAY_DEVICES[table.protocol], underlay_mtu - table.overhead
        found = link.find(self._sock, name)
        if found and not _is_ours(found, table.protocol):
            self._do([link.delete(name)], repairs)
            found = None
        if found is None:
            end = End(name, mac=table.tunnel_mac, mtu=mtu)
            no_link_local = link.configure(name, ipv6_address_generation="none")
            requests = [_add(end, table.protocol), no_link_local.tolerating(errno.EAFNOSUPPORT)]
            self._do(requests, repairs)
            self._guard()
            self._do([link.change(name, up=True)], repairs)
            found = link.find(self._sock, name)
        elif (found.mac, found.mtu, found.up) != (table.tunnel_mac, mtu, True):
            self._do([link.change(name, mac=table.tunnel_mac, mtu=mtu, up=True)], repairs)
        return found.index if found else 0

    def _fill_device(self, table: RouteTable, repairs: list[str]) -> None:
        """Addresses, neighbours and forwarding entries: exactly the table's, for all are ours."""
        device = self._device
        wanted = {InterfaceAddress(device, a, len(a) * 8) for a in table.tunnel_addresses}
        have = {entry._replace(flags=0) for entry in address.dump(self._sock, link=device)}
        # The last IPv4 address takes all neighbours with it: these are looked at afterwards.
        self._do([*map(address.add, wanted - have), *map(address.delete, have - wanted)], repairs)

        known = {Neighbour(device, n.address, n.mac) for n in table.neighbours}
        addresses = {entry.address for entry in known}
        permanent = {
            entry
            for entry in neighbour.dump(self._sock, link=device)
            if entry.state == neighbour.NUD_PERMANENT
        }
        requests = [neighbour.add(entry) for entry in known - permanent]
        requests += [
            neighbour.delete(entry) for entry in permanent if entry.address not in addresses
        ]

        if table.protocol == "vxlan" and len(table.underlay) == 4:  # it takes no others
            tunnels = {Forward(device, t.mac, t.remote) for t in table.fdb}
            macs = {tunnel.mac for tunnel in tunnels}
            forwards = set(neighbour.dump_forwards(self._sock, link=device))
            requests += map(neighbour.add_forward, tunnels - forwards)
            requests += [neighbour.delete_forward(f) for f in forwards if f.mac not in macs]
        self._do(requests, repairs)

    def _ensure_routes(self, table: RouteTable, repairs: list[str]) -> None:
        """Replace only routes of ours: to any other, an equal destination is a refusal."""
        overlay = table.routing == "vxlan"
        if overlay and not self._device:
            return
        wanted = {one for each in table.routes for one in self._routes(each, table.underlay)}
        ours = route.dump(self._sock, table=route.TABLE_MAIN, protocol=ROUTE_PROTOCOL)
        # With direct routing the kernel chooses the link.
        have = {each if overlay else each._replace(link=0): each for each in ours}
        slots = {(each.prefix, each.metric) for each in have}
        requests = [
            route.add(each, replace=(each.prefix, each.metric) in slots)
            for each in sorted(wanted - have.keys(), key=lambda each: bool(each.gateway))
        ]
        kept = {(each.prefix, each.metric) for each in wanted}
        requests += [
            route.delete(real)
            for each, real in have.items()
            if each not in wanted and (each.prefix, each.metric) not in kept
        ]
        self._do(requests, repairs)

    def _routes(self, to: NodeRoute, underlay: Address) -> Iterator[Route]:
        if not to.remote:
            yield route.via(to.prefix, to.gateway, 0, protocol=ROUTE_PROTOCOL)
            return
        tunnel = Encapsulation(OVERLAY_ID, to.remote, underlay, checksum=len(underlay) == 16)
        if to.prefix.bits == 128:
            # An IPv6 gateway that somebody's route covers is refused, onlink or not, unless ours is
            # narrower (net/ipv6/route.c, ip6_route_check_nh_onlink).
            narrow = route.direct(Prefix(to.gateway, 128), self._device, protocol=ROUTE_PROTOCOL)
            yield narrow._replace(tunnel=tunnel)
        yield route.via(
            to.prefix,
            to.gateway,
            self._device,
            onlink=True,
            protocol=ROUTE_PROTOCOL,
            tunnel=tunnel,
        )

    def _do(self, requests: Iterable[Request], repairs: list[str]) -> None:
        """Send; what went well is a repair, what was refused a problem."""
        batch = list(requests)
        _, failures = self._sock.attempt(batch)
        for failure in failures:
            hint = _HINTS.get(failure.errno, "")
            self._problems[failure.request.what] = f"{failure.error()}{hint}"
        repairs += [request.what for request in batch if request.what not in self._problems]


def _add(end: End, protocol: TunnelProtocol) -> Request:
    return vxlan.add_vxlan(end, _VXLAN) if protocol == "vxlan" else geneve.add_geneve(end, _GENEVE)


def _is_ours(device: Link, protocol: TunnelProtocol) -> bool:
    """Whether it is what we would make: another name's keeper may have made something else."""
    if device.kind != protocol:
        return False
    return vxlan.read(device) == _VXLAN if protocol == "vxlan" else geneve.read(device) == _GENEVE
