"""SNAT and connection marks of VPC mode. Table `podwire-vpc`; implements `Part[VpcTable]`.

The policy rules 1024 (our mark: table main) and 1536 (from a pod: its ENI's table) choose the ENI
by which a pod's packet leaves. So a connection gets the mark when

* it came in on the primary ENI for an address of the node (a NodePort): before DNAT hides that;
* a pod opened it to something beyond the VPC: after DNAT, for a ClusterIP is not beyond. This is a
  filter chain: behind a DNAT that took effect the kernel calls no further chain of type nat.

What has the primary address already is left alone: a connection from before the first rule has no
entry yet, would count as new and have its port changed under it.

Every packet of a pod then takes the bit of its connection. Only our bit of either mark is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

from podwire.datapath import Requirement
from podwire.datapath.vpc import VpcTable, needs
from podwire.kernel.nftables import IP, Element, NfTables, Set
from podwire.net import format_address

TABLE = "podwire-vpc"
_NEAR = Set(IP, TABLE, "near")
_PORTS = {"prng": " fully-random", "hashrandom": " random", "none": ""}
_REMOVAL = f"add table ip {TABLE}\ndelete table ip {TABLE}\n"


class VpcPart:
    """The rules in one network namespace (`netns_fd`; default: the caller's)."""

    requirements: Sequence[Requirement] = needs("")

    def __init__(self, netns_fd: int | None = None) -> None:
        self._nft = NfTables(netns_fd)
        self._table: VpcTable | None = None
        self._made: tuple[list[tuple[str, bytes]], list[Element]] = ([], [])

    def close(self) -> None:
        self._nft.close()

    def start(self) -> None:
        """What an earlier process left stays in force until the first `apply` replaces it."""

    def apply(self, table: VpcTable) -> None:
        """Make the rules anew in one transaction: it changes when the VPC does, which is rare."""
        if table == self._table:
            return
        self._nft.run(_REMOVAL + script(table))
        self._table, self._made = table, self._held()
        self.requirements = needs(table.uplink)

    def flush(self) -> None:
        """Nothing waits."""

    def verify(self) -> list[str]:
        """Make the table again when somebody changed it, and say so."""
        if self._table is None or self._held() == self._made:
            return []
        self._nft.run(_REMOVAL + script(self._table))
        self._made = self._held()
        return [f"made the rules of table {TABLE} again"]

    def cleanup(self) -> None:
        """Remove the table."""
        self._nft.run(_REMOVAL)
        self._table = None

    def status(self) -> dict[str, object]:
        return self._table.status() if self._table else {}

    def _held(self) -> tuple[list[tuple[str, bytes]], list[Element]]:
        if TABLE not in self._nft.tables(IP):
            return [], []
        return self._nft.rules(IP, TABLE), self._nft.elements(_NEAR)


def script(table: VpcTable) -> str:
    """The table as nft(8) reads it."""
    mark, others = f"{table.mark:#x}", f"{0xFFFFFFFF & ~table.mark:#x}"
    pods = f'iifname "{table.pod_links}*"'
    near = ", ".join(map(str, table.not_translated))
    leaving = f"""
    {pods} ct state new ct direction original fib daddr type != local ip daddr != @near \
ct mark set ct mark | {mark}"""
    snat = f"""
  chain postrouting {{
    type nat hook postrouting priority srcnat + 1; policy accept;
    oifname "lo" return
    ip saddr {format_address(table.primary)} return
    ip daddr @near return
    fib daddr type local return
    snat to {format_address(table.primary)}{_PORTS[table.random_ports]}
  }}"""
    return f"""
table ip {TABLE} {{
  set near {{ type ipv4_addr; flags interval; elements = {{ {near} }} }}
  chain arriving {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "{table.uplink}" ct state new fib daddr . iif type local ct mark set ct mark | {mark}
  }}
  chain from-pods {{
    type filter hook prerouting priority dstnat + 10; policy accept;{leaving if table.snat else ""}
    {pods} ct mark & {mark} == {mark} meta mark set meta mark | {mark} accept
    {pods} meta mark & {mark} == {mark} meta mark set meta mark & {others}
  }}{snat if table.snat else ""}
}}
"""
