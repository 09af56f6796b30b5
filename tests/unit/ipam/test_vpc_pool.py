"""The tables of numbers that users of the AWS VPC CNI plan with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from podwire.ipam.vpc.limits import InstanceLimits, known_limits, route_table
from podwire.ipam.vpc.plan import (
    Create,
    EniView,
    Fill,
    eni_room,
    enis_to_release,
    free_device_index,
    grow,
)
from podwire.ipam.vpc.pool import (
    Need,
    PoolStats,
    need,
    prefixes_short_and_over,
    short_and_over,
    surplus,
)
from podwire.ipam.vpc.settings import Settings

T3_SMALL, P3DN = "t3.small", "p3dn.24xlarge"
WARM_ENI = Settings(warm_eni_target=1)
PREFIXES = Settings(prefix_delegation=True, warm_prefix_target=1)


def ip_targets(warm: int | None, minimum: int | None, prefixes: bool = False) -> Settings:
    return Settings(warm_ip_target=warm, minimum_ip_target=minimum, prefix_delegation=prefixes)


def limits_of(name: str) -> InstanceLimits:
    limits = known_limits(name)
    assert limits is not None
    return limits


@pytest.mark.parametrize(
    ("name", "enis", "addresses", "max_pods"),
    [
        ("t2.micro", 2, 2, 4),
        ("t3.small", 3, 4, 11),
        ("m5.large", 3, 10, 29),
        ("m5.xlarge", 4, 15, 58),
        ("m4.4xlarge", 8, 30, 234),
        ("c5n.18xlarge", 15, 50, 737),
        ("p3dn.24xlarge", 15, 50, 737),
        ("p4d.24xlarge", 15, 50, 737),  # four network cards, the default one counts
    ],
)
def test_instance_limits(name: str, enis: int, addresses: int, max_pods: int) -> None:
    limits = limits_of(name)
    assert (limits.enis, limits.ipv4_per_eni, limits.max_pods) == (enis, addresses, max_pods)


def test_unknown_types_are_looked_up_and_xen_has_no_prefixes() -> None:
    assert known_limits("z99.mega") is None
    assert not limits_of("m4.4xlarge").prefix_delegation
    assert limits_of("m5.metal").prefix_delegation


def test_route_tables() -> None:
    assert [route_table(0, device) for device in (0, 1, 3)] == [254, 2, 4]
    assert [route_table(1, 1), route_table(3, 2)] == [10101, 10302]


def settle(type_name: str, settings: Settings, pods: int) -> tuple[int, int]:
    """ENIs and units once the pool has come to rest with `pods` pods on a new node."""
    limits = limits_of(type_name)
    unit = 16 if settings.prefix_delegation else 1
    enis = [0]  # the primary ENI without secondary addresses
    for _ in range(100):
        total = unit * sum(enis)
        stats = PoolStats(total=total, assigned=pods, prefixes=sum(enis))
        views = [EniView(str(i), limits.slots_per_eni - units) for i, units in enumerate(enis)]
        steps = grow(
            need(stats, settings, limits, max_pods=110 if unit == 16 else limits.max_pods),
            views,
            eni_room(limits, settings, len(enis), trunk_to_come=False),
            limits.slots_per_eni,
        )
        if not steps:
            return sum(1 for units in enis if units), sum(enis)
        for step in steps:
            if isinstance(step, Fill):
                enis[int(step.eni)] += step.units
            else:
                enis.append(step.units)
    raise AssertionError("the pool never comes to rest")


@pytest.mark.parametrize(
    ("type_name", "settings", "expected"),
    [
        (T3_SMALL, WARM_ENI, {0: (1, 3), 5: (3, 9), 9: (3, 9)}),
        (T3_SMALL, ip_targets(1, 1), {0: (1, 1), 5: (2, 6), 9: (3, 9)}),
        (T3_SMALL, ip_targets(2, 5), {0: (2, 5), 5: (3, 7), 9: (3, 9)}),
        (P3DN, WARM_ENI, {0: (1, 49), 3: (2, 98), 95: (3, 147)}),
        (P3DN, ip_targets(5, 10), {0: (1, 10), 7: (1, 12), 15: (1, 20), 45: (2, 50)}),
        (T3_SMALL, PREFIXES, {0: (1, 1), 5: (1, 2), 16: (1, 2), 17: (1, 3), 58: (2, 5)}),
        (T3_SMALL, ip_targets(1, 1, True), {0: (1, 1), 5: (1, 1), 17: (1, 2), 58: (2, 4)}),
        (T3_SMALL, ip_targets(7, 20, True), {0: (1, 2), 5: (1, 2), 17: (1, 2), 58: (2, 5)}),
    ],
)
def test_worked_examples(
    type_name: str, settings: Settings, expected: dict[int, tuple[int, int]]
) -> None:
    assert {pods: settle(type_name, settings, pods) for pods in expected} == expected


@pytest.mark.parametrize(
    ("total", "assigned", "target", "low"),
    [
        (0, 0, 1, True),  # an empty pool is low
        (0, 0, 0, True),
        (14, 14, 1, True),  # a fully used pool is low
        (58, 58, 1, False),  # unless the total has reached the node's most pods
        (14, 13, 0, False),  # target 0: low only when nothing is free
        (14, 14, 0, True),
        (28, 14, 1, False),  # one whole unit is free
        (28, 15, 1, True),  # a partly used unit is not a free unit
        (42, 14, 2, False),
        (42, 15, 2, True),
    ],
)
def test_low_with_whole_enis(total: int, assigned: int, target: int, low: bool) -> None:
    settings = Settings(warm_eni_target=target)
    stats = PoolStats(total=total, assigned=assigned)
    assert (need(stats, settings, limits_of("m5.xlarge"), 58).units > 0) is low


@pytest.mark.parametrize(
    ("total", "assigned", "target", "low"),
    [
        (0, 0, 1, True),
        (16, 16, 1, True),
        (16, 16, 0, True),
        (16, 15, 0, False),
        (32, 16, 1, False),
        (32, 17, 1, True),
        (112, 112, 1, False),  # 110 pods at most
    ],
)
def test_low_with_prefixes(total: int, assigned: int, target: int, low: bool) -> None:
    settings = Settings(prefix_delegation=True, warm_prefix_target=target)
    stats = PoolStats(total=total, assigned=assigned, prefixes=total // 16)
    assert (need(stats, settings, limits_of("m5.xlarge"), 110).units > 0) is low


@pytest.mark.parametrize(
    ("warm", "minimum", "total", "assigned", "short", "over"),
    [
        (5, None, 5, 0, 0, 0),
        (5, None, 5, 5, 5, 0),
        (5, None, 14, 3, 0, 6),
        (1, 10, 10, 0, 0, 0),  # nine above the warm target, all of them the minimum
        (1, 10, 12, 3, 0, 2),
        (1, 10, 10, 10, 1, 0),
        (None, 10, 4, 0, 6, 0),
        (None, 10, 20, 2, 0, 10),
        (2, 5, 0, 0, 5, 0),
    ],
)
def test_ip_targets(
    warm: int | None, minimum: int | None, total: int, assigned: int, short: int, over: int
) -> None:
    stats = PoolStats(total=total, assigned=assigned)
    assert short_and_over(stats, ip_targets(warm, minimum)) == (short, over)


@pytest.mark.parametrize(
    ("warm", "minimum", "prefixes", "assigned", "free", "short", "over"),
    [
        (1, 1, 1, 0, 1, 0, 0),
        (1, 1, 1, 16, 0, 1, 0),
        (1, 1, 4, 5, 3, 0, 3),
        (7, 20, 2, 5, 1, 0, 0),  # 12 addresses fit one prefix, the minimum needs two
        (7, 20, 5, 17, 3, 0, 3),
        (17, None, 1, 0, 1, 1, 0),  # one address short is one prefix short
    ],
)
def test_ip_targets_in_prefixes(
    warm: int, minimum: int | None, prefixes: int, assigned: int, free: int, short: int, over: int
) -> None:
    stats = PoolStats(total=16 * prefixes, assigned=assigned, prefixes=prefixes, free_prefixes=free)
    settings = ip_targets(warm, minimum, prefixes=True)
    assert prefixes_short_and_over(stats, settings) == (short, over)
    assert surplus(stats, settings) == over


def test_prefixes_above_the_warm_target_go() -> None:
    stats = PoolStats(total=64, assigned=3, prefixes=4, free_prefixes=3)
    assert surplus(stats, PREFIXES) == 2
    assert surplus(stats, WARM_ENI) == 0  # never one by one: whole ENIs or nothing


def test_cooling_addresses_are_not_available() -> None:
    stats = PoolStats(total=10, assigned=5, cooling=5)
    assert short_and_over(stats, ip_targets(5, None)) == (5, 0)


def test_waiting_pods_are_demand_also_without_a_warm_target() -> None:
    """MINIMUM_IP_TARGET alone stops the original from ever growing past it."""
    stats = PoolStats(total=10, assigned=10, waiting=3)
    for warm in (None, 0):
        assert need(stats, ip_targets(warm, 10), limits_of("m5.xlarge"), 58) == Need(3)


def test_a_burst_is_one_request() -> None:
    stats = PoolStats(total=5, assigned=5, waiting=25)
    assert need(stats, ip_targets(5, None), limits_of("m5.4xlarge"), 234) == Need(30)
    assert need(stats, WARM_ENI, limits_of("m5.xlarge"), 58) == Need(25, whole_enis=True)


def test_an_eni_that_is_only_kept_warm_comes_after_those_who_wait() -> None:
    limits = limits_of("m5.xlarge")
    assert need(PoolStats(waiting=14), WARM_ENI, limits, 58) == Need(14, whole_enis=True)
    served = PoolStats(total=14, assigned=14)
    assert need(served, WARM_ENI, limits, 58) == Need(14, whole_enis=True)


def test_the_pool_stops_at_the_nodes_most_pods_but_serves_who_waits() -> None:
    limits = limits_of("m5.xlarge")
    assert need(PoolStats(total=56, assigned=56), ip_targets(5, None), limits, 58) == Need(2)
    cooling = PoolStats(total=58, assigned=30, cooling=28, waiting=4)
    assert need(cooling, ip_targets(5, None), limits, 58) == Need(4)


def test_asking_again_while_requests_are_in_flight_asks_for_nothing() -> None:
    limits = limits_of("m5.xlarge")
    zero_warm = Settings(warm_eni_target=0)
    for settings in (zero_warm, PREFIXES, ip_targets(5, None), ip_targets(2, 9, True)):
        stats = PoolStats(assigned=0, waiting=17)
        units = need(stats, settings, limits, 58).units
        units += 25 if settings is zero_warm else 0  # whole ENIs
        size = 16 if settings.prefix_delegation else 1
        again = replace(stats, total=units * size, prefixes=units)
        assert need(again, settings, limits, 58).units == 0


def test_ipv6_wants_one_prefix_whatever_the_targets() -> None:
    settings = Settings(ipv6=True, prefix_delegation=True, warm_prefix_target=3)
    assert need(PoolStats(), settings, limits_of("m5.large"), 29) == Need(1)
    full = PoolStats(total=1 << 48, assigned=9, prefixes=1, free_prefixes=0)
    assert need(full, settings, limits_of("m5.large"), 29) == Need(0)
    assert surplus(full, settings) == 0


def test_growth_fills_attached_enis_before_new_ones() -> None:
    enis = [EniView("eni-a", free_slots=2), EniView("eni-b"), EniView("eni-c", free_slots=4)]
    assert grow(Need(5), enis, 2, 9) == [Fill("eni-a", 2), Fill("eni-c", 3)]
    assert grow(Need(16), enis, 2, 9) == [Fill("eni-a", 2), Fill("eni-c", 4), Create(9), Create(1)]
    assert grow(Need(16), enis, 1, 9) == [Fill("eni-a", 2), Fill("eni-c", 4), Create(9)]
    assert grow(Need(3, whole_enis=True), enis, 2, 9) == [Fill("eni-a", 2), Fill("eni-c", 4)]
    assert grow(Need(7, whole_enis=True), enis[1:2], 2, 9) == [Create(9)]
    assert grow(Need(0, whole_enis=True), enis, 2, 9) == []


def test_room_for_enis() -> None:
    limits = limits_of("m5.xlarge")
    assert eni_room(limits, Settings(), attached=1, trunk_to_come=False) == 3
    assert eni_room(limits, Settings(), attached=1, trunk_to_come=True) == 2
    assert eni_room(limits, Settings(max_eni=2), attached=1, trunk_to_come=False) == 1
    assert eni_room(limits, Settings(max_eni=99), attached=4, trunk_to_come=False) == 0


def test_only_old_idle_ordinary_enis_may_go() -> None:
    stats = PoolStats(total=56, assigned=2)
    idle = EniView("eni-idle", total=14, age_s=61)
    stays = [
        replace(idle, id="primary", primary=True),
        replace(idle, id="trunk", trunk=True),
        replace(idle, id="efa", efa=True),
        replace(idle, id="young", age_s=59),
        replace(idle, id="cooling", cooling=1),
        replace(idle, id="busy", assigned=1),
    ]
    limits = limits_of("m5.xlarge")
    assert enis_to_release([*stays, idle], stats, WARM_ENI, limits) == ["eni-idle"]


def test_enis_go_only_while_the_targets_hold_without_them() -> None:
    limits = limits_of("m5.xlarge")
    enis = [EniView(f"eni-{i}", total=14, age_s=100) for i in range(3)]
    primary = EniView("eni-p", total=14, assigned=2, age_s=100, primary=True)
    stats = PoolStats(total=56, assigned=2)

    def leaving(settings: Settings) -> int:
        return len(enis_to_release([primary, *enis], stats, settings, limits))

    assert leaving(WARM_ENI) == 2  # 26 spare are left: less than two ENIs' worth
    assert leaving(Settings(warm_eni_target=0)) == 3
    assert leaving(Settings(warm_eni_target=5)) == 0
    assert leaving(ip_targets(12, None)) == 3
    assert leaving(ip_targets(13, None)) == 2
    assert leaving(ip_targets(1, 29)) == 1


def test_device_indexes() -> None:
    assert free_device_index([0]) == 1
    assert free_device_index([0, 1, 3]) == 2
    assert free_device_index(range(100)) is None
