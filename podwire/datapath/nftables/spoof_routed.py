"""No spoofed address leaves a routed pod. Table `podwire-spoof` (inet), without elements.

The route back is the binding: a source that the node would not route to the link it came from is
false. Linux checks that for IPv4 by itself (rp_filter); for IPv6 it has no such switch.
"""

from __future__ import annotations

from podwire.datapath.nftables.fixed import FixedTable
from podwire.kernel.nftables import INET, NfTables

TABLE = "podwire-spoof"

_SCRIPT = f"""
table inet {TABLE} {{
  chain prerouting {{
    type filter hook prerouting priority raw; policy accept;
  }}
}}
flush chain inet {TABLE} prerouting
table inet {TABLE} {{
  chain prerouting {{
    iifname "eni*" fib saddr . iif oif missing drop
  }}
}}
"""


class RoutedSpoofGuard:
    """The check for all links named ``eni…`` of one network namespace."""

    def __init__(self, netns_fd: int | None = None) -> None:
        self._nft = NfTables(netns_fd)
        self._structure = FixedTable(self._nft, INET, TABLE, _SCRIPT)

    def close(self) -> None:
        self._nft.close()

    def start(self) -> None:
        """Make the rule. Raises KernelError."""
        self._structure.make()

    def verify(self) -> list[str]:
        """Repair what somebody changed, and say so."""
        if self._structure.intact():
            return []
        self._structure.make()
        return [f"made the rules of table {TABLE} again"]

    def cleanup(self) -> None:
        """Remove the table."""
        self._structure.remove()
