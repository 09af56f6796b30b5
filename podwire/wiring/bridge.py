"""Pods on a bridge of the node: a veth pair each, the host end a port of the bridge.

One ADD is three exchanges with the kernel: the bridge is looked at, the pair is made with each end
in its place, the pod's end is set up. What is known is told instead of learned: the pod knows its
gateway's MAC, the host the pod's, as permanent neighbours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Collection

import msgspec

from podwire.errors import KernelError
from podwire.kernel import address, bridge, link, neighbour
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.neighbour import Neighbour
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import format_address
from podwire.wiring import KERNEL_PROTOCOL, Attachment, Bridge, HostLink, veth
from podwire.wiring.veth import VethWiring


class BridgeWiring(VethWiring):
    """A `Wiring`."""

    def __init__(self, netns_fd: int | None = None) -> None:
        super().__init__(netns_fd)
        self._lock = threading.Lock()
        self._pinned: set[int] = set()  # bridges whose MAC stays, by index

    def attach(self, attachment: Attachment, netns_fd: int) -> Attachment:
        options = _options(attachment)
        with contextlib.ExitStack() as undo:
            with self._lock:
                master, router = self._ensure_bridge(attachment, options, undo)
                mac = attachment.mac or veth.pod_mac(attachment.addresses)
                attachment = msgspec.structs.replace(attachment, mac=mac)
                host_end = veth.make_pair(self._host, attachment, netns_fd, master=master.index)
            undo.callback(self._host.attempt, [link.delete(host_end.index)])
            self._set_up_port(attachment, options, host_end)
            with NetlinkSocket(netns_fd=netns_fd) as pod:
                attachment = self._set_up_pod(attachment, options, host_end, router, pod)
            if options.gateway:
                undo.callback(veth.forget_neighbours, self._host, attachment, router.index)
                self._host.run(
                    *(
                        neighbour.add(
                            Neighbour(router.index, each.address, mac, protocol=KERNEL_PROTOCOL)
                        )
                        for each in attachment.addresses
                    )
                )
            undo.pop_all()
        ends = (
            HostLink(master.name, master.mac),
            HostLink(host_end.name, host_end.mac, host_end.mtu),
        )
        further = (HostLink(router.name, router.mac),) if router is not master else ()
        return msgspec.structs.replace(
            attachment,
            mtu=host_end.mtu,
            host_ifname=host_end.name,
            host_ifindex=host_end.index,
            host_mac=host_end.mac,
            host_links=ends,
            further_links=further,
        )

    def check(self, attachment: Attachment, netns_fd: int) -> list[str]:
        options = _options(attachment)
        with NetlinkSocket(netns_fd=netns_fd) as pod:
            problems = veth.check_pod(attachment, pod)
        master = link.find(self._host, options.name)
        if master is None or master.kind != "bridge":
            return [*problems, f"there is no bridge {options.name}"]
        if options.promiscuous and not master.promiscuity:
            problems.append(f"the bridge {options.name} is not promiscuous")
        if not master.up:
            problems.append(f"the bridge {options.name} is down")
        router = master
        if options.vlan and options.gateway:
            found = link.find(self._host, _vlan_name(options))
            if found is None:
                return [*problems, f"there is no link {_vlan_name(options)}"]
            router = found
        if options.gateway:
            present = {(a.address, a.length) for a in address.dump(self._host, link=router.index)}
            problems += [
                f"{router.name} lacks the address {format_address(a.gateway)}/{a.length}"
                for a in attachment.addresses
                if (a.gateway, a.length) not in present
            ]
        host_end = link.find(self._host, attachment.host_ifname)
        if host_end is None:
            return [*problems, f"the host end {attachment.host_ifname} is missing"]
        if host_end.master != master.index:
            problems.append(f"{host_end.name} is no port of the bridge {options.name}")
        elif (flags := bridge.port_flags(host_end)) and flags.hairpin != options.hairpin:
            problems.append(f"the hairpin mode of {host_end.name} is {flags.hairpin}")
        if not host_end.up:
            problems.append(f"{host_end.name} is down")
        made = {each.name: each.mac for each in attachment.host_links}
        problems += [
            f"{each.name} has the MAC {each.mac.hex(':')}, not {made[each.name].hex(':')}"
            for each in (master, host_end)
            if made.get(each.name, each.mac) != each.mac
        ]
        return problems

    def silence(self, attachment: Attachment) -> None:
        options, name = _options(attachment), attachment.host_ifname
        # Down, not a disabled port: any later notification about the link enables that again.
        self._host.run(link.change(name, up=False, group=veth.DYING_GROUP).tolerating(errno.ENODEV))
        if options.gateway and attachment.addresses:
            router = link.find(self._host, _vlan_name(options) if options.vlan else options.name)
            if router:
                veth.forget_neighbours(self._host, attachment, router.index)

    def reconcile(self, attachments: Collection[Attachment]) -> None:
        known = {a.address for attachment in attachments for a in attachment.addresses}
        for master in link.dump(self._host, kind="bridge"):
            strays = [
                neighbour.delete(each)
                for each in neighbour.dump(self._host, link=master.index)
                if each.protocol == KERNEL_PROTOCOL and each.address not in known
            ]
            self._host.attempt(strays)

    # --- the bridge -------------------------------------------------------------------------------

    def _ensure_bridge(
        self, attachment: Attachment, options: Bridge, undo: contextlib.ExitStack
    ) -> tuple[link.Link, link.Link]:
        """The bridge, and the link that has its gateway addresses: itself, or its VLAN link."""
        master = link.find(self._host, options.name)
        if master is None:
            tagged = bool(options.vlan or options.trunk)
            # A MAC of its own, or the bridge takes its ports' lowest and changes with them.
            end = link.End(options.name, mac=_random_mac())
            self._host.run(link.add_bridge(end, up=True, vlan_filtering=tagged))
            undo.callback(self._remove_unused, options.name)
            master = link.find(self._host, options.name)
        if master is None or master.kind != "bridge":
            raise KernelError(f"{options.name} already exists but is not a bridge")
        if not master.up or (options.promiscuous and not master.promiscuity):
            promiscuous = True if options.promiscuous else None
            self._host.run(link.change(master.index, up=True, promisc=promiscuous))
        if master.index not in self._pinned:  # somebody else's may change with its ports too
            self._host.run(link.change(master.index, mac=master.mac))
            self._pinned.add(master.index)
        router = master
        if options.vlan and options.gateway and attachment.addresses:
            router = self._ensure_vlan_link(options, master)
        if options.gateway:
            self._ensure_gateways(attachment, options, router, undo)
            self._enable_forwarding(attachment.addresses)
        return master, router

    def _remove_unused(self, name: str) -> None:
        with self._lock:
            master = link.find(self._host, name)
            if master and not link.dump(self._host, master=master.index):
                self._host.attempt([link.delete(master.index)])

    def _ensure_vlan_link(self, options: Bridge, master: link.Link) -> link.Link:
        name = _vlan_name(options)
        found = link.find(self._host, name)
        if found is None:
            vlan = bridge.PortVlan(options.vlan, options.vlan)
            end = link.End(name, mac=master.mac)
            self._host.run(
                bridge.add_vlan(master.index, vlan, on_bridge=True),
                link.add_vlan(end, master.index, options.vlan, up=True),
            )
            found = link.find(self._host, name)
        if found is None or found.kind != "vlan":
            raise KernelError(f"{name} already exists but is not a VLAN link")
        return found

    def _ensure_gateways(
        self,
        attachment: Attachment,
        options: Bridge,
        router: link.Link,
        undo: contextlib.ExitStack,
    ) -> None:
        present = [
            each
            for each in address.dump(self._host, link=router.index)
            if each.scope != address.SCOPE_LINK
        ]
        wanted = [
            InterfaceAddress(router.index, each.gateway, each.length)
            for each in attachment.addresses
            if each.gateway
        ]
        values = {(each.address, each.length) for each in wanted}
        missing = [w for w in wanted if all(w[1:3] != each[1:3] for each in present)]
        conflicting = [
            each
            for each in present
            if each[1:3] not in values and any(_conflict(each, new) for new in missing)
        ]
        if conflicting and not options.force_address:
            new = next(new for new in missing if _conflict(conflicting[0], new))
            raise KernelError(
                f"{router.name} already has an IP address different from "
                f"{format_address(new.address)}/{new.length}",
                errno=errno.EEXIST,
            )
        if missing:
            self._host.run(
                *(address.delete(each) for each in conflicting),
                *(address.add(each) for each in missing),
            )
            undo.callback(
                self._host.attempt,
                [address.delete(each) for each in missing]
                + [address.add(each) for each in conflicting],
            )

    # --- the pair ---------------------------------------------------------------------------------

    def _set_up_port(self, attachment: Attachment, options: Bridge, host_end: link.Link) -> None:
        port = host_end.index
        requests = [link.change(port, up=True, alias=str(attachment.pod) or None)]
        if options.hairpin or options.isolated:
            requests.append(
                bridge.change_port(port, hairpin=options.hairpin, isolated=options.isolated)
            )
        if options.vlan or options.trunk:
            if not options.keep_default_vlan:
                requests.append(bridge.delete_vlan(port, bridge.PortVlan(1, 1)))
            if options.vlan:
                own = bridge.PortVlan(options.vlan, options.vlan, pvid=True, untagged=True)
                requests.append(bridge.add_vlan(port, own))
            requests += [
                bridge.add_vlan(port, bridge.PortVlan(each.first, each.last))
                for each in options.trunk
            ]
        self._host.run(*requests)

    def _set_up_pod(
        self,
        attachment: Attachment,
        options: Bridge,
        host_end: link.Link,
        router: link.Link,
        pod: NetlinkSocket,
    ) -> Attachment:
        index = host_end.link  # the peer's, in the pod's namespace
        attachment = veth.with_own_mac(attachment, index, pod)
        if options.leave_down:
            return attachment
        gateways = {a.gateway: router.mac for a in attachment.addresses if a.gateway}
        pod.run(*veth.set_up_pod(attachment, index, neighbours=gateways if options.gateway else {}))
        veth.await_addresses(attachment, pod)
        return attachment


def _options(attachment: Attachment) -> Bridge:
    if attachment.bridge is None:
        raise KernelError(f"the attachment {attachment.key} has no bridge")
    return attachment.bridge


def _vlan_name(options: Bridge) -> str:
    return f"{options.name}.{options.vlan}"


def _conflict(present: InterfaceAddress, new: InterfaceAddress) -> bool:
    """A bridge has one IPv4 gateway; IPv6 networks may live side by side unless they overlap."""
    if len(present.address) != len(new.address):
        return False
    shorter = min(present.length, new.length)
    shift = len(new.address) * 8 - shorter
    first, second = (int.from_bytes(each.address, "big") >> shift for each in (present, new))
    return len(new.address) == 4 or first == second


def _random_mac() -> bytes:
    """Unicast and locally administered."""
    octets = bytearray(os.urandom(6))
    octets[0] = octets[0] & 0xFE | 0x02
    return bytes(octets)
