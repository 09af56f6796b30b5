"""Links: make, change, delete, list. rtnetlink messages RTM_{NEW,DEL,GET,SET}LINK.

Each end of a veth pair is made in its final namespace with its final name, address and MTU by one
message: moving a link later unregisters and registers it again under the kernel's one rtnl lock.

Source: rtnetlink(7); include/uapi/linux/{if_link,if_bridge}.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from podwire.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NetlinkSocket,
    Request,
    attr,
    attributes,
    nest,
    number,
    string,
    text,
    u8,
    u16,
    u32,
)

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19

IFF_UP = 0x1
IFF_PROMISC = 0x100
IFF_ALLMULTI = 0x200

IFINFO = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change

_ADDRESS, _IFNAME, _MTU, _LINK = 1, 3, 4, 5
_MASTER, _TXQLEN, _LINKINFO = 10, 13, 18
_IFALIAS, _AF_SPEC, _GROUP, _NET_NS_FD, _EXT_MASK = 20, 26, 27, 28, 29
_PROMISCUITY, _NUM_TX_QUEUES, _NUM_RX_QUEUES = 30, 31, 32
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 1, 2, 4, 5
_VETH_INFO_PEER = 1
_EXT_SKIP_STATS = 1 << 3


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface as the kernel reports it.

    `link` is the index of the veth peer or lower device, which may be in another namespace. `data`
    and `port_data` are the raw attributes of the kind and of the port it is to its master
    (`vxlan.read`, `bridge.port_flags`).
    """

    index: int
    name: str
    kind: str
    mac: bytes
    mtu: int
    flags: int
    master: int
    link: int
    tx_queue_length: int
    promiscuity: int
    alias: str
    data: bytes
    port_kind: str
    port_data: bytes

    @property
    def up(self) -> bool:
        """Administratively up."""
        return bool(self.flags & IFF_UP)


def parse(body: bytes) -> Link:
    """A link from the body of RTM_NEWLINK."""
    _, _, index, flags, _ = IFINFO.unpack_from(body)
    get = attributes(body, IFINFO.size).get
    info = attributes(get(_LINKINFO, b""))
    return Link(
        index,
        string(get(_IFNAME, b"")),
        string(info.get(_INFO_KIND, b"")),
        get(_ADDRESS, b""),
        number(get(_MTU, b"")),
        flags,
        number(get(_MASTER, b"")),
        number(get(_LINK, b"")),
        number(get(_TXQLEN, b"")),
        number(get(_PROMISCUITY, b"")),
        string(get(_IFALIAS, b"")),
        info.get(_INFO_DATA, b""),
        string(info.get(_INFO_SLAVE_KIND, b"")),
        info.get(_INFO_SLAVE_DATA, b""),
    )


def dump(sock: NetlinkSocket, *, kind: str = "", master: int = 0) -> list[Link]:
    """All links, or those of one kind or one master."""
    body = IFINFO.pack(0, 0, 0, 0, 0) + u32(_EXT_MASK, _EXT_SKIP_STATS)
    if master:
        body += u32(_MASTER, master)
    if kind:
        body += nest(_LINKINFO, text(_INFO_KIND, kind))
    # A kind whose module is not loaded is no filter to the kernel: it then lists everything.
    links = map(parse, sock.dump(RTM_GETLINK, body, "links"))
    return [link for link in links if not kind or link.kind == kind]


def _selector(link: int | str) -> tuple[int, bytes]:
    return (0, text(_IFNAME, link)) if isinstance(link, str) else (link, b"")


def get(link: int | str) -> Request:
    """Ask for one link by index or name; the answer is for `parse`."""
    index, selector = _selector(link)
    body = IFINFO.pack(0, 0, index, 0, 0) + selector + u32(_EXT_MASK, _EXT_SKIP_STATS)
    return Request(RTM_GETLINK, 0, body, f"find the link {link}")


def find(sock: NetlinkSocket, link: int | str) -> Link | None:
    """The link with that index or name, or None."""
    replies = sock.run(get(link).tolerating(errno.ENODEV))
    return parse(replies[0]) if replies else None


class End(NamedTuple):
    """A link to be made. `netns_fd` None: in the socket's namespace; 0: the kernel's default."""

    name: str
    netns_fd: int | None = None
    mac: bytes = b""
    mtu: int = 0
    queues: int = 0

    def encode(self, flags: int = 0) -> bytes:
        parts = [IFINFO.pack(0, 0, 0, flags, flags), text(_IFNAME, self.name)]
        if self.netns_fd is not None:
            parts.append(u32(_NET_NS_FD, self.netns_fd))
        if self.mac:
            parts.append(attr(_ADDRESS, self.mac))
        if self.mtu:
            parts.append(u32(_MTU, self.mtu))
        if self.queues:
            parts += [u32(_NUM_TX_QUEUES, self.queues), u32(_NUM_RX_QUEUES, self.queues)]
        return b"".join(parts)


def add(
    end: End, kind: str, *data: bytes, up: bool = False, master: int = 0, link: int = 0
) -> Request:
    """Make a link of any kind; `data` are the attributes of the kind, `link` its lower device."""
    body = end.encode(IFF_UP if up else 0)
    if master:
        body += u32(_MASTER, master)
    if link:
        body += u32(_LINK, link)
    body += nest(_LINKINFO, text(_INFO_KIND, kind), nest(_INFO_DATA, *data) if data else b"")
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make the {kind} link {end.name}")


def add_veth(end: End, peer: End, *, up: bool = False, master: int = 0) -> Request:
    """Make a veth pair, each end where it belongs.

    `up` and `master` are for `end`; the kernel refuses a peer that is up before the pair is one.
    """
    return add(end, "veth", nest(_VETH_INFO_PEER, peer.encode()), up=up, master=master)


def add_ifb(end: End, *, up: bool = False) -> Request:
    return add(end, "ifb", up=up)


def add_vlan(end: End, lower: int, vlan: int, *, up: bool = False) -> Request:
    """An 802.1Q link above `lower`."""
    return add(end, "vlan", u16(1, vlan), up=up, link=lower)


def add_bridge(
    end: End,
    *,
    up: bool = False,
    vlan_filtering: bool = False,
    multicast_snooping: bool = True,
    ageing_time_s: int = 300,
) -> Request:
    """A bridge. Give it a MAC, or it takes the lowest of its ports and changes with them."""
    data = [u32(4, ageing_time_s * 100)]  # in clock ticks (USER_HZ)
    if vlan_filtering:
        data.append(u8(7, 1))
    if not multicast_snooping:
        data.append(u8(23, 0))
    return add(end, "bridge", *data, up=up)


def change(
    link: int | str,
    *,
    up: bool | None = None,
    promisc: bool | None = None,
    allmulti: bool | None = None,
    mtu: int = 0,
    mac: bytes = b"",
    name: str = "",
    master: int | None = None,
    tx_queue_length: int | None = None,
    alias: str | None = None,
    group: int | None = None,
    netns_fd: int | None = None,
) -> Request:
    """Change what is given, of a link named by index or name. `master` 0 releases a port."""
    index, selector = _selector(link)
    flags = mask = 0
    for bit, wanted in ((IFF_UP, up), (IFF_PROMISC, promisc), (IFF_ALLMULTI, allmulti)):
        if wanted is not None:
            mask |= bit
            flags |= bit if wanted else 0
    parts = [IFINFO.pack(0, 0, index, flags, mask), selector]
    if mtu:
        parts.append(u32(_MTU, mtu))
    if mac:
        parts.append(attr(_ADDRESS, mac))
    if name:
        parts.append(text(_IFNAME, name))
    if master is not None:
        parts.append(u32(_MASTER, master))
    if tx_queue_length is not None:
        parts.append(u32(_TXQLEN, tx_queue_length))
    if alias is not None:
        parts.append(text(_IFALIAS, alias))
    if group is not None:
        parts.append(u32(_GROUP, group))
    if netns_fd is not None:
        parts.append(u32(_NET_NS_FD, netns_fd))
    return Request(RTM_NEWLINK, 0, b"".join(parts), f"change the link {link}")


def delete(link: int | str) -> Request:
    """Delete a link (of a veth pair, both ends)."""
    index, selector = _selector(link)
    body = IFINFO.pack(0, 0, index, 0, 0) + selector
    return Request(RTM_DELLINK, 0, body, f"delete the link {link}")


def delete_group(group: int) -> Request:
    """Delete all links of a group, which share the grace periods that one link alone waits for.

    ENODEV when the group is empty.
    """
    body = IFINFO.pack(0, 0, 0, 0, 0) + u32(_GROUP, group)
    return Request(RTM_DELLINK, 0, body, f"delete the links of group {group}")


# --- per-interface parameters that need no visit to /proc/sys -------------------------------------

_IPV4_PARAMETERS = {  # include/uapi/linux/ip.h, IPV4_DEVCONF_*
    "forwarding": 1,
    "proxy_arp": 3,
    "accept_redirects": 4,
    "send_redirects": 6,
    "rp_filter": 8,
    "arp_announce": 18,
    "arp_ignore": 19,
    "accept_local": 23,
    "src_valid_mark": 24,
    "route_localnet": 26,
}
_GEN_MODES = {"eui64": 0, "none": 1, "stable-privacy": 2, "random": 3}


def configure(
    link: int | str, ipv4: Mapping[str, int] | None = None, *, ipv6_address_generation: str = ""
) -> Request:
    """Set what ``net.ipv4.conf.<link>.*`` hold, and how IPv6 makes link-local addresses.

    Before a link goes up, `ipv6_address_generation` "none" keeps it free of them.
    """
    index, selector = _selector(link)
    families: list[bytes] = []
    if ipv4:
        values = (u32(_IPV4_PARAMETERS[name], value) for name, value in ipv4.items())
        families.append(nest(socket.AF_INET, nest(1, *values)))
    if ipv6_address_generation:
        families.append(nest(socket.AF_INET6, u8(8, _GEN_MODES[ipv6_address_generation])))
    body = IFINFO.pack(0, 0, index, 0, 0) + selector + nest(_AF_SPEC, *families)
    return Request(RTM_SETLINK, 0, body, f"configure the link {link}")
