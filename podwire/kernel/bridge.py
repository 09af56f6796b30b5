"""Bridge ports: their flags and VLANs.

Source: include/uapi/linux/{if_link,if_bridge}.h, net/bridge/br_netlink.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from podwire.kernel.link import (
    IFINFO,
    RTM_DELLINK,
    RTM_NEWLINK,
    RTM_SETLINK,
    Link,
)
from podwire.kernel.netlink import (
    Request,
    attr,
    attributes,
    nest,
    text,
    u8,
    u16,
)

_AF_BRIDGE = 7
_IFNAME, _LINKINFO, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 3, 18, 4, 5
_AF_SPEC = 26
_BRIDGE_FLAGS, _BRIDGE_VLAN_INFO = 0, 2
_FLAGS_SELF = 2
_VLAN_INFO = struct.Struct("=HH")  # flags, VLAN id
_PVID, _UNTAGGED, _RANGE_BEGIN, _RANGE_END = 1 << 1, 1 << 2, 1 << 3, 1 << 4

_HAIRPIN, _ISOLATED = 4, 33


class PortFlags(NamedTuple):
    """How a bridge treats a port; the defaults are the kernel's."""

    hairpin: bool = False
    isolated: bool = False


def port_flags(link: Link) -> PortFlags | None:
    """The flags of a port as `link.dump` reported it; None for what is no bridge port."""
    if link.port_kind != "bridge":
        return None
    found = attributes(link.port_data)
    return PortFlags(*(found.get(kind, b"\0") != b"\0" for kind in (_HAIRPIN, _ISOLATED)))


def change_port(
    port: int | str, *, hairpin: bool | None = None, isolated: bool | None = None
) -> Request:
    """Change what is given, of the port with that link index or name."""
    index, selector = (0, text(_IFNAME, port)) if isinstance(port, str) else (port, b"")
    wanted = ((_HAIRPIN, hairpin), (_ISOLATED, isolated))
    data = nest(_INFO_SLAVE_DATA, *(u8(kind, value) for kind, value in wanted if value is not None))
    info = nest(_LINKINFO, text(_INFO_SLAVE_KIND, "bridge"), data)
    body = IFINFO.pack(0, 0, index, 0, 0) + selector + info
    return Request(RTM_NEWLINK, 0, body, f"change the bridge port {port}")


class PortVlan(NamedTuple):
    """VLANs `first` to `last` (inclusive) on a port."""

    first: int
    last: int
    pvid: bool = False
    untagged: bool = False


def add_vlan(port: int, vlan: PortVlan, *, on_bridge: bool = False) -> Request:
    """Make the port a member; `on_bridge`: `port` is the bridge itself."""
    body = _vlan_body(port, vlan, on_bridge)
    return Request(RTM_SETLINK, 0, body, f"add VLANs {vlan.first}-{vlan.last} to port {port}")


def delete_vlan(port: int, vlan: PortVlan, *, on_bridge: bool = False) -> Request:
    body = _vlan_body(port, vlan, on_bridge)
    return Request(RTM_DELLINK, 0, body, f"take VLANs {vlan.first}-{vlan.last} from port {port}")


def _vlan_body(port: int, vlan: PortVlan, on_bridge: bool) -> bytes:
    flags = (_PVID if vlan.pvid else 0) | (_UNTAGGED if vlan.untagged else 0)
    spans: Iterable[tuple[int, int]] = ((flags, vlan.first),)
    if vlan.first != vlan.last:
        spans = ((flags | _RANGE_BEGIN, vlan.first), (flags | _RANGE_END, vlan.last))
    spec = [attr(_BRIDGE_VLAN_INFO, _VLAN_INFO.pack(*span)) for span in spans]
    if on_bridge:
        spec.append(u16(_BRIDGE_FLAGS, _FLAGS_SELF))
    return IFINFO.pack(_AF_BRIDGE, 0, port, 0, 0) + nest(_AF_SPEC, *spec)
