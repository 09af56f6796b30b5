"""The structures that programs and Python share, spelled for `struct`, and names for numbers.

A test holds each of them against the BTF of the compiled programs.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from podwire.net import Address

VERSION = 5
"""Of the maps that outlive a process; raised when one of them changes its meaning."""

EVENTS_PER_SECOND = 100
"""Refusals of each reason that programs tell one by one."""

_MAPPED = bytes(10) + b"\xff\xff"

FRONTEND_KEY = struct.Struct("=16s2sB5x")  # address, port, protocol
HIT_KEY = struct.Struct("=16s2sBxI")  # address, port, protocol, service (0: a frontend's)
FRONTEND = struct.Struct("=IIIIIIIII")  # service, flags, affinity_s, cluster, local, maglev slots
MAGLEV = struct.Struct("=4H")  # entries of a table, each a place in the list of backends
BACKEND = struct.Struct("=16s2sHI")  # address, port, flags, service
MEMBER_KEY = struct.Struct("=16sI2sH")  # address, service, port, list
RANGE_KEY = struct.Struct("=II16s")  # length, service, address
PREFIX_KEY = struct.Struct("=I4x16s")  # length (32 more than the prefix), address
SETTINGS = struct.Struct("=16s16sIIII")  # node's two, detect_local, overlay, phase, policies
FLOW = struct.Struct("=16s16s2s2sB3x")  # source, destination, their ports, protocol
CONNECTION = struct.Struct("=40sIIBB6x")  # to, seen_s, service, state, flags
INTERFACE = struct.Struct("=16s16sI6s6x")  # addresses, flags, mac
ENDPOINT = struct.Struct("=I6s6sI")  # interface, mac, host_mac, flags
EVENT = struct.Struct("=QIIQII40s")  # time, reason, interface, ruling, peer, egress, flow
REMOTE = struct.Struct("=16s2s6x")  # address, port
RULE_KEY = struct.Struct("=IIIBx2s")  # length, rule set, identity, protocol, port
RULE = struct.Struct("=QI4x")  # ruling, verdict
SUBJECT = struct.Struct("=III")  # ingress, egress rule set, tag
TUNNEL = struct.Struct("=16s16s16s6s6s4x")  # remote, local, own address, MAC, own MAC
COLLECT = struct.Struct("=IIIIIII")
COOKIE = struct.Struct("=Q")
RULING = struct.Struct("=Q")
NUMBER = struct.Struct("=I")


class CollectMode(IntEnum):
    """What one run of the `collect` program does."""

    EXPIRE = 0
    DOOMED = 1
    MOVE = 2
    DEPARTED = 3
    PLAIN = 4


class FrontendFlag(IntFlag):
    EXTERNAL = 1
    LOCAL = 2
    RANGED = 4
    MASQUERADE = 8
    HAS_ENDPOINTS = 16
    ANY_ADDRESS = 32
    DSR = 64


class MemberList(IntEnum):
    """Which list of a Service port an entry of `members` is about."""

    CLUSTER = 0
    LOCAL = 1
    HERE = 2
    SERVING = 3


class AddressFlag(IntFlag):
    CLUSTER_IP = 1
    NODE = 2
    NODE_PORT = 4
    SERVICE = 8


class PrefixFlag(IntFlag):
    LOCAL_PODS = 1
    SERVICES = 2
    CLUSTER = 4


class InterfaceFlag(IntFlag):
    POD = 1
    KNOWN = 2
    PLAIN = 4


class EndpointFlag(IntFlag):
    PLAIN = 1


class NetworkFlag(IntFlag):
    OWN_PODS = 1
    CLUSTER = 2
    PODS = 4
    NODE = 8


class RuleVerdict(IntEnum):
    ALLOW = 0
    DENY = 1
    AUDIT = 2


class DetectBy(IntEnum):
    NONE = 0
    CIDR = 1
    INTERFACE = 2


class Phase(IntEnum):
    """Of taking over from another data path, or of handing over to one; bpf/takeover.h."""

    SERVING = 0
    WAITING = 1
    JOINING = 2
    LEAVING = 3
    MOVING = 4


class ConnectionFlag(IntFlag):
    TRANSLATED = 1
    REPLY = 2
    STACK = 4
    LOCAL = 8
    DSR = 16
    LED = 32
    COPIED = 64
    ANSWERED = 128


class ConnectionState(IntFlag):
    """What one direction has sent."""

    SEEN = 1
    DATA = 2
    FIN = 4
    RST = 8
    AGAIN = 16


BACKEND_THIS_NODE = 1


class Reason(IntEnum):
    """Index into the counters; the names are what `podwire bpf status` prints."""

    FORWARDED = 0
    TRANSLATED = 1
    REJECTED = 2
    NO_LOCAL_ENDPOINT = 3
    UNALLOCATED = 4
    SOURCE_RANGE = 5
    SPOOFED = 6
    POLICY = 7
    POLICY_AUDIT = 8
    CONNECTIONS_FULL = 9
    PORTS_EXHAUSTED = 10
    FRAGMENT_LOST = 11
    BROKEN = 12
    WRITE_FAILED = 13
    NO_ROUTE = 14
    TOO_BIG = 15
    AFFINITY_FULL = 16
    EVENTS_LOST = 17
    REPLACED = 18
    LED_ASTRAY = 19
    EVICTED = 20


def mapped(address: Address) -> bytes:
    """Sixteen bytes: IPv4 becomes IPv4-mapped."""
    return _MAPPED + address if len(address) == 4 else address


def unmapped(address: bytes) -> Address:
    """The inverse of `mapped`."""
    return address[12:] if address.startswith(_MAPPED) else address


def mapped_length(address: Address, length: int) -> int:
    """A prefix length as it counts among sixteen bytes."""
    return length + 96 if len(address) == 4 else length


def prefix_key(address: Address, length: int) -> bytes:
    """A key of the maps that find the longest prefix of an address."""
    return PREFIX_KEY.pack(32 + mapped_length(address, length), mapped(address))
