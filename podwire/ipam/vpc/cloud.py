"""What the address manager asks of a cloud, and the values that come back."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from podwire.errors import PodwireError
from podwire.ipam.vpc.limits import InstanceLimits
from podwire.net import Address, Prefix

THROTTLES = frozenset(
    ("RequestLimitExceeded", "Throttling", "ThrottlingException", "RequestThrottled")
)


class CloudError(PodwireError):
    """EC2 or the metadata service refused, or did not answer (`code` is empty then)."""

    def __init__(self, message: str, *, code: str = "", operation: str = "") -> None:
        super().__init__(f"{operation}: {code}: {message}" if code else f"{operation}: {message}")
        self.code = code

    @property
    def throttled(self) -> bool:
        return self.code in THROTTLES

    @property
    def unanswered(self) -> bool:
        """Nobody knows whether it was carried out."""
        return not self.code or self.code in ("InternalError", "Unavailable", "ServiceUnavailable")

    @property
    def subnet_exhausted(self) -> bool:
        return self.code in ("InsufficientFreeAddressesInSubnet", "InsufficientCidrBlocks")

    @property
    def fragmented(self) -> bool:
        """No /28 is free as a whole; single addresses may be."""
        return self.code == "InsufficientCidrBlocks"

    @property
    def out_of_step(self) -> bool:
        """EC2 holds something else than we think: look again before the next step."""
        return self.code in (
            "PrivateIpAddressLimitExceeded",
            "AttachmentLimitExceeded",
            "InvalidNetworkInterfaceID.NotFound",
            "InvalidNetworkInterface.InUse",
            "InvalidAttachmentID.NotFound",
            "InvalidParameterValue",
        )

    @property
    def gone(self) -> bool:
        return self.code in ("InvalidNetworkInterfaceID.NotFound", "InvalidAttachmentID.NotFound")


@dataclass(frozen=True)
class CloudEni:
    """An ENI as EC2 describes it. `cidrs`: secondary /32s, delegated /28s and /80s."""

    id: str
    mac: str
    subnet_id: str
    address: Address  # the primary IPv4 address
    cidrs: frozenset[Prefix] = frozenset()
    device_index: int | None = None  # None: not attached
    card_index: int = 0
    attachment_id: str = ""
    instance_id: str = ""
    delete_on_termination: bool = False
    kind: str = "interface"
    description: str = ""
    groups: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def primary(self) -> bool:
        return self.device_index == 0 and self.card_index == 0


@dataclass(frozen=True)
class CloudSubnet:
    id: str
    cidr: Prefix
    available: int
    zone: str
    cidr6: Prefix | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class NewEni:
    """What CreateNetworkInterface is asked for. `token` makes asking twice harmless."""

    subnet_id: str
    groups: Sequence[str]
    description: str
    tags: Mapping[str, str]
    token: str
    addresses: int = 0
    prefixes: int = 0
    ipv6: bool = False


@dataclass(frozen=True)
class Instance:
    """Who we are, as the metadata service says."""

    id: str
    type: str
    region: str
    zone: str
    vpc_id: str
    primary_mac: str
    primary_address: Address
    groups: tuple[str, ...]
    subnet_id: str
    vpc_cidrs: tuple[Prefix, ...]


@dataclass(frozen=True)
class MetaEni:
    """An ENI as the metadata service shows it: perhaps stale, perhaps half."""

    id: str
    mac: str
    device_index: int
    address: Address
    cidrs: frozenset[Prefix]
    subnet_id: str = ""
    subnet: Prefix | None = None
    card_index: int = 0


class Cloud(Protocol):
    """EC2. Every call raises CloudError and may be repeated."""

    async def attached_enis(self, instance_id: str) -> list[CloudEni]: ...
    async def find_enis(self, filters: Mapping[str, str]) -> list[CloudEni]: ...
    async def create_eni(self, new: NewEni) -> CloudEni: ...
    async def attach_eni(self, eni_id: str, instance_id: str, device_index: int) -> str: ...
    async def delete_on_termination(self, eni_id: str, attachment_id: str) -> None: ...
    async def detach_eni(self, attachment_id: str) -> None: ...
    async def delete_eni(self, eni_id: str) -> None: ...
    async def assign(self, eni_id: str, addresses: int, prefixes: int) -> list[Prefix]: ...
    async def assign_ipv6(self, eni_id: str, prefixes: int) -> list[Prefix]: ...
    async def unassign(self, eni_id: str, cidrs: Sequence[Prefix]) -> None: ...
    async def subnets(self, vpc_id: str, zone: str) -> list[CloudSubnet]: ...
    async def tag(self, resource_id: str, tags: Mapping[str, str]) -> None: ...
    async def limits(self, instance_type: str) -> InstanceLimits: ...


class Metadata(Protocol):
    """The metadata service. Raises CloudError."""

    async def instance(self) -> Instance: ...
    async def enis(self) -> list[MetaEni]: ...


class Invoke(Protocol):
    """One EC2 request: operation and parameters in boto3's shape, its answer, or CloudError."""

    def __call__(self, operation: str, parameters: Mapping[str, Any]) -> Awaitable[Any]: ...
