"""The address manager against the fake EC2, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from podwire.ipam.pool import Exhausted
from podwire.ipam.vpc.manager import Node
from podwire.ipam.vpc.settings import Settings
from podwire.ipam.vpc.tags import stamp
from podwire.lab.cloud.faults import Fault
from podwire.lab.virtual_time import run
from podwire.net import parse_prefix
from tests.unit.ipam.vpc_world import World

WARM_IP = Settings(warm_ip_target=5)
PREFIXES = Settings(prefix_delegation=True, warm_prefix_target=1)


def pods(count: int, name: str = "pod") -> list[str]:
    return [f"{name}-{i}" for i in range(count)]


def total(world: World) -> int:
    return world.manager.store.stats().total


def test_a_new_node_fills_its_primary_eni() -> None:
    async def play() -> None:
        world = World("m5.xlarge")
        await world.start()
        await asyncio.sleep(5)
        assert total(world) == 14
        assert world.calls()["AssignPrivateIpAddresses"] == 1
        assert world.calls()["CreateNetworkInterface"] == 0
        world.check_at_rest()
        await world.manager.close()

    run(play())


def test_a_burst_is_served_by_one_round_of_requests() -> None:
    async def play() -> None:
        world = World("m5.xlarge", WARM_IP)
        await world.start()
        begun = world.clock()
        answers = await world.assign_all(*pods(30))
        assert len({answer.address for answer in answers}) == 30
        # The warm five, the rest of the primary ENI, two ENIs made and attached side by side.
        assert world.clock() - begun < 3.5
        calls = world.calls()
        assert calls["CreateNetworkInterface"] == calls["AttachNetworkInterface"] == 2
        assert calls["AssignPrivateIpAddresses"] == 2
        assert total(world) == 35
        await asyncio.sleep(120)
        assert world.calls()["ModifyNetworkInterfaceAttribute"] == 2
        world.check_at_rest()
        await world.manager.close()

    run(play())


def test_assigning_twice_gives_the_same_address_and_counts_once() -> None:
    async def play() -> None:
        world = World()
        manager = await world.start()
        first = await manager.assign("pod", 10)
        assert await manager.assign("pod", 10) == first
        assert manager.store.stats().assigned == 1
        assert manager.release("pod") == first
        assert manager.release("pod") is None
        await manager.close()

    run(play())


def test_a_freed_address_rests_before_another_pod_gets_it() -> None:
    async def play() -> None:
        world = World("t2.micro", Settings(warm_eni_target=0, max_eni=1))  # one address in all
        manager = await world.start()
        begun = await manager.assign("a", 10)
        manager.release("a")
        freed = world.clock()
        with pytest.raises(Exhausted):
            await manager.assign("late", 20)  # it rests for longer than the ADD may wait
        second = await manager.assign("b", 60)
        assert second.address == begun.address
        assert world.clock() - freed >= 30
        await manager.close()

    run(play())


def test_a_full_instance_is_named_at_once() -> None:
    async def play() -> None:
        world = World("t3.small")
        manager = await world.start()
        answers = await world.assign_all(*pods(9))
        assert all(not isinstance(answer, Exception) for answer in answers)
        begun = world.clock()
        with pytest.raises(Exhausted) as caught:
            await manager.assign("one-too-many", 60)
        assert world.clock() - begun < 1
        message = str(caught.value)
        assert "failed to assign an IP address to container" in message
        assert "3 of 3 ENIs" in message
        assert "at most 3 addresses" in message
        assert world.subnet.id in message
        await manager.close()

    run(play())


def test_those_served_later_wait_and_those_beyond_the_limit_do_not() -> None:
    async def play() -> None:
        world = World("t3.small")
        await world.start()
        answers = await world.assign_all(*pods(12))
        assert [isinstance(answer, Exhausted) for answer in answers] == [False] * 9 + [True] * 3
        await world.manager.close()

    run(play())


def test_an_exhausted_subnet_is_used_up_and_then_named() -> None:
    async def play() -> None:
        world = World("m5.4xlarge", cidr="10.0.0.0/28")  # 11 addresses, one is the primary's
        manager = await world.start()
        answers = await world.assign_all(*pods(11), timeout_s=30)
        good = [answer for answer in answers if not isinstance(answer, Exception)]
        assert len(good) == 10
        assert world.subnet.available == 0
        (refused,) = [answer for answer in answers if isinstance(answer, Exception)]
        assert isinstance(refused, Exhausted)
        assert f"subnet {world.subnet.id} (10.0.0.0/28) has no free addresses" in str(refused)
        assert "all 11 are taken" in str(refused)
        world.check_at_rest()
        await manager.close()

    run(play())


def test_another_tagged_subnet_takes_over() -> None:
    async def play() -> None:
        world = World("m5.4xlarge", cidr="10.0.0.0/28")
        tags = {"kubernetes.io/role/cni": "1"}
        other = world.model.add_subnet(world.vpc, "10.0.8.0/24", tags=tags)
        world.model.add_subnet(world.vpc, "10.0.9.0/24", zone="b", tags=tags)
        world.model.add_subnet(world.vpc, "10.0.10.0/24", tags={"kubernetes.io/role/cni": "0"})
        world.model.add_subnet(world.vpc, "10.0.11.0/24")
        await world.start()
        answers = await world.assign_all(*pods(25))
        assert not [answer for answer in answers if isinstance(answer, Exception)]
        used = {eni.subnet.id for eni in world.model.enis_of(world.instance.id)}
        assert used == {world.subnet.id, other.id}
        world.check_at_rest()
        await world.manager.close()

    run(play())


def test_prefixes() -> None:
    async def play() -> None:
        world = World("m5.large", PREFIXES)
        world.manager.set_node(Node(max_pods=110))
        await world.start()
        answers = await world.assign_all(*pods(17))
        assert len({answer.address for answer in answers}) == 17
        await asyncio.sleep(5)
        stats = world.manager.store.stats()
        assert (stats.prefixes, stats.free_prefixes) == (3, 1)
        for pod in pods(17):
            world.manager.release(pod)
        await asyncio.sleep(70)
        assert world.manager.store.stats().prefixes == 1
        world.check_at_rest()
        await world.manager.close()

    run(play())


def test_a_fragmented_subnet_still_gives_single_addresses() -> None:
    async def play() -> None:
        world = World("m5.large", PREFIXES, cidr="10.0.0.0/26")
        for block in range(4):
            world.subnet.take_this(f"10.0.0.{block * 16 + 7}")
        await world.start()
        answers = await world.assign_all(*pods(5))
        assert not [answer for answer in answers if isinstance(answer, Exception)]
        assert world.manager.store.stats().prefixes == 0
        world.check_at_rest()
        await world.manager.close()

    run(play())


def test_ipv6_has_one_prefix_on_the_primary_eni() -> None:
    async def play() -> None:
        settings = Settings(ipv6=True, prefix_delegation=True, warm_prefix_target=1)
        world = World("m5.large", settings, ipv6_cidr="fd00:10::/64")
        await world.start()
        answers = await world.assign_all(*pods(40))
        prefix = parse_prefix("fd00:10::1:0:0:0/80")
        assert all(answer.address in prefix for answer in answers)
        assert world.calls()["AssignIpv6Addresses"] == 1
        assert world.calls()["CreateNetworkInterface"] == 0
        world.check_at_rest()
        await world.manager.close()

    run(play())


def test_what_is_over_goes_back_enis_first() -> None:
    async def play() -> None:
        world = World("m5.xlarge", WARM_IP)
        await world.start()
        await world.assign_all(*pods(30))
        for pod in pods(28):
            world.manager.release(pod)
        await asyncio.sleep(200)
        assert total(world) == 7
        assert len(world.model.enis) == 2  # the last two pods sit on a secondary one
        assert world.calls()["DeleteNetworkInterface"] == 1
        world.check_at_rest()
        await world.manager.close()

    run(play())


def test_nothing_is_warm_on_a_cordoned_node_but_pods_are_served() -> None:
    async def play() -> None:
        world = World("m5.xlarge")
        world.manager.set_node(Node(schedulable=False))
        manager = await world.start()
        await asyncio.sleep(10)
        assert total(world) == 0
        assert (await manager.assign("daemon", 10)).address
        assert total(world) == 1
        await manager.close()

    run(play())


def test_custom_networking_uses_the_enis_of_its_subnet_only() -> None:
    async def play() -> None:
        world = World("m5.large", Settings(custom_networking=True, warm_ip_target=1))
        other = world.model.add_subnet(world.vpc, "10.0.128.0/24")
        world.manager.set_node(Node(eni_config_subnet=other.id, eni_config_groups=("sg-pods",)))
        await world.start()
        answers = await world.assign_all(*pods(3))
        assert all(answer.address in parse_prefix("10.0.128.0/24") for answer in answers)
        primary, secondary = world.model.enis_of(world.instance.id)
        assert not primary.secondary
        assert secondary.groups == ["sg-pods"]
        world.check_at_rest()
        await world.manager.close()

    run(play())


def test_unmanaged_enis_are_left_alone_and_count_against_the_limit() -> None:
    async def play() -> None:
        world = World("t3.small", Settings(warm_eni_target=0))
        foreign = world.model.create_eni(world.subnet, groups=[])
        foreign.secondary = world.subnet.take(2)
        foreign.tags["node.k8s.amazonaws.com/no_manage"] = "true"
        world.model.attach(foreign, world.instance, 1, 0, ready_at=0.0)
        await world.start()
        answers = await world.assign_all(*pods(9))
        good = [answer for answer in answers if not isinstance(answer, Exception)]
        assert len(good) == 6
        assert not {foreign.primary, *foreign.secondary} & {
            ".".join(map(str, answer.address)) for answer in good
        }
        await world.manager.close()

    run(play())


# -- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(code="RequestLimitExceeded", times=6),
        Fault(code="InternalError", probability=0.5),
        Fault("Assign*", lose_answer=True, times=1),
        Fault("CreateNetworkInterface", lose_answer=True, times=2),
        Fault("AttachNetworkInterface", lose_answer=True, times=1),
        Fault("AttachNetworkInterface", code="InvalidParameterValue", times=1),
        Fault("AttachNetworkInterface", code="UnauthorizedOperation", times=1),
        Fault(delay_s=3.0, probability=0.3),
    ],
    ids=lambda fault: f"{fault.operations}-{fault.code or fault.lose_answer}",
)
def test_pods_get_their_addresses_through(fault: Fault) -> None:
    async def play() -> None:
        world = World("m5.large", WARM_IP, seed=3)
        await world.start()
        world.cloud.faults.add(fault)
        answers = await world.assign_all(*pods(20), timeout_s=90)
        assert len({answer.address for answer in answers}) == 20
        world.cloud.faults.clear()
        await asyncio.sleep(400)
        world.check_at_rest()
        await world.manager.close()

    run(play())


def test_an_api_that_is_away_is_named_when_an_add_gives_up() -> None:
    async def play() -> None:
        world = World("m5.large", WARM_IP)
        manager = await world.start()
        await world.assign_all(*pods(9))
        world.cloud.faults.add(Fault(code="UnauthorizedOperation", message="no right to do that"))
        answers = await world.assign_all(*pods(20, "more"), timeout_s=15)
        refused = [answer for answer in answers if isinstance(answer, Exception)]
        assert refused
        assert all("UnauthorizedOperation" in str(answer) for answer in refused)
        assert manager.store.stats().assigned == 29 - len(refused)
        await manager.close()

    run(play())


def test_throttled_managers_back_off_with_jitter() -> None:
    async def play() -> None:
        world = World("m5.large", WARM_IP)
        await world.start()
        begun, before = world.clock(), len(world.cloud.calls)
        world.cloud.faults.add(Fault(code="RequestLimitExceeded"))
        await world.assign_all(*pods(20), timeout_s=100)
        assert world.clock() - begun >= 99
        assert len(world.cloud.calls) - before < 40
        await world.manager.close()

    run(play())


def test_a_start_without_ec2_uses_what_the_metadata_service_shows() -> None:
    async def play() -> None:
        world = World("m5.large", WARM_IP)
        await world.start()
        await world.assign_all("before")
        world.cloud.faults.add(Fault(code="Unavailable"))
        manager = await world.restart()
        assert len(await world.assign_all("before", "after")) == 2
        assert manager.store.stats().assigned == 2
        world.cloud.faults.clear()
        await asyncio.sleep(60)
        world.check_at_rest()
        await manager.close()

    run(play())


def test_a_stale_metadata_answer_takes_nothing_from_a_pod() -> None:
    async def play() -> None:
        world = World("m5.large", WARM_IP)
        manager = await world.start()
        world.cloud.metadata(world.instance.id).delay_s = 10_000.0
        await world.assign_all(*pods(20))
        await asyncio.sleep(300)
        assert manager.store.stats().assigned == 20
        assert total(world) == 25
        world.check_at_rest()
        await manager.close()

    run(play())


def test_an_eni_that_vanishes_leaves_the_books_on_the_second_look() -> None:
    async def play() -> None:
        world = World("m5.large", WARM_IP)
        manager = await world.start()
        answers = await world.assign_all(*pods(12))
        second = world.model.enis_of(world.instance.id)[1]
        on_second = [a for a in answers if world.manager.store.eni_of(a.address).order == (0, 1)]
        world.model.detach(second)
        await world.until(lambda: manager.store.enis[second.id].gone_once)  # and it stays
        more = await world.assign_all("new")
        assert manager.store.eni_of(more[0].address).record.id != second.id
        await asyncio.sleep(30)
        assert second.id not in manager.store.enis
        assert manager.store.stats().assigned == 13 - len(on_second)
        assert len(manager.store.owners) == 13
        assert len({a.address for a in [*answers, *more]}) == 13
        await manager.close()

    run(play())


def test_addresses_that_somebody_adds_are_found() -> None:
    async def play() -> None:
        world = World("m5.large", WARM_IP)
        await world.start()
        await asyncio.sleep(5)
        world.model.primary_eni(world.instance.id).secondary += world.subnet.take(2)
        world.model.changed()
        await asyncio.sleep(62)
        assert total(world) == 7
        await asyncio.sleep(60)
        assert total(world) == 5
        world.check_at_rest()
        await world.manager.close()

    run(play())


# -- restarts and leaks ------------------------------------------------------------------------


def test_a_restart_loses_nothing() -> None:
    async def play() -> None:
        world = World("m5.large", WARM_IP)
        await world.start()
        before = await world.assign_all(*pods(12))
        world.manager.release("pod-0")
        manager = await world.restart()
        assert await world.assign_all(*pods(12)[1:]) != []
        assert {a.address for a in before[1:]} == set(manager.store.owners)
        assert before[0].address in manager.store.cooling
        await asyncio.sleep(100)
        world.check_at_rest()
        await manager.close()

    run(play())


@pytest.mark.parametrize("cut_at_s", [0.1, 0.3, 0.5, 1.0, 2.3])
def test_an_eni_cut_off_on_its_way_is_adopted_or_deleted(cut_at_s: float) -> None:
    async def play() -> None:
        world = World("m5.large", Settings(warm_eni_target=0))
        await world.start()
        await asyncio.sleep(3)
        burst = asyncio.ensure_future(world.assign_all(*pods(10), timeout_s=5))
        await asyncio.sleep(cut_at_s)
        manager = await world.restart()
        await asyncio.gather(burst, return_exceptions=True)
        await asyncio.sleep(300)
        world.check_at_rest()
        await manager.close()

    run(play())


def test_leaked_enis_of_dead_nodes_are_swept() -> None:
    async def play() -> None:
        world = World("m5.large", Settings(cluster_name="lab"))
        common = {"cluster.k8s.amazonaws.com/name": "lab"}

        def leak(age_s: float | None, description: str) -> str:
            eni = world.model.create_eni(world.subnet, groups=[])
            eni.description = description
            eni.tags.update(common)
            eni.tags["node.k8s.amazonaws.com/instance_id"] = "i-dead"
            if age_s is not None:
                eni.tags["node.k8s.amazonaws.com/createdAt"] = stamp(world.wall() - age_s)
            return eni.id

        old = leak(4000, "aws-K8S-i-dead")
        undated = leak(None, "aws-K8S-i-dead")
        foreign = leak(4000, "somebody else's")
        await world.start()
        await asyncio.sleep(700)
        assert old not in world.model.enis
        assert undated in world.model.enis  # dated now, judged on the next round
        assert foreign in world.model.enis
        await asyncio.sleep(8000)
        assert undated not in world.model.enis
        assert foreign in world.model.enis
        await world.manager.close()

    run(play())


def test_enis_that_stay_end_with_the_instance() -> None:
    async def play() -> None:
        world = World("m5.xlarge")
        await world.start()
        await world.assign_all(*pods(20))
        await asyncio.sleep(120)
        world.model.terminate(world.instance)
        assert not world.model.enis
        await world.manager.close()

    run(play())


def test_a_creation_that_is_never_answered_leaves_no_eni_behind() -> None:
    async def play() -> None:
        world = World("m5.large", Settings(warm_eni_target=0))
        await world.start()
        await asyncio.sleep(1000)
        world.cloud.faults.add(Fault("CreateNetworkInterface", lose_answer=True))
        await world.assign_all(*pods(12), timeout_s=20)
        assert len(world.model.enis) > 1
        world.cloud.faults.clear()
        await asyncio.sleep(200)
        world.check_at_rest()
        await world.manager.close()

    run(play())


def test_an_unassignment_under_way_is_not_undone_by_an_answer_from_before_it() -> None:
    async def play() -> None:
        world = World("m5.large", WARM_IP)
        manager = await world.start()
        await world.assign_all(*pods(9))
        for pod in pods(9):
            manager.release(pod)
        world.cloud.faults.add(Fault("Unassign*", delay_s=20.0))
        await world.until(lambda: any("unassign" in f.what for f in manager.steps.flights))
        manager.upkeep.look_at_ec2_soon()
        await asyncio.sleep(2)
        answers = await world.assign_all(*pods(6, "new"))
        await asyncio.sleep(30)
        world.check_in_ec2(answer.address for answer in answers)
        await manager.close()

    run(play())


def test_who_waits_when_the_agent_ends_is_told_so() -> None:
    async def play() -> None:
        world = World("t3.small", Settings(warm_eni_target=0))
        manager = await world.start()
        waiting = asyncio.ensure_future(manager.assign("pod", 60))
        await asyncio.sleep(0.01)
        begun = world.clock()
        manager.dismiss()
        with pytest.raises(Exhausted, match="has stopped"):
            await waiting
        with pytest.raises(Exhausted, match="has stopped"):
            await manager.assign("late", 60)
        assert world.clock() == begun
        await manager.close()

    run(play())


def test_addresses_that_ec2_had_no_time_to_take_back_stay_in_the_books() -> None:
    async def play() -> None:
        world = World("t3.small", Settings(warm_ip_target=1, cooldown_s=1))
        manager = await world.start()
        await world.assign_all(*pods(3))
        for pod in pods(3):
            manager.release(pod)
        world.cloud.faults.add(Fault("Unassign*", code="RequestLimitExceeded", times=1))
        await world.until(lambda: world.calls()["UnassignPrivateIpAddresses"] > 0)
        await asyncio.sleep(1)
        world.check_at_rest()
        await manager.close()

    run(play())


def test_requests_that_fail_together_are_one_complaint() -> None:
    async def play() -> None:
        world = World("m5.4xlarge", Settings(warm_ip_target=0, minimum_ip_target=0))
        manager = await world.start()
        world.cloud.faults.add(Fault("*", code="RequestLimitExceeded"))
        asking = asyncio.ensure_future(world.assign_all(*pods(200)))  # seven ENIs
        await world.until(lambda: world.calls()["CreateNetworkInterface"] >= 7)
        await asyncio.sleep(0.5)
        assert manager._paused_until - world.clock() < 1
        world.cloud.faults.clear()
        await asking
        await manager.close()

    run(play())
