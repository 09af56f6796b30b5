"""The overlay on eBPF: where each node's pods are, and from which nodes packets may come.

The device is `wiring.routes`' and tunnel ids are made of what `policy` writes; see bpf/overlay.h.
"""

from __future__ import annotations

from podwire.datapath.ebpf.layout import TUNNEL, mapped, prefix_key
from podwire.datapath.ebpf.part import TablePart
from podwire.net import host_prefix
from podwire.nodes import RouteTable

_NOWHERE = bytes(16)


class OverlayPart(TablePart[RouteTable]):
    """The tunnels of a RouteTable. Once there are some, senders are checked against them."""

    feature = "overlay"

    def _apply(self, table: RouteTable) -> None:
        if table is not self._table:
            self._verify(table)
            self._table = table

    def _verify(self, table: RouteTable) -> list[str]:
        wrong = self._programs.growing["tunnels"].replace(_entries(table))
        self._programs.sync_links()
        return [f"{wrong} entries of map tunnels"] if wrong else []

    def status(self) -> dict[str, object]:
        """How many tunnels are known."""
        return {"tunnels": self._programs.growing["tunnels"].held}


def _entries(table: RouteTable) -> dict[bytes, bytes]:
    """By prefix: other nodes' pods, those nodes, and what is here, which no other node sends."""
    if not table.tunnel_mac:
        return {}
    own_mac, underlay = table.tunnel_mac, mapped(table.underlay)
    macs = {each.remote: each.mac for each in table.fdb}
    inside = {len(address): mapped(address) for address in table.tunnel_addresses}
    here = TUNNEL.pack(underlay, underlay, _NOWHERE, own_mac, own_mac)
    out = {
        prefix_key(*prefix): here for prefix in (*table.pod_prefixes, host_prefix(table.underlay))
    }
    for remote, mac in macs.items():
        tunnel = (mapped(remote), underlay, _NOWHERE, mac, own_mac)
        out[prefix_key(*host_prefix(remote))] = TUNNEL.pack(*tunnel)
    for prefix, _, remote in table.routes:
        own = inside.get(len(prefix.address), _NOWHERE)
        tunnel = (mapped(remote), underlay, own, macs[remote], own_mac)
        out[prefix_key(*prefix)] = TUNNEL.pack(*tunnel)
    return out
