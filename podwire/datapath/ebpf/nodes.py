"""What leaves the cluster, on eBPF: pods' traffic to the world bears the node's address.

Routes to other nodes, and the VXLAN device, are `wiring.routes`; packets find them by the kernel's
routing table.
"""

from __future__ import annotations

from collections.abc import Sequence

from podwire.datapath import Requirement
from podwire.datapath.ebpf.layout import NUMBER, PREFIX_KEY, NetworkFlag, mapped, mapped_length
from podwire.datapath.ebpf.programs import Programs
from podwire.kernel import address
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import Prefix
from podwire.nodes import RouteTable


class NodesPart:
    """The masquerade half of a RouteTable."""

    requirements: Sequence[Requirement] = (
        Requirement("net.ipv4.ip_forward", "1", "pods are behind this node"),
        Requirement("net.ipv6.conf.all.forwarding", "1", "pods are behind this node"),
    )

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._table: RouteTable | None = None

    def start(self) -> None:
        """Load and attach. Raises Unsupported or KernelError."""
        self._programs.enable("masquerade")

    def apply(self, table: RouteTable) -> None:
        """Make the map hold `table`'s prefixes."""
        if table is self._table:
            return
        self._programs.growing["networks"].replace(_entries(self._programs, table))
        if table.underlay:
            self._programs.offer_node_address(table.underlay)
        self._table = table

    def flush(self) -> None:
        """Nothing waits."""

    def verify(self) -> list[str]:
        """Repair what somebody changed in the map, and say so."""
        if self._table is None:
            return []
        wrong = self._programs.growing["networks"].replace(_entries(self._programs, self._table))
        return [f"{wrong} entries of map networks"] if wrong else []

    def cleanup(self) -> None:
        self._programs.cleanup()
        self._table = None

    def status(self) -> dict[str, object]:
        """How many networks are known."""
        return {"networks": self._programs.growing["networks"].fill()}


def _entries(programs: Programs, table: RouteTable) -> dict[bytes, bytes]:
    flagged = [(prefix, NetworkFlag.OWN_PODS) for prefix in table.pod_prefixes]
    flagged += [(prefix, NetworkFlag.CLUSTER) for prefix in table.cluster_prefixes]
    with NetlinkSocket(
        netns_fd=programs.netns_fd
    ) as netlink:  # what goes to the node itself does not leave
        own = {each.address for each in address.dump(netlink)}
    flagged += [(Prefix(each, len(each) * 8), NetworkFlag.CLUSTER) for each in own]
    out: dict[bytes, bytes] = {}
    for prefix, _ in flagged:
        flags = NetworkFlag(0)
        for other, flag in flagged:
            if _covers(other, prefix):
                flags |= flag
        length = 32 + mapped_length(prefix.address, prefix.length)
        out[PREFIX_KEY.pack(length, mapped(prefix.address))] = NUMBER.pack(flags)
    return out


def _covers(wide: Prefix, narrow: Prefix) -> bool:
    return wide.bits == narrow.bits and wide.covers(narrow)
