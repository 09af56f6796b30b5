"""The address manager of the AWS VPC CNI (v1.23), as an algorithm: for comparison only.

One loop every five seconds that does one thing: fill an attached ENI, else make one. Read from
aws/amazon-vpc-cni-k8s, pkg/ipamd/ipamd.go (nodeIPPoolManager, increaseDatastorePool) and
pkg/awsutils/awsutils.go (AllocENI: DescribeSubnets, CreateNetworkInterface, DescribeInstances,
AttachNetworkInterface, ModifyNetworkInterfaceAttribute; then the metadata service is asked until
the ENI shows). Where the original is slower still it is spared: a pod that waits has its address
the moment one is free, although kubelet would come back with a growing delay.
"""

from __future__ import annotations

import asyncio
from typing import Any

from podwire.ipam.vpc.cloud import Metadata
from podwire.ipam.vpc.limits import InstanceLimits
from podwire.ipam.vpc.settings import Settings
from podwire.lab.cloud.local import LocalEc2

LOOP_S = 5.0


class Original:
    """One node's pool. `pods` want an address each, from the beginning."""

    def __init__(
        self,
        invoke: LocalEc2,
        metadata: Metadata,
        settings: Settings,
        limits: InstanceLimits,
        pods: int,
    ) -> None:
        self._invoke, self._metadata, self._settings = invoke, metadata, settings
        self._limits, self._pods = limits, pods
        self._held: dict[str, int] = {}  # ENI → secondary addresses, in the order of attachment
        self.served_at: float | None = None

    @property
    def total(self) -> int:
        return sum(self._held.values())

    async def run(self) -> None:
        """Until cancelled."""
        me = await self._metadata.instance()
        self._instance, self._subnet, self._vpc = me.id, me.subnet_id, me.vpc_id
        (primary,) = await self._metadata.enis()
        self._held[primary.id] = 0
        while True:
            if self._short():
                await self._increase()
            if self.served_at is None and self.total >= self._pods:
                self.served_at = asyncio.get_running_loop().time()
            await asyncio.sleep(LOOP_S)

    def _short(self) -> int:
        """Addresses to ask for now; 0: the pool is not too low."""
        assigned = min(self._pods, self.total)
        available = self.total - assigned
        if self.total >= self._limits.max_pods:
            return 0
        if self._settings.ip_targets:
            warm, least = self._settings.warm_ip_target or 0, self._settings.minimum_ip_target or 0
            return max(warm - available, least - self.total, 0)
        slots, target = self._limits.slots_per_eni, self._settings.warm_eni_target
        low = available < slots * target or (target == 0 and available == 0)
        return slots if low else 0

    async def _increase(self) -> None:
        slots = self._limits.slots_per_eni
        for eni, held in self._held.items():
            if held < slots:
                count = min(slots - held, self._short())
                await self._call(
                    "AssignPrivateIpAddresses",
                    NetworkInterfaceId=eni,
                    SecondaryPrivateIpAddressCount=count,
                )
                self._held[eni] += count
                return
        if len(self._held) < self._limits.enis:
            await self._allocate_eni(min(self._short(), slots))

    async def _allocate_eni(self, count: int) -> None:
        filters = [{"Name": "vpc-id", "Values": [self._vpc]}]
        await self._call("DescribeSubnets", Filters=filters)
        created = await self._call(
            "CreateNetworkInterface",
            SubnetId=self._subnet,
            SecondaryPrivateIpAddressCount=count,
        )
        eni = created["NetworkInterface"]["NetworkInterfaceId"]
        found = await self._call("DescribeInstances", InstanceIds=[self._instance])
        taken = found["Reservations"][0]["Instances"][0]["NetworkInterfaces"]
        attached = await self._call(
            "AttachNetworkInterface",
            NetworkInterfaceId=eni,
            InstanceId=self._instance,
            DeviceIndex=len(taken),
        )
        change = {"AttachmentId": attached["AttachmentId"], "DeleteOnTermination": True}
        await self._call(
            "ModifyNetworkInterfaceAttribute", NetworkInterfaceId=eni, Attachment=change
        )
        delay = 0.1
        while all(one.id != eni for one in await self._metadata.enis()):
            await asyncio.sleep(delay)
            delay = min(delay * 2, 60.0)
        self._held[eni] = count

    async def _call(self, operation: str, **parameters: Any) -> Any:
        return await self._invoke(operation, parameters)
