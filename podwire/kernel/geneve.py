"""Geneve devices, for all tunnels at once (collect metadata): the key comes with each packet.

Source: RFC 8926; include/uapi/linux/if_link.h; drivers/net/geneve.c.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

from podwire.errors import KernelError
from podwire.kernel import netns
from podwire.kernel.link import End, Link, add
from podwire.kernel.netlink import NetlinkSocket, Request, attr, attributes

_PORT, _COLLECT_METADATA = 5, 6
_BE16 = struct.Struct(">H")


class Geneve(NamedTuple):
    """A device on this UDP port; `collect_metadata` False: it is somebody's for one tunnel."""

    port: int
    collect_metadata: bool = True


def add_geneve(end: End, geneve: Geneve) -> Request:
    """Make a collect-metadata device. EOPNOTSUPP: the kernel has none (CONFIG_GENEVE)."""
    return add(end, "geneve", attr(_PORT, _BE16.pack(geneve.port)), attr(_COLLECT_METADATA, b""))


def read(link: Link) -> Geneve:
    """The settings of a Geneve link."""
    found = attributes(link.data)
    return Geneve(int.from_bytes(found.get(_PORT, b""), "big"), _COLLECT_METADATA in found)


def is_supported() -> bool:
    """Whether the kernel has Geneve devices; a module that is not loaded yet counts, and loads."""
    scratch = netns.create()
    try:
        with NetlinkSocket(netns_fd=scratch) as sock:
            sock.run(add_geneve(End("probe"), Geneve(6081)))
    except KernelError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        raise
    finally:
        os.close(scratch)
    return True
