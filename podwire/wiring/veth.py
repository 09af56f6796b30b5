"""What the wirings share: names, MACs, the pair and the pod's end of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from podwire.errors import KernelError
from podwire.kernel import address, link, neighbour, route, sysctl
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.neighbour import Neighbour
from podwire.kernel.netlink import NetlinkSocket, Request
from podwire.net import Address, Prefix, format_address, link_local
from podwire.wiring import KERNEL_PROTOCOL, Attachment, Key, PodAddress, PodRoute

PREFIX = "pw"
_NAME_LENGTH = 14
# Links that are silenced and wait for their removal; any number nobody else uses.
DYING_GROUP = 0x7077

_FORWARDING = {4: "net.ipv4.ip_forward", 16: "net.ipv6.conf.all.forwarding"}


def host_ifname(key: Key) -> str:
    """The host end's name: the same for the same key, so that a crash leaves nothing unknown."""
    digest = hashlib.sha1("\0".join(key[:3]).encode()).hexdigest()
    return PREFIX + digest[: _NAME_LENGTH - len(PREFIX)]


def is_host_ifname(name: str) -> bool:
    return name.startswith(PREFIX) and len(name) == _NAME_LENGTH


def pod_mac(addresses: Collection[PodAddress]) -> bytes:
    """A MAC made from the first address, so that who remembers the address has the right MAC too,
    whichever pod has it now. b"" (the kernel chooses) without addresses.
    """
    for each in addresses:
        number = each.address if len(each.address) == 4 else hashlib.sha1(each.address).digest()[:4]
        return b"\x0a\x58" + number
    return b""


def _gateway_for(attachment: Attachment, prefix: Prefix) -> Address:
    """The gateway of the pod's first address of the prefix's family, or b""."""
    return next(
        (a.gateway for a in attachment.addresses if len(a.address) == len(prefix.address)), b""
    )


def _pod_routes(attachment: Attachment, index: int) -> list[route.Route]:
    """The routes inside the pod as the kernel knows them; those without a gateway get the pod's."""
    return [_kernel_route(attachment, each, index) for each in attachment.routes]


def _kernel_route(attachment: Attachment, each: PodRoute, index: int) -> route.Route:
    gateway = each.gateway or _gateway_for(attachment, each.prefix)
    table = each.table or route.TABLE_MAIN
    if each.scope == route.SCOPE_LINK or not gateway:
        made = route.direct(each.prefix, index, table=table, metric=each.priority, mtu=each.mtu)
    else:
        made = route.via(
            each.prefix,
            gateway,
            index,
            table=table,
            metric=each.priority,
            mtu=each.mtu,
            advmss=each.advmss,
        )
    return made._replace(scope=each.scope) if each.scope >= 0 else made


def set_up_pod(
    attachment: Attachment,
    index: int,
    *,
    neighbours: Mapping[Address, bytes],
    before: Collection[Request] = (),
    flags: int = 0,
) -> list[Request]:
    """Messages for the pod's namespace: loopback and link up, addresses, routes, neighbours.

    The IPv6 link-local address is ours, without duplicate detection, so that nothing is tentative
    when ADD returns; a pod without IPv6 addresses gets none and stays silent about it.
    """
    requests = [link.change("lo", up=True)]
    if attachment.addresses:
        requests.append(link.configure(index, ipv6_address_generation="none"))
    requests.append(link.change(index, up=True))
    if any(len(each.address) == 16 for each in attachment.addresses):
        own = InterfaceAddress(index, link_local(attachment.mac), 64, address.SCOPE_LINK)
        requests.append(address.add(own))
    requests += [
        address.add(InterfaceAddress(index, each.address, each.length, flags=flags))
        for each in attachment.addresses
    ]
    requests += before
    requests += [route.add(each, replace=True) for each in _pod_routes(attachment, index)]
    requests += [
        neighbour.add(Neighbour(index, router, mac, protocol=KERNEL_PROTOCOL))
        for router, mac in neighbours.items()
    ]
    return requests


def await_addresses(attachment: Attachment, pod: NetlinkSocket) -> None:
    """Returns when the pod's addresses take packets, or the kernel is slower than it may be."""
    route.await_local(pod, (each.address for each in attachment.addresses))


def make_pair(
    host: NetlinkSocket, attachment: Attachment, netns_fd: int, *, master: int = 0
) -> link.Link:
    """The pair, both ends down; returns the host end. Raises KernelError; then nothing is left.

    A link of that name on the host is what a crash or a removal under way left: it is replaced.
    """
    name, ifname = host_ifname(attachment.key), attachment.key.ifname
    requests = (
        link.add_veth(
            link.End(name, mtu=attachment.mtu),
            link.End(ifname, netns_fd, attachment.mac, attachment.mtu),
            master=master,
        ),
        link.configure(name, ipv6_address_generation="none"),
        link.get(name),
    )
    return make(host, requests, name, ifname, netns_fd)


def make(
    host: NetlinkSocket, requests: Sequence[Request], name: str, ifname: str, netns_fd: int
) -> link.Link:
    """Send the messages that make a pair, of which the last asks for the host end, and return it.

    Raises KernelError; then nothing is left.
    """
    replies, failures = host.attempt(requests)
    if not failures:
        return link.parse(replies[-1])
    if failures[0].errno == errno.EEXIST:
        with NetlinkSocket(netns_fd=netns_fd) as pod:
            if link.find(pod, ifname):
                raise KernelError(
                    f"container veth name provided ({ifname}) already exists", errno=errno.EEXIST
                )
        host.run(link.delete(name).tolerating(errno.ENODEV))
        return link.parse(host.run(*requests)[-1])
    if failures[0].request is not requests[0]:  # the pair was made
        host.attempt([link.delete(name)])
    raise failures[0].error()


def check_pod(attachment: Attachment, pod: NetlinkSocket) -> list[str]:
    """How the pod's end differs from the attachment, one sentence each."""
    ifname = attachment.key.ifname
    found = link.find(pod, ifname)
    if found is None:
        return [f"{ifname} is missing in the pod"]
    problems: list[str] = []
    leave_down = attachment.bridge is not None and attachment.bridge.leave_down
    if not found.up and not leave_down:
        problems.append(f"{ifname} is down")
    if attachment.mac and found.mac != attachment.mac:
        problems.append(f"{ifname} has the MAC {found.mac.hex(':')}, not {attachment.mac.hex(':')}")
    if attachment.mtu and found.mtu != attachment.mtu:
        problems.append(f"{ifname} has the MTU {found.mtu}, not {attachment.mtu}")
    present = {(a.address, a.length) for a in address.dump(pod, link=found.index)}
    problems += [
        f"{ifname} lacks the address {format_address(each.address)}/{each.length}"
        for each in attachment.addresses
        if (each.address, each.length) not in present
    ]
    routes = {(r.prefix, r.gateway, r.table) for r in route.dump(pod, link=found.index)}
    problems += [
        f"the pod lacks the route {each}"
        for each in _pod_routes(attachment, found.index)
        if (each.prefix, each.gateway, each.table) not in routes
    ]
    return problems


def forget_neighbours(host: NetlinkSocket, attachment: Attachment, index: int) -> None:
    """Take away the permanent entries of the pod's addresses on that link."""
    requests = [
        neighbour.delete(Neighbour(index, each.address, b"")) for each in attachment.addresses
    ]
    with contextlib.suppress(KernelError):
        host.attempt(requests)


class VethWiring:
    """What the wirings of a namespace (`netns_fd`; default: the caller's) do alike.

    See `podwire.wiring.Wiring`.
    """

    def __init__(self, netns_fd: int | None = None) -> None:
        self._netns_fd = netns_fd
        self._host = NetlinkSocket(netns_fd=netns_fd)
        self._forwarding: set[int] = set()

    def close(self) -> None:
        self._host.close()

    def host_ifname(self, attachment: Attachment) -> str:
        return host_ifname(attachment.key)

    def renew(self, attachment: Attachment) -> None:
        """Give our permanent entries of the pod's addresses the attachment's MAC."""
        addresses = {each.address for each in attachment.addresses}
        for each in neighbour.dump(self._host):
            if each.address in addresses and each.protocol == KERNEL_PROTOCOL:
                self._host.run(neighbour.add(each._replace(mac=attachment.mac)))

    def purge(self, host_ifnames: Collection[str]) -> None:
        """Delete the links together: one grace period of the kernel for all, not one for each."""
        if not host_ifnames:
            return
        gone = (errno.ENODEV,)
        dying = (link.change(name, group=DYING_GROUP) for name in host_ifnames)
        self._host.run(*(request.tolerating(*gone) for request in dying))
        self._host.run(link.delete_group(DYING_GROUP).tolerating(*gone))

    def links(self) -> Collection[str]:
        """The host ends of all pairs made here, whichever wiring made them."""
        pairs = link.dump(self._host, kind="veth")
        return {each.name for each in pairs if is_host_ifname(each.name)}

    def _enable_forwarding(self, addresses: Iterable[PodAddress]) -> None:
        sizes = {len(each.address) for each in addresses}
        if not sizes <= self._forwarding:
            sysctl.write({_FORWARDING[size]: 1 for size in sizes}, self._netns_fd)
            self._forwarding |= sizes


def with_own_mac(attachment: Attachment, index: int, pod: NetlinkSocket) -> Attachment:
    """The attachment with the MAC that the kernel chose for the pod's end, unless it has one."""
    if attachment.mac:
        return attachment
    mac = link.parse(pod.run(link.get(index))[0]).mac
    return msgspec.structs.replace(attachment, mac=mac)
