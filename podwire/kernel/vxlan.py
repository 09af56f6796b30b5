"""VXLAN devices.

Source: RFC 7348; include/uapi/linux/if_link.h; drivers/net/vxlan/vxlan_core.c.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from podwire.kernel.link import End, Link, add
from podwire.kernel.netlink import Request, attr, attributes, number, u8, u32

_ID, _LINK, _LOCAL, _LEARNING, _PORT, _LOCAL6 = 1, 3, 4, 7, 15, 17
_COLLECT_METADATA = 25
_BE16 = struct.Struct(">H")


class Vxlan(NamedTuple):
    """`local` is the underlay address it sends from, `link` the device below (0: by routing).

    With `collect_metadata` the tunnel key comes with each packet (eBPF, lightweight tunnels) and
    `vni` must be 0.
    """

    vni: int
    port: int
    local: bytes = b""
    link: int = 0
    learning: bool = False
    collect_metadata: bool = False


def add_vxlan(end: End, vxlan: Vxlan, *, up: bool = False) -> Request:
    """Make the device."""
    data = [attr(_PORT, _BE16.pack(vxlan.port)), u8(_LEARNING, vxlan.learning)]
    if vxlan.collect_metadata:
        data.append(u8(_COLLECT_METADATA, 1))
    else:
        data.append(u32(_ID, vxlan.vni))
    if vxlan.local:
        data.append(attr(_LOCAL if len(vxlan.local) == 4 else _LOCAL6, vxlan.local))
    if vxlan.link:
        data.append(u32(_LINK, vxlan.link))
    return add(end, "vxlan", *data, up=up)


def read(link: Link) -> Vxlan:
    """The settings of a VXLAN link."""
    get = attributes(link.data).get
    return Vxlan(
        number(get(_ID, b"")),
        int.from_bytes(get(_PORT, b""), "big"),
        get(_LOCAL, b"") or get(_LOCAL6, b""),
        number(get(_LINK, b"")),
        get(_LEARNING, b"\0") != b"\0",
        get(_COLLECT_METADATA, b"\0") != b"\0",
    )
