"""A region, an instance and its address manager in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from podwire.ipam.vpc.ec2 import Ec2
from podwire.ipam.vpc.manager import Manager
from podwire.ipam.vpc.settings import Settings
from podwire.lab.cloud.local import LocalEc2, LocalImds, LocalNetwork
from podwire.lab.cloud.model import Model
from podwire.lab.cloud.server import Cloud
from podwire.net import Address, format_address, parse_prefix

EPOCH = 1_700_000_000.0


class World:
    """To be made inside a running VirtualLoop."""

    def __init__(
        self,
        instance_type: str = "m5.xlarge",
        settings: Settings | None = None,
        *,
        cidr: str = "10.0.0.0/20",
        ipv6_cidr: str = "",
        seed: int = 0,
        latency_s: float = 0.2,
        attach_s: float = 2.0,
    ) -> None:
        self.clock = asyncio.get_running_loop().time
        self.settings = settings or Settings()
        self.random = random.Random(seed)
        self.cloud = Cloud(Model(clock=self.wall))
        self.model = self.cloud.model
        self.model.attach_delay_s = attach_s
        self.cloud.faults.latency_s = latency_s
        self.vpc = self.model.add_vpc(["10.0.0.0/16"])
        self.subnet = self.model.add_subnet(self.vpc, cidr, ipv6_cidr=ipv6_cidr)
        self.instance = self.model.run_instance(instance_type, self.subnet, ipv6=self.settings.ipv6)
        self.manager = self.new_manager()

    def wall(self) -> float:
        return EPOCH + self.clock()

    def new_manager(self) -> Manager[str]:
        """Another life of the agent: nothing in memory survives."""
        self.imds = LocalImds(self.cloud, self.instance.id)
        self.network = LocalNetwork(self.cloud)
        return Manager(
            Ec2(LocalEc2(self.cloud)),
            self.imds,
            self.network,
            self.settings,
            clock=self.clock,
            wall=self.wall,
            randomness=random.Random(self.random.random()),
        )

    async def start(self) -> Manager[str]:
        await self.manager.start()
        return self.manager

    async def restart(self) -> Manager[str]:
        """Die and come back with what the state file would hold."""
        old = self.manager
        owned = [(a.owner, a.address) for a in old.store.owners.values()]
        resting = list(old.store.cooling.items())
        await old.close()
        self.manager = self.new_manager()
        self.manager.store.restore(owned, resting)
        return await self.start()

    async def assign_all(self, *pods: str, timeout_s: float = 60.0) -> list[Any]:
        """An address, or the exception, per pod."""
        waits = (self.manager.assign(pod, timeout_s) for pod in pods)
        return await asyncio.gather(*waits, return_exceptions=True)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 200.0) -> None:
        """Let virtual time pass until `condition` holds."""
        for _ in range(int(timeout_s * 4)):
            if condition():
                return
            await asyncio.sleep(0.25)
        raise AssertionError(f"not within {timeout_s:g} s")

    def calls(self) -> Counter[str]:
        return Counter(call.operation for call in self.cloud.calls)

    def check(self) -> None:
        """What must hold at any moment, whatever happened."""
        store = self.manager.store
        owned = [assignment.address for assignment in store.owners.values()]
        assert len(owned) == len(set(owned)), "an address has two owners"
        assert not set(owned) & set(store.cooling), "an owned address rests"

    def check_in_ec2(self, addresses: Iterable[Address]) -> None:
        """Pods have addresses that EC2 routes to this instance, at every moment."""
        there = [
            parse_prefix(text)
            for eni in self.model.enis_of(self.instance.id)
            for text in (*eni.secondary, *eni.prefixes, *eni.ipv6_prefixes)
        ]
        for address in addresses:
            assert any(address in prefix for prefix in there), (
                f"{format_address(address)} is not ours"
            )

    def check_at_rest(self) -> None:
        """What must hold once EC2 answers again and everything has settled."""
        self.check()
        store, model = self.manager.store, self.model
        attached = {eni.id: eni for eni in model.enis_of(self.instance.id)}
        assert set(store.enis) == set(attached), "the books and EC2 differ about ENIs"
        for id, eni in attached.items():
            held = {str(cidr).removesuffix("/32") for cidr in store.enis[id].cidrs}
            there = {*eni.secondary, *eni.prefixes, *eni.ipv6_prefixes}
            assert held == there, f"the books and EC2 differ about {id}"
            assert eni.mac in self.network.links
        loose = [eni.id for eni in model.enis.values() if eni.attachment is None]
        assert not loose, f"leaked: {loose}"
        for assignment in store.owners.values():
            assert store.eni_of(assignment.address), "a pod's address is on no ENI"
