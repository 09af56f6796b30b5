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
from podwire.net import Address, Prefix
from podwire.nodes import RouteTable


class NodesPart:
    """The masquerade half of a RouteTable."""

    requirements: Sequence[Requirement] = (
        Requirement("net.ipv4.ip_forward", "1", "pods are behind this node"),
        Requirement("net.ipv6.conf.all.forwarding", "1", "pods are behind this node"),
    )

    def __init__(self, programs: Programs, *, masquerade: bool = True) -> None:
        """Without `masquerade` the networks are only known, as direct server return needs."""
        self._programs = programs
        self._masquerade = masquerade
        self._table: RouteTable | None = None

    def start(self) -> None:
        """Load and attach. Raises Unsupported or KernelError."""
        if self._masquerade:
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
        return {"networks": self._programs.growing["networks"].held}


def _entries(programs: Programs, table: RouteTable) -> dict[bytes, bytes]:
    """The map: the longest match must carry the flags of those around it, too."""
    with NetlinkSocket(netns_fd=programs.netns_fd) as netlink:
        own = {each.address for each in address.dump(netlink)}
    said: dict[Prefix, NetworkFlag] = {}
    for flag, prefixes in (
        (NetworkFlag.OWN_PODS, table.pod_prefixes),
        (NetworkFlag.PODS, (p for p, node in table.owners.items() if node != table.node)),
        (NetworkFlag.CLUSTER, table.cluster_prefixes),
        (NetworkFlag.NODE, map(_host, table.node_addresses)),
        (NetworkFlag.CLUSTER, map(_host, own)),  # what goes to the node itself does not leave
    ):
        for prefix in prefixes:
            said[prefix] = said.get(prefix, NetworkFlag(0)) | flag
    lengths = {(prefix.bits, prefix.length) for prefix in said}
    out: dict[bytes, bytes] = {}
    for prefix in said:
        flags = NetworkFlag(0)
        for bits, length in lengths:
            if bits == prefix.bits and length <= prefix.length:
                flags |= said.get(_around(prefix, length), NetworkFlag(0))
        length = 32 + mapped_length(prefix.address, prefix.length)
        out[PREFIX_KEY.pack(length, mapped(prefix.address))] = NUMBER.pack(flags)
    return out


def _host(address: Address) -> Prefix:
    return Prefix(address, len(address) * 8)


def _around(prefix: Prefix, length: int) -> Prefix:
    """The prefix of that length which covers this one."""
    host = prefix.bits - length
    number = int.from_bytes(prefix.address, "big") >> host << host
    return Prefix(number.to_bytes(len(prefix.address), "big"), length)
