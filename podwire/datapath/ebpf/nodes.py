"""What leaves the cluster, on eBPF: pods' traffic to the world bears the node's address.

Routes to other nodes, and the VXLAN device, are `wiring.routes`; packets find them by the kernel's
routing table.
"""

from __future__ import annotations

from podwire.datapath import Requirement
from podwire.datapath.ebpf.layout import NUMBER, NetworkFlag, prefix_key
from podwire.datapath.ebpf.part import TablePart
from podwire.datapath.ebpf.programs import Programs
from podwire.kernel import address
from podwire.net import Prefix, host_prefix, network
from podwire.nodes import RouteTable


class NodesPart(TablePart[RouteTable]):
    """The masquerade half of a RouteTable."""

    feature = "masquerade"
    requirements = (
        Requirement("net.ipv4.ip_forward", "1", "pods are behind this node"),
        Requirement("net.ipv6.conf.all.forwarding", "1", "pods are behind this node"),
    )

    def __init__(self, programs: Programs, *, masquerade: bool = True) -> None:
        """Without `masquerade` the networks are only known, as direct server return needs."""
        super().__init__(programs=programs)
        self._masquerade = masquerade

    def start(self) -> None:
        """Load and attach. Raises Unsupported or KernelError."""
        if self._masquerade:
            super().start()

    def _apply(self, table: RouteTable) -> None:
        if table is self._table:
            return
        self._verify(table)
        if table.underlay:
            self._programs.offer_node_address(table.underlay)
        self._table = table

    def _verify(self, table: RouteTable) -> list[str]:
        wrong = self._programs.growing["networks"].replace(_entries(self._programs, table))
        return [f"{wrong} entries of map networks"] if wrong else []

    def status(self) -> dict[str, object]:
        """How many networks are known."""
        return {"networks": self._programs.growing["networks"].held}


def _entries(programs: Programs, table: RouteTable) -> dict[bytes, bytes]:
    """The map: the longest match must carry the flags of those around it, too."""
    own = address.own(programs.netns_fd)  # what goes to the node itself does not leave
    said: dict[Prefix, NetworkFlag] = {}
    for flag, prefixes in (
        (NetworkFlag.OWN_PODS, table.pod_prefixes),
        (NetworkFlag.PODS, (p for p, node in table.owners.items() if node != table.node)),
        (NetworkFlag.CLUSTER, table.cluster_prefixes),
        (NetworkFlag.NODE, map(host_prefix, table.node_addresses)),
        (NetworkFlag.CLUSTER, map(host_prefix, own)),
    ):
        for prefix in prefixes:
            said[prefix] = said.get(prefix, NetworkFlag(0)) | flag
    lengths = {(prefix.bits, prefix.length) for prefix in said}
    out: dict[bytes, bytes] = {}
    for prefix in said:
        flags = NetworkFlag(0)
        for bits, length in lengths:
            if bits == prefix.bits and length <= prefix.length:
                flags |= said.get(network(prefix.address, length), NetworkFlag(0))
        out[prefix_key(*prefix)] = NUMBER.pack(flags)
    return out
