"""`ipMasq` of a configuration: what leaves a pod's own network gets the host's address.

nf_tables table ``inet podwire-ipmasq``, for networks that ask for it. A cluster's masquerading is
the business of the nodes' part of the data path.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Sequence

from podwire.errors import KernelError
from podwire.kernel.nftables import INET, Element, NfTables, Set, Transaction, concat
from podwire.wiring import PodAddress
from podwire.wiring.tables import deletion, make_table, settle
from podwire.wiring.veth import network

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
        self._nft = NfTables(netns_fd)
        self._made = False

    def close(self) -> None:
        self._nft.close()

    def add(self, addresses: Sequence[PodAddress]) -> None:
        """Raises KernelError; then nothing changed."""
        self._ensure()
        transaction = Transaction()
        for target, elements in _elements(addresses):
            transaction.add(target, elements)
        self._nft.commit(transaction)

    def remove(self, addresses: Sequence[PodAddress]) -> None:
        """What is gone already is no error."""
        wanted = list(_elements(addresses))
        try:
            self._nft.commit(deletion(wanted))
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            self._nft.commit(deletion([(t, self._held(t, elements)) for t, elements in wanted]))

    def _held(self, target: Set, elements: list[Element]) -> list[Element]:
        """Those of the elements that the kernel has."""
        if not self._exists():
            return []
        present = {(each.key, each.end) for each in self._nft.elements(target)}
        return [each for each in elements if (each.key, each.end) in present]

    def check(self, addresses: Sequence[PodAddress]) -> list[str]:
        """How the live state differs, one sentence each."""
        if not self._exists():
            return [f"there is no nf_tables table inet {TABLE}"]
        return [
            f"elements are missing in {target.name} of {TABLE}"
            for target, elements in _elements(addresses)
            if self._held(target, elements) != elements
        ]

    def reconcile(self, addresses: Collection[PodAddress]) -> None:
        """Make the table hold these addresses and no others."""
        if not addresses:
            self.cleanup()
            return
        self._ensure()
        settle(self._nft, TABLE, list(_elements(addresses)))

    def cleanup(self) -> None:
        """Remove the table."""
        self._made = False
        if self._exists():
            self._nft.run(f"delete table inet {TABLE}")

    def _ensure(self) -> None:
        if not self._made or not self._exists():
            make_table(self._nft, TABLE, _STRUCTURE)
            self._made = True

    def _exists(self) -> bool:
        return TABLE in self._nft.tables(INET)


def _elements(addresses: Iterable[PodAddress]) -> Iterable[tuple[Set, list[Element]]]:
    for each in addresses:
        version = 4 if len(each.address) == 4 else 6
        own = network(each)
        start, end = concat(each.address, own.first), concat(each.address, own.last)
        yield Set(INET, TABLE, f"pods{version}"), [Element(concat(each.address))]
        yield Set(INET, TABLE, f"own{version}"), [Element(start, None, end)]
