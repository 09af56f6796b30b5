"""How many ENIs and addresses an instance may have, by its type.

Source: EC2's DescribeInstanceTypes (NetworkInfo). Multi-card types count the default card only,
as pods are served from card 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

PREFIX_ADDRESSES = 16  # in a /28, the only size EC2 delegates for IPv4


@dataclass(frozen=True)
class InstanceLimits:
    """`ipv4_per_eni` counts the ENI's primary address, which no pod gets."""

    enis: int
    ipv4_per_eni: int
    ipv6_per_eni: int
    network_cards: int = 1
    hypervisor: str = "nitro"  # or "xen", or "metal"

    @property
    def slots_per_eni(self) -> int:
        """Secondary addresses, or prefixes, that one ENI holds."""
        return self.ipv4_per_eni - 1

    @property
    def prefix_delegation(self) -> bool:
        """EC2 delegates prefixes to Nitro and bare-metal instances only."""
        return self.hypervisor != "xen"

    @property
    def max_pods(self) -> int:
        """Pods that can have addresses, and two more in the host's network (the usual advice)."""
        return self.enis * self.slots_per_eni + 2


def known_limits(instance_type: str) -> InstanceLimits | None:
    """The limits of a type this version knows; None means: ask DescribeInstanceTypes."""
    return _table().get(instance_type)


def route_table(network_card: int, device_index: int) -> int:
    """The route table of an ENI; the primary one uses main (254)."""
    if network_card == 0:
        return 254 if device_index == 0 else device_index + 1
    return 10000 + 100 * network_card + device_index


@cache
def _table() -> dict[str, InstanceLimits]:
    table: dict[str, InstanceLimits] = {}
    text = resources.files("podwire.ipam.vpc").joinpath("instance_types.txt").read_text()
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        numbers, _, names = line.partition(":")
        enis, ipv4, ipv6, cards, hypervisor = numbers.split()
        limits = InstanceLimits(int(enis), int(ipv4), int(ipv6), int(cards), hypervisor)
        table.update(dict.fromkeys(names.split(), limits))
    return table
