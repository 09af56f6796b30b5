"""Features of links. Source: ethtool(8); include/uapi/linux/ethtool.h."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct

from podwire.errors import KernelError
from podwire.kernel import netns

_SIOCETHTOOL = 0x8946
_STXCSUM = 0x17  # ETHTOOL_STXCSUM


def offload_checksums(name: str, on: bool, netns_fd: int | None = None) -> None:
    """Whether the link leaves the checksums of what it sends to its driver. Raises KernelError."""
    value = ctypes.create_string_buffer(struct.pack("=II", _STXCSUM, on))
    request = struct.pack("16sQ16x", name.encode(), ctypes.addressof(value))
    with netns.socket(netns_fd, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, _SIOCETHTOOL, request)
        except OSError as error:
            number = error.errno or errno.EIO
            message = f"checksum offload of {name}: {os.strerror(number)}"
            raise KernelError(message, errno=number) from None
