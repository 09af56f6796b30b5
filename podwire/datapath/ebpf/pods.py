"""Pods of this node: known by link and address, delivered without a stack in between.

A pod's packets are checked for its own addresses, and go straight into the other pod's namespace
(`bpf_redirect_peer`) or out by the routing table.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from podwire.datapath import Requirement
from podwire.datapath.ebpf.layout import (
    COOKIE,
    ENDPOINT,
    INTERFACE,
    NUMBER,
    EndpointFlag,
    InterfaceFlag,
    mapped,
    unmapped,
)
from podwire.datapath.ebpf.pinned import netns_cookie
from podwire.datapath.ebpf.programs import Programs
from podwire.errors import KernelError
from podwire.kernel import netns
from podwire.kernel.bpf import Map
from podwire.net import Address

log = logging.getLogger(__name__)


class PodLink(NamedTuple):
    """A pod's veth: index and MAC of the host's end, MAC and addresses of the pod's.

    `netns` is the path of its namespace; "": its sockets are left alone, and Services are balanced
    packet by packet.
    """

    ifindex: int
    host_mac: bytes
    mac: bytes
    addresses: tuple[Address, ...]
    netns: str = ""


class EbpfPods:
    """Delivery to and from the pods of this node. Not a `Part`: its table is the set of links."""

    requirements: Sequence[Requirement] = (
        Requirement("net.ipv4.ip_forward", "1", "pods would reach nobody on other nodes"),
        Requirement("net.ipv6.conf.all.forwarding", "1", "pods would reach nobody elsewhere"),
    )

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._links: dict[int, PodLink] = {}
        self._cookies: dict[int, int] = {}

    def start(self) -> None:
        """Load and attach. Raises Unsupported or KernelError."""
        self._programs.enable("pods")

    def add(self, pod: PodLink) -> None:
        """From now on the pod is reached directly, and may use its own addresses only.

        Raises KernelError, with nothing of it left, when a map is full.
        """
        known = self._links.get(pod.ifindex)
        if known == pod:
            return
        self._links[pod.ifindex] = pod
        try:
            with self._programs.lock:
                self._write(pod)
        except KernelError:
            self.remove(pod.ifindex)
            raise

    def _write(self, pod: PodLink) -> None:
        flags = write_interface(self._programs, pod.ifindex, pod.addresses, pod.mac)
        self._programs.add_pod(pod.ifindex)
        cookie = _cookie(pod.netns)
        if cookie:
            self._programs.maps["namespaces"].update(
                COOKIE.pack(cookie), b"".join(_both(pod.addresses))
            )
            self._programs.namespaces[pod.ifindex] = pod.netns
            self._cookies[pod.ifindex] = cookie
        plain = flags & InterfaceFlag.PLAIN
        value = ENDPOINT.pack(
            pod.ifindex, pod.mac, pod.host_mac, EndpointFlag.PLAIN if plain else 0
        )
        endpoints = self._programs.maps["endpoints"]
        with self._programs.lock:
            self._programs.connections.depart(
                each for each in pod.addresses if _is_of_another(endpoints, each, pod.ifindex)
            )
            self._programs.connections.arrive(pod.addresses)
        endpoints.update_batch((mapped(address), value) for address in pod.addresses)

    def remove(self, ifindex: int) -> None:
        """The pod is gone, or going: as long as its link is there, nothing comes out of it."""
        pod = self._links.pop(ifindex, None)
        if pod:
            endpoints = self._programs.maps["endpoints"]
            endpoints.delete_batch([mapped(address) for address in pod.addresses])
            with self._programs.lock:
                self._programs.connections.depart(pod.addresses)
            self._programs.maps["interfaces"].delete(NUMBER.pack(ifindex))
            self._programs.namespaces.pop(ifindex, None)
            cookie = self._cookies.pop(ifindex, 0)
            self._programs.maps["namespaces"].delete(COOKIE.pack(cookie))

    def replace(self, pods: Iterable[PodLink]) -> None:
        """Exactly these pods: after a start, when an earlier process may have left others."""
        present = self._programs.dump_links()
        wanted: dict[int, PodLink] = {}
        for pod in pods:
            link = present.get(pod.ifindex)
            if link is not None and link.mac == pod.host_mac:
                wanted[pod.ifindex] = pod
            else:  # its DEL is still to come; the number may be another link's now
                log.warning("a pod's interface %d is gone: %s", pod.ifindex, pod.netns)
        endpoints = self._programs.maps["endpoints"]
        for key, value in list(endpoints.items()):
            ifindex = ENDPOINT.unpack(value)[0]
            pod = wanted.get(ifindex)
            if pod is None or key not in map(mapped, pod.addresses):
                endpoints.delete(key)
                self._programs.connections.depart([unmapped(key)])
        for ifindex in [i for i in self._links if i not in wanted]:
            self.remove(ifindex)
        for key, value in list(self._programs.maps["interfaces"].items()):
            *_, flags, _ = INTERFACE.unpack(value)
            if flags & InterfaceFlag.KNOWN and NUMBER.unpack(key)[0] not in wanted:
                self._programs.maps["interfaces"].delete(key)
        for pod in wanted.values():
            try:
                self.add(pod)
            except KernelError as error:  # the others are not held up
                log.error("pod behind interface %d is not served: %s", pod.ifindex, error)


def write_interface(
    programs: Programs, ifindex: int, addresses: Iterable[Address], mac: bytes = bytes(6)
) -> InterfaceFlag:
    """Say who is behind an interface; no MAC: any will do. What is known already stays.

    The flags that hold now.
    """
    key = NUMBER.pack(ifindex)
    interfaces = programs.maps["interfaces"]
    with programs.lock:
        *_, flags, known_mac = INTERFACE.unpack(interfaces.lookup(key) or bytes(INTERFACE.size))
        flags = InterfaceFlag(flags) | InterfaceFlag.KNOWN
        mac = mac if any(mac) else known_mac
        interfaces.update(key, INTERFACE.pack(*_both(addresses), flags, mac))
    return flags


def set_plain(programs: Programs, ifindex: int, addresses: Iterable[Address], plain: bool) -> bool:
    """Say whether policies leave the pod behind an interface alone; whether they did before.

    Its TCP connections with other such pods have no entries then. A pod whose namespace is not
    known is never plain: nobody could find what it has open.
    """
    plain = plain and programs.reads_sockets and ifindex in programs.namespaces
    interfaces, endpoints = programs.maps["interfaces"], programs.maps["endpoints"]
    key = NUMBER.pack(ifindex)
    with programs.lock:
        *rest, flags, mac = INTERFACE.unpack(interfaces.lookup(key) or bytes(INTERFACE.size))
        was = bool(flags & InterfaceFlag.PLAIN)
        if was != plain:
            interfaces.update(key, INTERFACE.pack(*rest, flags ^ InterfaceFlag.PLAIN, mac))
        for address in map(mapped, addresses):
            held = endpoints.lookup(address)
            if held is not None:
                value = ENDPOINT.pack(*ENDPOINT.unpack(held)[:3], EndpointFlag.PLAIN * plain)
                endpoints.update(address, value)
    return was


def _is_of_another(endpoints: Map, address: Address, ifindex: int) -> bool:
    """Whether another pod has the address still: its end was missed."""
    held = endpoints.lookup(mapped(address))
    return held is not None and ENDPOINT.unpack(held)[0] != ifindex


def _both(addresses: Iterable[Address]) -> tuple[bytes, bytes]:
    """The IPv4 and the IPv6 address as the maps want them; zero where there is none."""
    by_size = {len(address): mapped(address) for address in addresses}
    return by_size.get(4, bytes(16)), by_size.get(16, bytes(16))


def _cookie(path: str) -> int:
    """0 for a namespace that is not known, or gone."""
    if not path:
        return 0
    try:
        fd = netns.open_path(path)
    except KernelError:
        return 0
    try:
        return netns_cookie(fd)
    finally:
        os.close(fd)
