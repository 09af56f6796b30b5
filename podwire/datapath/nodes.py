"""What the spellings of a RouteTable in netfilter share."""

from __future__ import annotations

from collections.abc import Collection

from podwire.datapath import Requirement
from podwire.net import Address, Prefix
from podwire.nodes import RouteTable

_IPV4 = Requirement("net.ipv4.ip_forward", "1", "pods are behind this node")
_IPV6 = Requirement("net.ipv6.conf.all.forwarding", "1", "pods are behind this node")


def needs(table: RouteTable | None) -> tuple[Requirement, ...]:
    """What the rules need of the machine; `table` is None while it is not known."""
    ipv6 = table is not None and any(prefix.bits == 128 for prefix in table.pod_prefixes)
    return (_IPV4, _IPV6) if ipv6 else (_IPV4,)


def kept_addresses(table: RouteTable, masquerade: bool) -> Collection[Prefix]:
    """What pods reach with their own address: everything where nothing is masqueraded."""
    if masquerade:
        return table.cluster_prefixes
    return [Prefix(bytes(size), 0) for size in (4, 16)]


def host(address: Address) -> Prefix:
    """The address alone."""
    return Prefix(address, len(address) * 8)
