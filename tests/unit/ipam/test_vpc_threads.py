"""The address manager as ADD and DEL see it, and what people see of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from podwire.ipam.pool import Demand, Exhausted, NotAvailable, Pool, Resting
from podwire.ipam.ranges import make_range
from podwire.ipam.vpc import introspection
from podwire.ipam.vpc.ec2 import Ec2
from podwire.ipam.vpc.manager import Manager
from podwire.ipam.vpc.settings import Settings
from podwire.ipam.vpc.threads import POOL, VpcPool
from podwire.lab.cloud.local import LocalEc2, LocalImds, LocalNetwork
from podwire.lab.cloud.model import Model
from podwire.lab.cloud.server import Cloud
from podwire.net import parse_address
from podwire.wiring import Attachment, Key, Pod, PodAddress


@pytest.fixture
def pool() -> Iterator[VpcPool]:
    """A t3.small with its manager in a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make() -> tuple[Manager[Key], VpcPool]:
        cloud = Cloud(Model())
        subnet = cloud.model.add_subnet(cloud.model.add_vpc(["10.0.0.0/16"]), "10.0.0.0/24")
        instance = cloud.model.run_instance("t3.small", subnet)
        manager: Manager[Key] = Manager(
            Ec2(LocalEc2(cloud)),
            LocalImds(cloud, instance.id),
            LocalNetwork(cloud),
            Settings(warm_eni_target=0),
            clock=time.monotonic,
        )
        pool = VpcPool(manager, loop, Pool(time.monotonic), wait_s=5)
        known = Attachment(
            key=key("old"), pool=POOL, addresses=(PodAddress(parse_address("10.0.0.5"), 32),)
        )
        resting = [Resting(POOL, parse_address("10.0.0.6"), time.monotonic() + 60)]
        pool.restore([known], resting)
        await manager.start()
        return manager, pool

    manager, pool = asyncio.run_coroutine_threadsafe(make(), loop).result(10)
    yield pool
    asyncio.run_coroutine_threadsafe(manager.close(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def key(container: str) -> Key:
    return Key("net", container, "eth0")


DEMAND = Demand(POOL, ())


def test_addresses_and_their_tables(pool: VpcPool) -> None:
    (first,) = pool.allocate(key("a"), DEMAND)
    assert pool.allocate(key("a"), DEMAND) == (first,)
    assert first.length == 32
    assert first.address not in map(parse_address, ("10.0.0.5", "10.0.0.6"))
    assert pool.allocate(key("old"), DEMAND)[0].address == parse_address("10.0.0.5")
    assert pool.table_of(first.address) in (254, 2)
    assert pool.table_of(parse_address("192.0.2.1")) == 0
    before = time.monotonic()
    assert pool.rest_until() >= before + 30
    pool.release(key("a"))
    (other,) = pool.allocate(key("b"), DEMAND)
    assert other.address != first.address
    pool.cancel(key("b"))
    assert pool.allocate(key("c"), DEMAND) == (other,)


def test_what_the_vpc_cannot_give(pool: VpcPool) -> None:
    with pytest.raises(NotAvailable):
        pool.allocate(key("a"), Demand(POOL, (), (parse_address("10.0.0.9"),)))
    for number in range(7):  # nine in all, one is old, one rests
        pool.allocate(key(f"p{number}"), DEMAND)
    with pytest.raises(Exhausted, match="3 of 3 ENIs"):
        pool.allocate(key("more"), DEMAND)


def test_ranges_of_a_configuration_are_the_hosts(pool: VpcPool) -> None:
    demand = Demand("other", ((make_range("192.168.0.0/24"),),))
    (first,) = pool.allocate(key("a"), demand)
    assert first.address == parse_address("192.168.0.2")
    pool.release(key("a"))
    (second,) = pool.allocate(key("b"), demand)
    assert second.address == parse_address("192.168.0.3")


def test_what_people_see(pool: VpcPool) -> None:
    (address,) = pool.allocate(key("secret"), DEMAND)
    pool.release(key("old"))
    manager = pool._manager

    def pod_of(_: Key) -> Pod:
        return Pod("default", "web-0")

    shown = introspection.enis(manager, pod_of, time.monotonic)
    assert shown["AssignedIPs"] == 1
    assert shown["CoolingIPs"] >= 1
    (primary, *_) = shown["ENIs"].values()
    assert primary["IsPrimary"]
    assert primary["RouteTableID"] == 254
    cidrs = primary["AvailableIPv4Cidrs"]
    assert all(cidr["Cidr"]["Mask"] == "/////w==" for cidr in cidrs.values())
    holders = [a for cidr in cidrs.values() for a in cidr["IPAddresses"].values()]
    held = next(a for a in holders if a["IPAMMetadata"])
    assert held["IPAMMetadata"] == {"k8sPodNamespace": "default", "k8sPodName": "web-0"}
    assert held["IPAMKey"]["networkName"] == "net"
    assert "secret" not in str(shown)  # container ids are scrubbed
    rests = next(a for a in holders if not a["IPAMMetadata"])
    assert rests["AssignedTime"] == introspection.NEVER
    assert rests["UnassignedTime"] != introspection.NEVER
    (row,) = introspection.pods(manager, pod_of)
    assert (row["pod"], row["device"]) == ("web-0", 0)
    assert parse_address(row["address"]) == address.address
    assert introspection.settings_in_force(Settings())["WARM_IP_TARGET"] == ""
