"""Hooks of netfilter that track and translate, while no rule of it asks for them.

The kernel takes its translating hooks away with the last chain of type nat, also from connections
that are under way (net/netfilter/nf_nat_core.c, nf_nat_unregister_fn). eBPF leaves those of the
node's own processes to netfilter; a table without rules that translate keeps the hooks until they
have ended. The other way, it has netfilter note what these processes begin before rules come that
would translate the later packets.
"""

from __future__ import annotations

import logging

from podwire.agent.logs import event
from podwire.errors import Unsupported
from podwire.kernel.ctnetlink import Filter, Status, Table
from podwire.kernel.nftables import INET, NfTables

log = logging.getLogger("podwire.agent.carry")

TABLE = "podwire-carry"
# The rule makes the kernel go on tracking; the chain, go on translating.
_SCRIPT = f"""
add table inet {TABLE}
add chain inet {TABLE} carry {{ type nat hook output priority 100; policy accept; }}
flush chain inet {TABLE} carry
add rule inet {TABLE} carry ct status dnat,snat accept
"""


class Carry:
    """The table; `cleanup` takes it away whatever is under way."""

    def begin(self) -> None:
        """Keep the hooks if anything is translated now. Raises KernelError."""
        if _translating():
            self.track()

    def track(self) -> None:
        """Have the hooks. Raises KernelError."""
        try:
            with NfTables() as nft:
                nft.run(_SCRIPT)
        except Unsupported as error:  # then the rules before or after are iptables'
            event(log, logging.DEBUG, "no nftables to track with", error=error)

    def end(self) -> bool:
        """Take the table away once nothing is translated any more; whether it is gone."""
        if self._there() and _translating():
            return False
        self.cleanup()
        return True

    def cleanup(self) -> None:
        if self._there():
            with NfTables() as nft:
                nft.run(f"delete table inet {TABLE}\n")

    def _there(self) -> bool:
        with NfTables() as nft:
            return TABLE in nft.tables(INET)


def _translating() -> bool:
    with Table() as table:
        kinds = (Status.DST_NAT, Status.SRC_NAT)
        return any(table.count(Filter(status=kind, status_mask=kind)) for kind in kinds)
