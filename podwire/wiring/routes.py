"""A RouteTable made true in the kernel: routes to the other nodes' pods, and the VXLAN device.

Ours are the routes with `ROUTE_PROTOCOL` in the main table and everything on the VXLAN device. What
others made is never touched: a route of theirs in the way is a problem to be named, not replaced.

Every change reconciles with what the kernel holds, and `concerns` tells from a notification
whether somebody interfered, so nothing is listed while all is quiet.

The VXLAN device is one for all nodes and all VNIs (collect metadata): where a packet goes is said
by the route's encapsulation, or by eBPF, which puts the sender's identity in the VNI. So nodes on
different data paths understand each other. It uses UDP port 8472, which the firewalls of most
clusters let through for flannel and Cilium, learns nothing and has no link-local address: all its
entries are permanent and ours. On such a device the forwarding entries move no packet: they tell
people and tools that ask `bridge fdb` which node a MAC is.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable

from podwire.kernel import address, link, neighbour, route, vxlan
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.link import End, Link
from podwire.kernel.monitor import LOST, Event
from podwire.kernel.neighbour import Forward, Neighbour
from podwire.kernel.netlink import NetlinkSocket, Request
from podwire.kernel.route import Encapsulation, Route
from podwire.kernel.vxlan import Vxlan
from podwire.net import Address, format_address
from podwire.nodes import OVERLAY_DEVICE as DEVICE
from podwire.nodes import OVERLAY_ID, NodeRoute, RouteTable

ROUTE_PROTOCOL = 80
PORT = 8472

_DEFAULT_MTU = 1500
_HINTS = {
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
        """Remove the device and all our routes."""
        if link.find(self._sock, DEVICE):
            self._sock.run(link.delete(DEVICE).tolerating(errno.ENODEV))
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
            return seen.name == DEVICE
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
        if table.tunnel_mac and self._underlay:
            self._device = self._ensure_device(table, self._underlay.mtu, repairs)
            self._fill_device(table, repairs)
        else:
            self._device = 0
            if link.find(self._sock, DEVICE):
                self._do([link.delete(DEVICE)], repairs)
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
        wanted = Vxlan(0, PORT, collect_metadata=True)
        mtu = underlay_mtu - table.overhead
        found = link.find(self._sock, DEVICE)
        if found and (found.kind != "vxlan" or vxlan.read(found) != wanted):
            self._do([link.delete(DEVICE)], repairs)
            found = None
        if found is None:
            no_link_local = link.configure(DEVICE, ipv6_address_generation="none")
            requests = [
                vxlan.add_vxlan(End(DEVICE, mac=table.tunnel_mac, mtu=mtu), wanted),
                no_link_local.tolerating(errno.EAFNOSUPPORT),
            ]
            self._do(requests, repairs)
            self._guard()
            self._do([link.change(DEVICE, up=True)], repairs)
            found = link.find(self._sock, DEVICE)
        elif (found.mac, found.mtu, found.up) != (table.tunnel_mac, mtu, True):
            self._do([link.change(DEVICE, mac=table.tunnel_mac, mtu=mtu, up=True)], repairs)
        return found.index if found else 0

    def _fill_device(self, table: RouteTable, repairs: list[str]) -> None:
        """Addresses, neighbours and forwarding entries: exactly the table's, for all are ours."""
        device = self._device
        wanted = {InterfaceAddress(device, a, len(a) * 8) for a in table.tunnel_addresses}
        have = {entry._replace(flags=0) for entry in address.dump(self._sock, link=device)}
        requests = [*map(address.add, wanted - have), *map(address.delete, have - wanted)]

        known = {Neighbour(device, n.address, n.mac) for n in table.neighbours}
        addresses = {entry.address for entry in known}
        permanent = {
            entry
            for entry in neighbour.dump(self._sock, link=device)
            if entry.state == neighbour.NUD_PERMANENT
        }
        requests += map(neighbour.add, known - permanent)
        requests += [
            neighbour.delete(entry) for entry in permanent if entry.address not in addresses
        ]

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
        wanted = {self._route(each, table.underlay) for each in table.routes}
        ours = route.dump(self._sock, table=route.TABLE_MAIN, protocol=ROUTE_PROTOCOL)
        # With direct routing the kernel chooses the link.
        have = {each if overlay else each._replace(link=0): each for each in ours}
        slots = {(each.prefix, each.metric) for each in have}
        requests = [
            route.add(each, replace=(each.prefix, each.metric) in slots)
            for each in wanted - have.keys()
        ]
        kept = {(each.prefix, each.metric) for each in wanted}
        requests += [
            route.delete(real)
            for each, real in have.items()
            if each not in wanted and (each.prefix, each.metric) not in kept
        ]
        self._do(requests, repairs)

    def _route(self, to: NodeRoute, underlay: Address) -> Route:
        if not to.remote:
            return route.via(to.prefix, to.gateway, 0, protocol=ROUTE_PROTOCOL)
        tunnel = Encapsulation(OVERLAY_ID, to.remote, underlay, checksum=len(underlay) == 16)
        return route.via(
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
