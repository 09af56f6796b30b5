"""The overlay on eBPF: where each node's pods are, and from which nodes packets may come.

The device is `wiring.routes`' and tunnel ids are made of what `policy` writes; see bpf/overlay.h.
"""

from __future__ import annotations

from collections.abc import Sequence

from podwire.datapath import Requirement
from podwire.datapath.ebpf.layout import PREFIX_KEY, TUNNEL, mapped, mapped_length
from podwire.datapath.ebpf.programs import Programs
from podwire.net import Prefix
from podwire.nodes import RouteTable

_NOWHERE = bytes(16)


class OverlayPart:
    """The tunnels of a RouteTable."""

    requirements: Sequence[Requirement] = ()

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._table: RouteTable | None = None

    def start(self) -> None:
        """Load and attach. Raises Unsupported or KernelError."""
        self._programs.enable("overlay")

    def apply(self, table: RouteTable) -> None:
        """Make the map hold `table`'s tunnels; from now on senders are checked against them."""
        if table is not self._table:
            self._table = table
            self.verify()

    def flush(self) -> None:
        """Nothing waits."""

    def verify(self) -> list[str]:
        """Repair what somebody changed in the map, and say so."""
        if self._table is None:
            return []
        with self._programs.lock:
            wrong = self._programs.growing["tunnels"].replace(_entries(self._table))
            self._programs.sync_links()
        return [f"{wrong} entries of map tunnels"] if wrong else []

    def cleanup(self) -> None:
        self._programs.cleanup()
        self._table = None

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
    out = {_key(prefix): here for prefix in (*table.pod_prefixes, _host(table.underlay))}
    for remote, mac in macs.items():
        tunnel = (mapped(remote), underlay, _NOWHERE, mac, own_mac)
        out[_key(_host(remote))] = TUNNEL.pack(*tunnel)
    for prefix, _, remote in table.routes:
        own = inside.get(len(prefix.address), _NOWHERE)
        tunnel = (mapped(remote), underlay, own, macs[remote], own_mac)
        out[_key(prefix)] = TUNNEL.pack(*tunnel)
    return out


def _host(address: bytes) -> Prefix:
    return Prefix(address, len(address) * 8)


def _key(prefix: Prefix) -> bytes:
    length = 32 + mapped_length(prefix.address, prefix.length)
    return PREFIX_KEY.pack(length, mapped(prefix.address))
