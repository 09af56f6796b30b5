"""Pods without a bridge: the host end of each pair has the gateway address, the host a route.

As the reference ptp plugin wires: the pod sees its network behind the gateway, not on the link.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Collection

import msgspec

from podwire.errors import ConfigError
from podwire.kernel import address, link, neighbour, route
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.neighbour import Neighbour
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import format_address, host_prefix
from podwire.wiring import KERNEL_PROTOCOL, Attachment, HostLink, veth
from podwire.wiring.veth import VethWiring


class PtpWiring(VethWiring):
    """A `Wiring`."""

    def attach(self, attachment: Attachment, netns_fd: int) -> Attachment:
        if not all(each.gateway for each in attachment.addresses):
            raise ConfigError("every address of a ptp link needs a gateway", field="ipam")
        mac = attachment.mac or veth.pod_mac(attachment.addresses)
        attachment = msgspec.structs.replace(attachment, mac=mac)
        with contextlib.ExitStack() as undo:
            host_end = veth.make_pair(self._host, attachment, netns_fd)
            undo.callback(self._host.attempt, [link.delete(host_end.index)])
            self._set_up_host(attachment, host_end.index)
            with NetlinkSocket(netns_fd=netns_fd) as pod:
                attachment = self._set_up_pod(attachment, host_end, pod)
            undo.pop_all()
        return msgspec.structs.replace(
            attachment,
            mtu=host_end.mtu,
            host_ifname=host_end.name,
            host_ifindex=host_end.index,
            host_mac=host_end.mac,
            host_links=(HostLink(host_end.name, host_end.mac, host_end.mtu),),
        )

    def check(self, attachment: Attachment, netns_fd: int) -> list[str]:
        with NetlinkSocket(netns_fd=netns_fd) as pod:
            problems = veth.check_pod(attachment, pod)
        host_end = link.find(self._host, attachment.host_ifname)
        if host_end is None:
            return [*problems, f"the host end {attachment.host_ifname} is missing"]
        if not host_end.up:
            problems.append(f"{host_end.name} is down")
        present = {each.address for each in address.dump(self._host, link=host_end.index)}
        routes = {each.prefix for each in route.dump(self._host, link=host_end.index)}
        for each in attachment.addresses:
            if each.gateway not in present:
                gateway = format_address(each.gateway)
                problems.append(f"{host_end.name} lacks the address {gateway}")
            if host_prefix(each.address) not in routes:
                problems.append(f"the host lacks the route to {format_address(each.address)}")
        return problems

    def silence(self, attachment: Attachment) -> None:
        name, gone = attachment.host_ifname, (errno.ENODEV,)
        self._host.run(
            link.change(name, up=False).tolerating(*gone),
            link.change(name, group=veth.DYING_GROUP).tolerating(*gone),
        )

    def reconcile(self, attachments: Collection[Attachment]) -> None:
        """Addresses, routes and neighbours go with their link."""

    def _set_up_host(self, attachment: Attachment, index: int) -> None:
        self._enable_forwarding(attachment.addresses)
        requests = [link.change(index, up=True, alias=str(attachment.pod) or None)]
        for each in attachment.addresses:
            own = InterfaceAddress(
                index, each.gateway, len(each.gateway) * 8, flags=address.F_NOPREFIXROUTE
            )
            entry = Neighbour(index, each.address, attachment.mac, protocol=KERNEL_PROTOCOL)
            requests += [
                address.add(own),
                route.add(route.direct(host_prefix(each.address), index), replace=True),
                neighbour.add(entry),
            ]
        self._host.run(*requests)

    def _set_up_pod(
        self, attachment: Attachment, host_end: link.Link, pod: NetlinkSocket
    ) -> Attachment:
        index = host_end.link  # the peer's, in the pod's namespace
        attachment = veth.with_own_mac(attachment, index, pod)
        before = [
            route.add(each, replace=True)
            for a in attachment.addresses
            for each in (
                route.direct(host_prefix(a.gateway), index, source=a.address),
                route.via(a.network, a.gateway, index, source=a.address),
            )
        ]
        pod.run(
            *veth.set_up_pod(
                attachment,
                index,
                neighbours={a.gateway: host_end.mac for a in attachment.addresses},
                before=before,
                flags=address.F_NOPREFIXROUTE,
            )
        )
        veth.await_addresses(attachment, pod)
        return attachment
