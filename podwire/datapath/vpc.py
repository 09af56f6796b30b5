"""What of VPC mode the packet filter does: SNAT out of the VPC, and the way back for NodePorts."""

from __future__ import annotations

from dataclasses import dataclass

from podwire.datapath import Requirement
from podwire.net import Address, Prefix, disjoint, format_address, parse_prefix

_MULTICAST = parse_prefix("224.0.0.0/4")  # never leaves by routing, and must keep its source


@dataclass(frozen=True)
class VpcTable:
    """IPv4 only: IPv6 addresses are good everywhere.

    What a pod sends beyond `near` (the VPC's CIDRs and the excluded ones) leaves by `uplink`, the
    primary ENI, as `primary`: only that address has a public one. What comes in on `uplink` for an
    address of the node is answered by `uplink`. `mark` is the one bit of marks that is ours.
    """

    uplink: str
    primary: Address
    near: tuple[Prefix, ...]
    snat: bool = True
    random_ports: str = "prng"  # prng: fully random, hashrandom: random, none
    mark: int = 0x80
    pod_links: str = "eni"  # how the host ends of pods' links begin

    @property
    def not_translated(self) -> tuple[Prefix, ...]:
        """Where packets go with the pod's own address. Disjoint, as the kernel wants intervals."""
        return disjoint(each for each in (*self.near, _MULTICAST) if each.bits == 32)

    def status(self) -> dict[str, object]:
        """For `podwire status`."""
        return {
            "uplink": self.uplink,
            "snat": format_address(self.primary) if self.snat else "external",
            "near": [str(prefix) for prefix in self.near],
        }


def needs(uplink: str) -> tuple[Requirement, ...]:
    """What the rules need of the machine; `uplink` is "" while it is not known."""
    found = [Requirement("net.ipv4.ip_forward", "1", "pods are behind this node")]
    if uplink:
        why = "answers of pods on other ENIs to what came in on the primary one leave by it"
        found.append(Requirement(f"net.ipv4.conf.{uplink}.rp_filter", "2", why))
    return tuple(found)
