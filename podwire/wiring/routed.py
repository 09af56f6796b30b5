"""Pods with addresses of their own and no bridge: a veth pair each, and routes. As on EKS.

The pod has its address as /32 (/128) and one neighbour, 169.254.1.1 (fe80::1), whose MAC it is
told; nobody has that address, the host end just takes what is sent to the MAC. The host has a route
to the pod, and where the address belongs to an ENI, rules: 512 what goes to the pod looks up main,
1536 what comes from it looks up the ENI's table. Nothing is resolved, learned or broadcast.

Rules, routes and neighbours that are ours carry `KERNEL_PROTOCOL`. The wiring remembers what it
made, so that `restore` can put back what somebody else wiped (systemd-networkd does).

Source: aws/amazon-vpc-cni-k8s, cmd/routed-eni-cni-plugin; docs/cni-proposal.md there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import threading
from collections.abc import Collection, Iterable
from typing import NamedTuple

import msgspec

from podwire.kernel import link, neighbour, route, rule, sysctl
from podwire.kernel.link import Link
from podwire.kernel.monitor import Event
from podwire.kernel.neighbour import Neighbour
from podwire.kernel.netlink import NetlinkSocket, Request
from podwire.kernel.route import TABLE_MAIN, Route
from podwire.kernel.rule import Rule
from podwire.net import Address, Prefix, host_prefix, parse_address
from podwire.wiring import KERNEL_PROTOCOL, Attachment, HostLink, PodAddress, PodRoute, veth
from podwire.wiring.interference import taken_away
from podwire.wiring.veth import VethWiring

PREFIX = "eni"
GATEWAYS = {4: parse_address("169.254.1.1"), 16: parse_address("fe80::1")}

# The places of the original among the rules; 1025-1534 are free for others.
TO_POD_PRIORITY = 512
FROM_POD_PRIORITY = 1536
_PRIORITIES = (TO_POD_PRIORITY, FROM_POD_PRIORITY)

_DEFAULT = {4: Prefix(bytes(4), 0), 16: Prefix(bytes(16), 0)}
_HOST_IFNAME = re.compile(PREFIX + r"[0-9a-f]{11}")
_GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV)


def host_ifname(attachment: Attachment) -> str:
    """``eni`` and 11 digits of SHA-1 of ``namespace.pod``, as the original names it.

    Further interfaces of a pod add theirs; what has no pod is named by its container.
    """
    pod, key = attachment.pod, attachment.key
    text = f"{pod.namespace}.{pod.name}" if pod.name else f"{key.network}.{key.container}"
    if key.ifname != "eth0":
        text += f".{key.ifname}"
    return PREFIX + hashlib.sha1(text.encode()).hexdigest()[:11]


class _State(NamedTuple):
    """What the host must hold for pods."""

    routes: set[Route]
    rules: set[Rule]
    neighbours: set[Neighbour]

    def additions(self) -> list[Request]:
        return [
            *(rule.add(each).tolerating(errno.EEXIST) for each in self.rules),
            *(route.add(each, replace=True) for each in self.routes),
            *map(neighbour.add, self.neighbours),
        ]

    def removals(self) -> list[Request]:
        requests = [
            *map(rule.delete, self.rules),
            *map(route.delete, self.routes),
            *map(neighbour.delete, self.neighbours),
        ]
        return [request.tolerating(*_GONE) for request in requests]

    def without(self, other: _State) -> _State:
        return _State(
            self.routes - other.routes,
            self.rules - other.rules,
            self.neighbours - other.neighbours,
        )


class RoutedWiring(VethWiring):
    """A `Wiring`."""

    def __init__(self, netns_fd: int | None = None) -> None:
        super().__init__(netns_fd)
        self._lock = threading.Lock()
        self._live: dict[int, Attachment] = {}  # by the host end's index, which is never reused
        self._silenced: set[int] = set()

    def host_ifname(self, attachment: Attachment) -> str:
        return host_ifname(attachment)

    def attach(self, attachment: Attachment, netns_fd: int) -> Attachment:
        attachment = _complete(attachment)
        with contextlib.ExitStack() as undo:
            host_end = self._make_pair(attachment, netns_fd)
            undo.callback(self._host.attempt, [link.delete(host_end.index)])
            attachment = msgspec.structs.replace(
                attachment,
                mtu=host_end.mtu,
                host_ifname=host_end.name,
                host_ifindex=host_end.index,
                host_mac=host_end.mac,
                host_links=(HostLink(host_end.name, host_end.mac, host_end.mtu),),
            )
            with NetlinkSocket(netns_fd=netns_fd) as pod:
                pod.run(*_pod_requests(attachment, host_end.link))
                veth.await_addresses(attachment, pod)
            with self._lock:
                undo.callback(self._host.attempt, _state([attachment]).removals())
                self._set_up_host(attachment)
                self._live[host_end.index] = attachment
            undo.pop_all()
        return attachment

    def check(self, attachment: Attachment, netns_fd: int) -> list[str]:
        with NetlinkSocket(netns_fd=netns_fd) as pod:
            problems = veth.check_pod(attachment, pod)
            ifname = attachment.key.ifname
            end = link.find(pod, ifname)
            known = {n.address: n.mac for n in neighbour.dump(pod, link=end.index)} if end else {}
            sizes = {len(each.address) for each in attachment.addresses}
            if any(known.get(GATEWAYS[size]) != attachment.host_mac for size in sizes):
                problems.append(f"{ifname} has not the host end's MAC for its gateway")
        host_end = link.find(self._host, attachment.host_ifindex)
        if host_end is None or host_end.name != attachment.host_ifname:
            return [*problems, f"the host end {attachment.host_ifname} is missing"]
        if not host_end.up:
            problems.append(f"{host_end.name} is down")
        missing = _state([attachment]).without(self._held())
        lacking = (*missing.routes, *missing.rules, *missing.neighbours)
        return problems + [f"the host lacks {each}" for each in map(_say, lacking)]

    def renew(self, attachment: Attachment) -> None:
        with self._lock:
            self._live[attachment.host_ifindex] = attachment
            super().renew(attachment)

    def silence(self, attachment: Attachment) -> None:
        index = attachment.host_ifindex
        with self._lock:
            self._live.pop(index, None)
            self._silenced.add(index)
            mine = _state([attachment])
            # A pod that was started anew may have the address, and has the name.
            stale = mine.without(_state(self._live.values()))
            requests = stale.removals()
            host_end = link.find(self._host, index) if index else None
            # Indexes begin anew with every boot: never touch another link.
            if host_end and host_end.name == attachment.host_ifname:
                requests.append(link.change(index, up=False).tolerating(*_GONE))
            self._host.run(*requests)

    def purge(self, host_ifnames: Collection[str]) -> None:
        with self._lock:
            in_use = {each.host_ifname for each in self._live.values()}
        super().purge([name for name in host_ifnames if name not in in_use])

    def links(self) -> Collection[str]:
        return {each.name for each in self._host_ends()}

    def reconcile(self, attachments: Collection[Attachment]) -> None:
        """Learn what there should be, remove what is too much and restore what is missing."""
        with self._lock:
            for each in attachments:
                if each.wiring == "routed" and each.host_ifindex not in self._silenced:
                    self._live.setdefault(each.host_ifindex, each)
        self.restore()

    def restore(self) -> list[str]:
        """Make rules, routes and neighbours what they should be; name each repair."""
        with self._lock:
            ends = {each.index: each.name for each in self._host_ends()}
            wanted = _state(
                each for index, each in self._live.items() if ends.get(index) == each.host_ifname
            )
            held = self._held()
            requests = [*held.without(wanted).removals(), *wanted.without(held).additions()]
            _, failures = self._host.attempt(requests)
        failed = {failure.request.what for failure in failures}
        return [request.what for request in requests if request.what not in failed]

    def concerns(self, event: Event) -> bool:
        """Whether a notification is a reason to `restore`."""
        return taken_away(event)

    def _make_pair(self, attachment: Attachment, netns_fd: int) -> Link:
        """Both ends down; the host end with a MAC that no udev policy changes."""
        name, ifname = host_ifname(attachment), attachment.key.ifname
        requests = (
            link.add_veth(
                link.End(name, mac=_host_mac(name), mtu=attachment.mtu),
                link.End(ifname, netns_fd, attachment.mac, attachment.mtu),
            ),
            # Strict: what does not come from the pod's address has no way back to it.
            link.configure(name, {"rp_filter": 1}, ipv6_address_generation="none"),
            link.get(name),
        )
        return veth.make(self._host, requests, name, ifname, netns_fd)

    def _set_up_host(self, attachment: Attachment) -> None:
        self._enable_forwarding(attachment.addresses)
        if any(len(each.address) == 16 for each in attachment.addresses):
            # Before the link is up, or a pod's router advertisement may be heard.
            conf = f"net.ipv6.conf.{sysctl.interface(attachment.host_ifname)}"
            sysctl.write({f"{conf}.accept_ra": 0}, self._netns_fd)
        alias = str(attachment.pod) or None
        self._host.run(
            link.change(attachment.host_ifindex, up=True, alias=alias),
            *_state([attachment]).additions(),
        )

    def _host_ends(self) -> list[Link]:
        links = link.dump(self._host, kind="veth")
        return [each for each in links if _HOST_IFNAME.fullmatch(each.name)]

    def _held(self) -> _State:
        """What the host has of ours: other wirings mark theirs alike, on other links."""
        ends = {each.index for each in self._host_ends()}
        routes = route.dump(self._host, table=TABLE_MAIN, protocol=KERNEL_PROTOCOL)
        ours = (each for each in neighbour.dump(self._host) if each.protocol == KERNEL_PROTOCOL)
        return _State(
            {each for each in routes if each.link in ends},
            {
                each
                for each in rule.dump(self._host)
                if each.protocol == KERNEL_PROTOCOL and each.priority in _PRIORITIES
            },
            {each for each in ours if each.link in ends},
        )


def _say(item: Route | Rule | Neighbour) -> str:
    return f"the {type(item).__name__.lower()} {item}"


def _host_mac(name: str) -> bytes:
    """Unicast and locally administered."""
    return b"\x0e" + hashlib.sha1(name.encode()).digest()[:5]


def _complete(attachment: Attachment) -> Attachment:
    """Addresses become single ones, and every gateway the link's."""
    addresses = tuple(
        PodAddress(each.address, len(each.address) * 8, GATEWAYS[len(each.address)])
        for each in attachment.addresses
    )
    sizes = sorted({len(each.address) for each in addresses})
    further = [
        each._replace(gateway=GATEWAYS[len(each.prefix.address)])
        for each in attachment.routes
        if len(each.prefix.address) in sizes and each.prefix.length
    ]
    return msgspec.structs.replace(
        attachment,
        addresses=addresses,
        routes=(*(PodRoute(_DEFAULT[size], GATEWAYS[size]) for size in sizes), *further),
        mac=attachment.mac or veth.pod_mac(addresses),
    )


def _pod_requests(attachment: Attachment, index: int) -> list[Request]:
    sizes = {len(each.address) for each in attachment.addresses}
    gateways: dict[Address, bytes] = {GATEWAYS[size]: attachment.host_mac for size in sizes}
    before = [route.add(route.direct(host_prefix(each), index)) for each in gateways]
    return veth.set_up_pod(attachment, index, neighbours=gateways, before=before)


def _state(attachments: Iterable[Attachment]) -> _State:
    state = _State(set(), set(), set())
    for attachment in attachments:
        index, table = attachment.host_ifindex, attachment.route_table
        for each in attachment.addresses:
            prefix = host_prefix(each.address)
            state.routes.add(route.direct(prefix, index, protocol=KERNEL_PROTOCOL))
            state.neighbours.add(
                Neighbour(index, each.address, attachment.mac, protocol=KERNEL_PROTOCOL)
            )
            if table:
                to_pod = rule.to_prefix(prefix, TO_POD_PRIORITY, TABLE_MAIN, KERNEL_PROTOCOL)
                state.rules.add(to_pod)
            if table not in (0, TABLE_MAIN):
                from_pod = rule.from_prefix(prefix, FROM_POD_PRIORITY, table, KERNEL_PROTOCOL)
                state.rules.add(from_pod)
    return state
