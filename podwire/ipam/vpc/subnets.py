"""Which subnet new addresses come from, and which have none left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from podwire.ipam.vpc.cloud import Cloud, CloudSubnet, Instance
from podwire.ipam.vpc.settings import Settings
from podwire.net import Prefix

ROLE_TAG = "kubernetes.io/role/cni"  # 1: for pods, 0: not for pods
CLUSTER_TAG = "cni.networking.k8s.aws/cluster/"
EXHAUSTED_S = 120.0  # EC2 is not asked again for that long
REFRESH_S = 3600.0
RESERVED = 5  # addresses EC2 keeps of every subnet


@dataclass(frozen=True)
class _Shortage:
    """`left` addresses were free when EC2 last refused; `fragmented`: no /28 is whole."""

    until: float
    left: int
    fragmented: bool


class Subnets:
    """The subnets of the instance's zone, as last described."""

    def __init__(
        self,
        cloud: Cloud,
        settings: Settings,
        instance: Instance,
        clock: Callable[[], float],
        custom: Callable[[], str],
    ) -> None:
        """`custom` names the subnet of the node's ENIConfig, with custom networking."""
        self._cloud, self._settings, self._instance = cloud, settings, instance
        self._clock = clock
        self._known: dict[str, CloudSubnet] = {}
        self._short: dict[str, _Shortage] = {}
        self._asked_at = 0.0
        self._custom = custom

    async def refresh_if_old(self) -> None:
        """Ask EC2 when the last answer is an hour old: subnets are tagged and fill up."""
        if self._clock() >= self._asked_at + REFRESH_S:
            await self.refresh()

    async def refresh(self) -> None:
        """Ask EC2. Raises CloudError."""
        self._asked_at = self._clock()
        found = await self._cloud.subnets(self._instance.vpc_id, self._instance.zone)
        self._known = {subnet.id: subnet for subnet in found}

    def learn(self, subnet_id: str, cidr: Prefix) -> None:
        """From another source, while EC2 does not answer."""
        self._known.setdefault(subnet_id, CloudSubnet(subnet_id, cidr, 0, self._instance.zone))

    def choose(self, prefixes: bool) -> str:
        """The subnet for a new ENI: the one with most free addresses; "" when none has any."""
        ids = [id for id in self.candidates() if self.left(id, prefixes) > 1]
        return max(ids, key=self._available, default="")

    def candidates(self) -> list[str]:
        """The subnets that pods may have addresses of."""
        if self._settings.custom_networking:
            return [custom] if (custom := self._custom()) else []
        own = self._instance.subnet_id
        if not self._settings.subnet_discovery:
            return [own]
        tagged = [id for id, subnet in self._known.items() if self._tagged(subnet) and id != own]
        return tagged if self.excluded(own) else [own, *tagged]

    def excluded(self, subnet_id: str) -> bool:
        """Tagged as not for pods."""
        subnet = self._known.get(subnet_id)
        discovery = self._settings.subnet_discovery and not self._settings.custom_networking
        return discovery and subnet is not None and subnet.tags.get(ROLE_TAG) == "0"

    def cidr(self, subnet_id: str, ipv6: bool = False) -> Prefix | None:
        subnet = self._known.get(subnet_id)
        if subnet is None:
            return None
        return subnet.cidr6 if ipv6 else subnet.cidr

    async def refused(self, subnet_id: str, fragmented: bool) -> None:
        """EC2 has too few addresses here: learn how many, for a while."""
        until = self._clock() + EXHAUSTED_S
        self._short[subnet_id] = _Shortage(until, 0, fragmented)
        await self.refresh()
        subnet = self._known.get(subnet_id)
        left = subnet.available if subnet else 0
        self._short[subnet_id] = _Shortage(until, left, fragmented)

    def took(self, subnet_id: str, addresses: int) -> None:
        """Some of the few that were left are ours now."""
        if short := self._shortage(subnet_id):
            self._short[subnet_id] = replace(short, left=max(short.left - addresses, 0))

    def left(self, subnet_id: str, prefixes: bool = False) -> int:
        """Addresses, or prefixes, that may be asked for; many unless EC2 refused lately."""
        short = self._shortage(subnet_id)
        if short is None:
            return 1 << 16
        return 0 if prefixes and short.fragmented else short.left

    def fragmented(self, subnet_id: str) -> bool:
        short = self._shortage(subnet_id)
        return short is not None and short.fragmented

    def all_fragmented(self) -> bool:
        """No subnet has a whole /28 to delegate; single addresses may be left."""
        candidates = self.candidates()
        return bool(candidates) and all(self.fragmented(id) for id in candidates)

    def exhausted(self) -> list[str]:
        return [id for id in self._short if self.left(id) == 0]

    def why_exhausted(self) -> str:
        """One sentence that names the subnets and their sizes."""
        parts: list[str] = []
        for id in self.exhausted():
            cidr = self.cidr(id)
            size = f", all {(1 << (32 - cidr.length)) - RESERVED} are taken" if cidr else ""
            parts.append(f"{self.name(id)} has no free addresses{size}")
        return "; ".join(parts)

    def name(self, subnet_id: str) -> str:
        cidr = self.cidr(subnet_id)
        return f"subnet {subnet_id} ({cidr})" if cidr else f"subnet {subnet_id}"

    def _shortage(self, subnet_id: str) -> _Shortage | None:
        short = self._short.get(subnet_id)
        if short is not None and short.until <= self._clock():
            del self._short[subnet_id]
            return None
        return short

    def _available(self, subnet_id: str) -> int:
        subnet = self._known.get(subnet_id)
        return subnet.available if subnet else 0

    def _tagged(self, subnet: CloudSubnet) -> bool:
        if subnet.tags.get(ROLE_TAG, "0") == "0":
            return False
        clusters = [key for key in subnet.tags if key.startswith(CLUSTER_TAG)]
        ours = CLUSTER_TAG + self._settings.cluster_name
        return not clusters or not self._settings.cluster_name or ours in clusters
