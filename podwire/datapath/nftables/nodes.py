"""Masquerading of what leaves the cluster, as nftables sets. Table `podwire-nodes`.

The rules never change; nodes that come and go are elements. What a pod of this node sends to
anything outside the cluster prefixes leaves with the address of the link it leaves by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from podwire.datapath import Requirement
from podwire.datapath.nftables.fixed import FixedTable
from podwire.datapath.nodes import needs
from podwire.kernel.nftables import (
    INET,
    Element,
    NfTables,
    Set,
    Transaction,
    interval,
    intervals,
)
from podwire.net import Address, Prefix, disjoint
from podwire.nodes import RouteTable

TABLE = "podwire-nodes"

# Multicast and broadcast never leave by routing; bridged, they must keep their source.
_SCRIPT = f"""
table inet {TABLE} {{
  set pods-ipv4 {{ type ipv4_addr; flags interval; }}
  set pods-ipv6 {{ type ipv6_addr; flags interval; }}
  set cluster-ipv4 {{ type ipv4_addr; flags interval; }}
  set cluster-ipv6 {{ type ipv6_addr; flags interval; }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
  }}
}}
flush chain inet {TABLE} postrouting
table inet {TABLE} {{
  chain postrouting {{
    ip daddr {{ 224.0.0.0/4, 255.255.255.255 }} return
    ip6 daddr {{ fe80::/10, ff00::/8 }} return
    ip saddr @pods-ipv4 ip daddr != @cluster-ipv4 masquerade fully-random
    ip6 saddr @pods-ipv6 ip6 daddr != @cluster-ipv6 masquerade fully-random
  }}
}}
"""


_Ranges = frozenset[tuple[Address, Address]]  # inclusive, disjoint


class NodesPart:
    """The masquerade half of a RouteTable; the routes are `wiring.routes`."""

    requirements: Sequence[Requirement] = needs(None)

    def __init__(self, netns_fd: int | None = None) -> None:
        self._nft = NfTables(netns_fd)
        self._structure = FixedTable(self._nft, INET, TABLE, _SCRIPT)
        self._table: RouteTable | None = None
        self._held: dict[Set, _Ranges] = {}

    def close(self) -> None:
        self._nft.close()

    def start(self) -> None:
        """Make the rules anew in one transaction; elements of an earlier process stay."""
        self._structure.make()
        self._held = {target: self._read(target) for target in _SETS}

    def apply(self, table: RouteTable) -> None:
        """Make the sets hold `table`'s prefixes."""
        if table is self._table:
            return
        self._commit(_wanted(table))
        self._table = table
        self.requirements = needs(table)

    def flush(self) -> None:
        """Nothing waits: nodes leave rarely."""

    def verify(self) -> list[str]:
        """Repair what somebody changed in the table, and say so."""
        if self._table is None:
            return []
        repairs: list[str] = []
        wanted = _wanted(self._table)
        if not self._structure.intact():
            self._structure.make()
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
_SETS = (*_PODS.values(), *_CLUSTER.values())


def _wanted(table: RouteTable) -> dict[Set, _Ranges]:
    wanted: dict[Set, _Ranges] = {}
    for size in (4, 16):
        wanted[_PODS[size]] = _ranges(table.pod_prefixes, size)
        wanted[_CLUSTER[size]] = _ranges(table.cluster_prefixes, size)
    return wanted


def _ranges(prefixes: Iterable[Prefix], size: int) -> _Ranges:
    """The kernel wants disjoint intervals."""
    of_family = (prefix for prefix in prefixes if len(prefix.address) == size)
    return frozenset((prefix.first, prefix.last) for prefix in disjoint(of_family))


def _elements(ranges: _Ranges) -> list[Element]:
    return [element for first, last in sorted(ranges) for element in interval(first, last)]
