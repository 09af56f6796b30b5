"""Masquerading of what leaves the cluster, and the guard of the overlay. Table `podwire-nodes`.

The rules never change; nodes that come and go are elements. What a pod of this node sends to
anything outside the cluster prefixes leaves with the address of the link it leaves by.

The overlay believes whoever comes from a node's address. So only nodes get at a tunnel's end: here
(input), and from here (forward: what a pod sends would come from this node once it is masqueraded).
What comes out of it bears no address of this node's own pods.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from podwire.datapath import Requirement
from podwire.datapath.nftables.fixed import FixedTable
from podwire.datapath.nodes import host, kept_addresses, needs
from podwire.kernel.nftables import (
    INET,
    Element,
    NfTables,
    Set,
    Transaction,
    interval,
    intervals,
)
from podwire.net import Prefix, disjoint
from podwire.nodes import OVERLAY_DEVICES, OVERLAY_PORTS, RouteTable

TABLE = "podwire-nodes"

_DEVICES = ", ".join(OVERLAY_DEVICES.values())
# Multicast and broadcast never leave by routing; bridged, they must keep their source.
_SCRIPT = f"""
table inet {TABLE} {{
  set pods-ipv4 {{ type ipv4_addr; flags interval; }}
  set pods-ipv6 {{ type ipv6_addr; flags interval; }}
  set cluster-ipv4 {{ type ipv4_addr; flags interval; }}
  set cluster-ipv6 {{ type ipv6_addr; flags interval; }}
  set nodes-ipv4 {{ type ipv4_addr; flags interval; }}
  set nodes-ipv6 {{ type ipv6_addr; flags interval; }}
  chain prerouting {{ type filter hook prerouting priority raw; policy accept; }}
  chain forward {{ type filter hook forward priority -2; policy accept; }}
  chain input {{ type filter hook input priority -2; policy accept; }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
  }}
}}
flush chain inet {TABLE} prerouting
flush chain inet {TABLE} postrouting
table inet {TABLE} {{
  chain prerouting {{
    iifname {{ {_DEVICES} }} ip saddr @pods-ipv4 drop
    iifname {{ {_DEVICES} }} ip6 saddr @pods-ipv6 drop
  }}
  chain postrouting {{
    ip daddr {{ 224.0.0.0/4, 255.255.255.255 }} return
    ip6 daddr {{ fe80::/10, ff00::/8 }} return
    ip saddr @pods-ipv4 ip daddr != @cluster-ipv4 masquerade fully-random
    ip6 saddr @pods-ipv6 ip6 daddr != @cluster-ipv6 masquerade fully-random
  }}
}}
"""


def _guard(port: int) -> str:
    """The rules about who gets at a tunnel's end on this UDP port; 0: none."""
    rules = f"""
table inet {TABLE} {{
  chain forward {{
    udp dport {port} ip daddr @nodes-ipv4 ip saddr != @nodes-ipv4 drop
    udp dport {port} ip6 daddr @nodes-ipv6 ip6 saddr != @nodes-ipv6 drop
  }}
  chain input {{
    udp dport {port} ip saddr != @nodes-ipv4 drop
    udp dport {port} ip6 saddr != @nodes-ipv6 drop
  }}
}}
"""
    flush = f"flush chain inet {TABLE} forward\nflush chain inet {TABLE} input\n"
    return flush + (rules if port else "")


_Ranges = frozenset[tuple[bytes, bytes]]  # inclusive, disjoint


class NodesPart:
    """A RouteTable but for its routes, which are `wiring.routes`.

    Without `masquerade`, pods reach everything with their own address.
    """

    requirements: Sequence[Requirement] = needs(None)

    def __init__(self, netns_fd: int | None = None, *, masquerade: bool = True) -> None:
        self._masquerade = masquerade
        self._nft = NfTables(netns_fd)
        self._structure = FixedTable(self._nft, INET, TABLE, _SCRIPT)
        self._table: RouteTable | None = None
        self._held: dict[Set, _Ranges] = {}
        self._guarded = -1  # the tunnels' port in the rules, 0 for none; -1: not known

    def close(self) -> None:
        self._nft.close()

    def start(self) -> None:
        """Make the rules anew in one transaction; elements of an earlier process stay, and its
        guard, until a table is applied.
        """
        self._structure.make()
        self._guarded = -1
        self._held = {target: self._read(target) for target in _SETS}

    def apply(self, table: RouteTable) -> None:
        """Make the sets hold `table`'s prefixes."""
        if table is self._table:
            return
        self._commit(_wanted(table, self._masquerade))
        port = OVERLAY_PORTS[table.protocol] if table.tunnel_mac else 0
        if port != self._guarded:
            self._structure.extend(_guard(port))
            self._guarded = port
        self._table = table
        self.requirements = needs(table)

    def flush(self) -> None:
        """Nothing waits: nodes leave rarely."""

    def verify(self) -> list[str]:
        """Repair what somebody changed in the table, and say so."""
        if self._table is None:
            return []
        repairs: list[str] = []
        wanted = _wanted(self._table, self._masquerade)
        if not self._structure.intact():
            self._structure.make()
            self._structure.extend(_guard(self._guarded))
            repairs.append(f"made the rules of table {TABLE} again")
        self._held = {target: self._read(target) for target in _SETS}
        for target in _SETS:
            if self._held[target] != wanted[target]:
                repairs.append(f"restored the set {TABLE} {target.name}")
        self._commit(wanted)
        return repairs

    def cleanup(self) -> None:
        """Remove the table."""
        self._structure.remove()
        self._table, self._held = None, {}

    def status(self) -> dict[str, object]:
        return {target.name: len(ranges) for target, ranges in self._held.items()}

    def _commit(self, wanted: dict[Set, _Ranges]) -> None:
        """The difference in one transaction: a range may give way to others that overlap it."""
        transaction = Transaction()
        for target, ranges in wanted.items():
            held = self._held.get(target, frozenset())
            transaction.delete(target, _elements(held - ranges))
            transaction.add(target, _elements(ranges - held))
        self._nft.commit(transaction)
        self._held = wanted

    def _read(self, target: Set) -> _Ranges:
        return intervals(self._nft.elements(target))


_PODS = {size: Set(INET, TABLE, f"pods-ipv{v}") for size, v in ((4, 4), (16, 6))}
_CLUSTER = {size: Set(INET, TABLE, f"cluster-ipv{v}") for size, v in ((4, 4), (16, 6))}
_NODES = {size: Set(INET, TABLE, f"nodes-ipv{v}") for size, v in ((4, 4), (16, 6))}
_SETS = (*_PODS.values(), *_CLUSTER.values(), *_NODES.values())


def _wanted(table: RouteTable, masquerade: bool) -> dict[Set, _Ranges]:
    wanted: dict[Set, _Ranges] = {}
    cluster = kept_addresses(table, masquerade)
    for size in (4, 16):
        wanted[_PODS[size]] = _ranges(table.pod_prefixes, size)
        wanted[_CLUSTER[size]] = _ranges(cluster, size)
        wanted[_NODES[size]] = _ranges(map(host, table.node_addresses), size)
    return wanted


def _ranges(prefixes: Iterable[Prefix], size: int) -> _Ranges:
    """The kernel wants disjoint intervals."""
    of_family = (prefix for prefix in prefixes if len(prefix.address) == size)
    return frozenset((prefix.first, prefix.last) for prefix in disjoint(of_family))


def _elements(ranges: _Ranges) -> list[Element]:
    return [element for first, last in sorted(ranges) for element in interval(first, last)]
