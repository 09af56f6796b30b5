"""What the cloud holds: VPCs, subnets, instances, ENIs. Every rule that EC2 enforces is here.

Times come from the injected clock, ids and MACs count up, so that a run can be repeated exactly.
"""

from __future__ import annotations

import ipaddress
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from podwire.ipam.vpc.limits import InstanceLimits, known_limits
from podwire.lab.cloud.faults import Ec2Error

Tags: TypeAlias = dict[str, str]

RESERVED = 4  # network address, router, DNS, future use; and the broadcast address at the end
BLOCK = 16  # addresses of a delegated /28


class Subnet:
    """A subnet and its addresses: unique, first free, the reserved ones never given."""

    def __init__(
        self,
        id: str,
        vpc_id: str,
        zone: str,
        cidr: str,
        ipv6_cidr: str = "",
        tags: Tags | None = None,
    ) -> None:
        self.id, self.vpc_id, self.zone = id, vpc_id, zone
        self.network = ipaddress.IPv4Network(cidr)
        self.ipv6_network = ipaddress.IPv6Network(ipv6_cidr) if ipv6_cidr else None
        self.tags: Tags = dict(tags or {})
        self.taken: set[int] = set()
        self.blocks6: set[int] = set()
        self._first = int(self.network.network_address) + RESERVED
        self._last = int(self.network.broadcast_address) - 1

    @property
    def available(self) -> int:
        return self._last - self._first + 1 - len(self.taken)

    def take(self, count: int) -> list[str]:
        """`count` addresses, all or none."""
        if count > self.available:
            raise Ec2Error(
                "InsufficientFreeAddressesInSubnet",
                f"The specified subnet does not have enough free addresses to satisfy the request."
                f" ({self.id}: {self.available} free)",
            )
        free = (n for n in range(self._first, self._last + 1) if n not in self.taken)
        numbers = list(itertools.islice(free, count))
        self.taken.update(numbers)
        return [str(ipaddress.IPv4Address(number)) for number in numbers]

    def take_this(self, text: str) -> str:
        """One named address."""
        number = int(ipaddress.IPv4Address(text))
        if not self._first <= number <= self._last:
            raise Ec2Error(
                "InvalidParameterValue", f"Address {text} does not fall within the subnet's range"
            )
        if number in self.taken:
            raise Ec2Error("InvalidIPAddress.InUse", f"Address {text} is in use.")
        self.taken.add(number)
        return text

    def take_blocks(self, count: int) -> list[str]:
        """`count` aligned, wholly free /28 blocks, all or none."""
        start = -(-self._first // BLOCK) * BLOCK
        blocks = (
            first
            for first in range(start, self._last - BLOCK + 2, BLOCK)
            if not any(number in self.taken for number in range(first, first + BLOCK))
        )
        found = list(itertools.islice(blocks, count))
        if len(found) < count:
            raise Ec2Error(
                "InsufficientCidrBlocks",
                "The specified subnet does not have enough free cidr blocks.",
            )
        for first in found:
            self.taken.update(range(first, first + BLOCK))
        return [f"{ipaddress.IPv4Address(first)}/28" for first in found]

    def take_blocks6(self, count: int) -> list[str]:
        """`count` /80 prefixes of the subnet's /64."""
        network = self._network6()
        free = (index for index in range(1, 1 << 16) if index not in self.blocks6)
        found = list(itertools.islice(free, count))
        self.blocks6.update(found)
        base = int(network.network_address)
        return [f"{ipaddress.IPv6Address(base + (index << 48))}/80" for index in found]

    def take6(self, count: int) -> list[str]:
        """`count` single IPv6 addresses; they come from the /80 that is never delegated."""
        base = int(self._network6().network_address)
        free = (n for n in range(16, 1 << 16) if -n not in self.blocks6)
        found = list(itertools.islice(free, count))
        self.blocks6.update(-n for n in found)
        return [str(ipaddress.IPv6Address(base + n)) for n in found]

    def release(self, texts: Iterable[str]) -> None:
        """Take back addresses and prefixes of either family."""
        for text in texts:
            network = ipaddress.ip_network(text)
            number = int(network.network_address)
            if isinstance(network, ipaddress.IPv4Network):
                self.taken.difference_update(range(number, number + network.num_addresses))
            else:
                offset = number - int(self._network6().network_address)
                self.blocks6.discard(offset >> 48 if network.prefixlen == 80 else -offset)

    def _network6(self) -> ipaddress.IPv6Network:
        if self.ipv6_network is None:
            raise Ec2Error("InvalidParameterValue", f"Subnet {self.id} has no IPv6 CIDR block.")
        return self.ipv6_network


@dataclass
class Attachment:
    """`ready_at`: when the device is in the instance and the status becomes attached."""

    id: str
    instance_id: str
    device_index: int
    card_index: int
    ready_at: float
    delete_on_termination: bool = False


@dataclass
class Eni:
    id: str
    mac: str
    subnet: Subnet
    primary: str
    created: float
    description: str = ""
    groups: list[str] = field(default_factory=list[str])
    tags: dict[str, str] = field(default_factory=dict[str, str])
    secondary: list[str] = field(default_factory=list[str])
    prefixes: list[str] = field(default_factory=list[str])
    ipv6: list[str] = field(default_factory=list[str])
    ipv6_prefixes: list[str] = field(default_factory=list[str])
    attachment: Attachment | None = None
    source_dest_check: bool = True
    interface_type: str = "interface"

    @property
    def slots(self) -> int:
        """IPv4 addresses and prefixes, as they count against the instance type's limit."""
        return 1 + len(self.secondary) + len(self.prefixes)

    @property
    def everything(self) -> list[str]:
        """All it holds of its subnet."""
        return [self.primary, *self.secondary, *self.prefixes, *self.ipv6, *self.ipv6_prefixes]


@dataclass
class Instance:
    id: str
    type: str
    subnet: Subnet
    limits: InstanceLimits
    state: str = "running"


@dataclass
class Vpc:
    id: str
    cidrs: list[str]
    ipv6_cidrs: list[str] = field(default_factory=list[str])


class Model:
    """One region of one account."""

    def __init__(self, *, region: str = "lab-1", clock: Callable[[], float] = time.time) -> None:
        self.region, self.clock = region, clock
        self.attach_delay_s = 0.0
        self.vpcs: dict[str, Vpc] = {}
        self.subnets: dict[str, Subnet] = {}
        self.instances: dict[str, Instance] = {}
        self.enis: dict[str, Eni] = {}
        self.tokens: dict[str, str] = {}  # ClientToken → ENI
        self.listeners: list[Callable[[], None]] = []
        self._ids = itertools.count(1)

    def add_vpc(self, cidrs: list[str], ipv6_cidrs: list[str] | None = None) -> Vpc:
        vpc = Vpc(self._id("vpc"), cidrs, ipv6_cidrs or [])
        self.vpcs[vpc.id] = vpc
        return vpc

    def add_subnet(
        self, vpc: Vpc, cidr: str, *, ipv6_cidr: str = "", zone: str = "a", tags: Tags | None = None
    ) -> Subnet:
        subnet = Subnet(self._id("subnet"), vpc.id, self.region + zone, cidr, ipv6_cidr, tags)
        self.subnets[subnet.id] = subnet
        return subnet

    def run_instance(
        self,
        type: str,
        subnet: Subnet,
        *,
        ipv6: bool = False,
        address: str = "",
        address6: str = "",
    ) -> Instance:
        """Launch an instance with its primary ENI at device index 0."""
        limits = known_limits(type)
        if limits is None:
            raise Ec2Error("InvalidParameterValue", f"Invalid value '{type}' for InstanceType.")
        instance = Instance(self._id("i"), type, subnet, limits)
        self.instances[instance.id] = instance
        eni = self.create_eni(subnet, groups=["sg-default"], primary=address)
        if ipv6:
            eni.ipv6 = [address6] if address6 else subnet.take6(1)
        self.attach(eni, instance, 0, 0, ready_at=self.clock()).delete_on_termination = True
        return instance

    def terminate(self, instance: Instance) -> None:
        """ENIs go with the instance when they say so, else they become available."""
        instance.state = "terminated"
        for eni in self.enis_of(instance.id):
            assert eni.attachment is not None
            goes, eni.attachment = eni.attachment.delete_on_termination, None
            if goes:
                self.delete(eni)
        self.changed()

    def create_eni(self, subnet: Subnet, *, groups: list[str], primary: str = "") -> Eni:
        address = subnet.take_this(primary) if primary else subnet.take(1)[0]
        number = next(self._ids)
        mac = "06:" + ":".join(f"{byte:02x}" for byte in number.to_bytes(5, "big"))
        eni = Eni(f"eni-{number:017x}", mac, subnet, address, self.clock(), groups=groups)
        self.enis[eni.id] = eni
        return eni

    def attach(
        self, eni: Eni, instance: Instance, device_index: int, card_index: int, ready_at: float
    ) -> Attachment:
        """Raises the errors of AttachNetworkInterface."""
        if eni.attachment is not None:
            raise Ec2Error(
                "InvalidNetworkInterface.InUse", f"Interface: [{eni.id}] is currently in use."
            )
        if eni.subnet.zone != instance.subnet.zone:
            raise Ec2Error(
                "InvalidParameterCombination",
                "You may not attach a network interface to an instance in another zone.",
            )
        attached = self.enis_of(instance.id)
        if any(
            other.attachment is not None
            and (other.attachment.device_index, other.attachment.card_index)
            == (device_index, card_index)
            for other in attached
        ):
            raise Ec2Error(
                "InvalidParameterValue",
                f"Instance '{instance.id}' already has an interface attached at device index"
                f" '{device_index}'.",
            )
        if len(attached) >= instance.limits.enis:
            raise Ec2Error(
                "AttachmentLimitExceeded",
                f"Interface count {len(attached) + 1} exceeds the limit for {instance.type}",
            )
        self.check_slots(eni, 0, instance)
        eni.attachment = Attachment(
            self._id("eni-attach"), instance.id, device_index, card_index, ready_at
        )
        self.changed()
        return eni.attachment

    def detach(self, eni: Eni) -> None:
        attachment = eni.attachment
        assert attachment is not None
        if attachment.device_index == 0:
            raise Ec2Error(
                "OperationNotPermitted",
                "The network interface at device index 0 cannot be detached.",
            )
        eni.attachment = None
        self.changed()

    def delete(self, eni: Eni) -> None:
        if eni.attachment is not None:
            raise Ec2Error(
                "InvalidParameterValue", f"Network interface '{eni.id}' is currently in use."
            )
        eni.subnet.release(eni.everything)
        del self.enis[eni.id]
        self.changed()

    def check_slots(self, eni: Eni, more: int, instance: Instance | None = None) -> None:
        """Refuse what the instance type's limit of addresses per ENI refuses."""
        if instance is None and eni.attachment is not None:
            instance = self.instances[eni.attachment.instance_id]
        if instance is None:
            return
        if eni.slots + more > instance.limits.ipv4_per_eni:
            raise Ec2Error(
                "PrivateIpAddressLimitExceeded",
                "Number of private addresses will exceed limit.",
            )
        if (eni.prefixes or eni.ipv6_prefixes) and not instance.limits.prefix_delegation:
            raise Ec2Error(
                "InvalidParameterValue", f"{instance.type} does not support prefix delegation."
            )

    def enis_of(self, instance_id: str) -> list[Eni]:
        """Attached, or being attached, in the order of their device indexes."""
        attached = (
            eni
            for eni in self.enis.values()
            if eni.attachment is not None and eni.attachment.instance_id == instance_id
        )
        return sorted(attached, key=lambda e: e.attachment.device_index if e.attachment else 0)

    def primary_eni(self, instance_id: str) -> Eni:
        return self.enis_of(instance_id)[0]

    def changed(self) -> None:
        """Tell whoever mirrors the model (the network, the metadata's history)."""
        for listener in self.listeners:
            listener()

    def _id(self, kind: str) -> str:
        return f"{kind}-{next(self._ids):017x}"
