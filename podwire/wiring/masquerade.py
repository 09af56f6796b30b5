"""`ipMasq` of a configuration: what leaves a pod's own network gets the host's address.

nf_tables table ``inet podwire-ipmasq``, for networks that ask for it. A cluster's masquerading is
the business of the nodes' part of the data path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from podwire.kernel.nftables import INET, Element, Set, concat
from podwire.wiring import PodAddress
from podwire.wiring.tables import PodTable

TABLE = "podwire-ipmasq"

_STRUCTURE = f"""
add table inet {TABLE}
flush table inet {TABLE}
table inet {TABLE} {{
 set pods4 {{ type ipv4_addr; }}
 set pods6 {{ type ipv6_addr; }}
 set own4 {{ type ipv4_addr . ipv4_addr; flags interval; }}
 set own6 {{ type ipv6_addr . ipv6_addr; flags interval; }}
 chain postrouting {{
  type nat hook postrouting priority 100
  ip saddr @pods4 ip saddr . ip daddr != @own4 ip daddr != 224.0.0.0/4 masquerade
  ip6 saddr @pods6 ip6 saddr . ip6 daddr != @own6 ip6 daddr != ff00::/8 masquerade
 }}
}}
"""


class MasqueradeRules:
    """The masquerading of one namespace (`netns_fd`; default: the caller's)."""

    def __init__(self, netns_fd: int | None = None) -> None:
        self._table = PodTable(TABLE, _STRUCTURE, netns_fd)

    def close(self) -> None:
        self._table.close()

    def add(self, addresses: Sequence[PodAddress]) -> None:
        """Raises KernelError; then nothing changed."""
        self._table.make()
        self._table.add(_elements(addresses))

    def remove(self, addresses: Sequence[PodAddress]) -> None:
        """What is gone already is no error."""
        self._table.remove(_elements(addresses))

    def check(self, addresses: Sequence[PodAddress]) -> list[str]:
        """How the live state differs, one sentence each."""
        return self._table.check(_elements(addresses))

    def reconcile(self, addresses: Collection[PodAddress]) -> None:
        """Make the table hold these addresses and no others."""
        self._table.settle(_elements(addresses))

    def cleanup(self) -> None:
        """Remove the table."""
        self._table.cleanup()


def _elements(addresses: Iterable[PodAddress]) -> Iterable[tuple[Set, list[Element]]]:
    for each in addresses:
        version = 4 if len(each.address) == 4 else 6
        own = each.network
        start, end = concat(each.address, own.first), concat(each.address, own.last)
        yield Set(INET, TABLE, f"pods{version}"), [Element(concat(each.address))]
        yield Set(INET, TABLE, f"own{version}"), [Element(start, None, end)]
