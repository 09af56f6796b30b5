from __future__ import annotations

from dataclasses import replace

from podwire.ipam.vpc.cloud import CloudEni
from podwire.ipam.vpc.datastore import DataStore, pod_addresses
from podwire.ipam.vpc.pool import PoolStats
from podwire.net import Prefix, parse_address, parse_prefix


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def eni(device: int, *cidrs: str) -> CloudEni:
    return CloudEni(
        id=f"eni-{device}",
        mac=f"06:00:00:00:00:{device:02x}",
        subnet_id="subnet-1",
        address=parse_address(f"10.0.{device}.4"),
        cidrs=frozenset(parse_prefix(cidr) for cidr in cidrs),
        device_index=device,
    )


def store_with(*enis: CloudEni, cooldown_s: float = 30.0) -> tuple[DataStore[str], Clock]:
    clock = Clock()
    store: DataStore[str] = DataStore(clock, cooldown_s)
    for one in enis:
        store.add_eni(one, usable=True)
    return store, clock


def addresses_of(store: DataStore[str], *owners: str) -> list[str]:
    found = [store.assign(owner) for owner in owners]
    return [".".join(map(str, one.address)) if one else "" for one in found]


def test_the_primary_eni_comes_first_and_its_own_address_is_nobodys() -> None:
    store, _ = store_with(eni(1, "10.0.1.5"), eni(0, "10.0.0.5", "10.0.0.6"))
    assert addresses_of(store, "a", "b", "c", "d") == ["10.0.0.5", "10.0.0.6", "10.0.1.5", ""]


def test_one_owner_one_address() -> None:
    store, _ = store_with(eni(0, "10.0.0.5", "10.0.0.6"))
    assert addresses_of(store, "a", "a", "b", "a") == [
        "10.0.0.5",
        "10.0.0.5",
        "10.0.0.6",
        "10.0.0.5",
    ]
    assert store.stats() == PoolStats(total=2, assigned=2)


def test_a_freed_address_rests_a_cancelled_one_does_not() -> None:
    store, clock = store_with(eni(0, "10.0.0.5"))
    store.assign("a")
    store.release("a")
    assert store.stats() == PoolStats(total=1, cooling=1)
    assert addresses_of(store, "b") == [""]
    assert store.wake() == 130.0
    clock.now = 130.0
    assert addresses_of(store, "b") == ["10.0.0.5"]
    store.cancel("b")
    assert addresses_of(store, "c") == ["10.0.0.5"]
    assert store.release("nobody") is None


def test_prefixes_in_use_come_before_idle_ones() -> None:
    store, _ = store_with(eni(0, "10.0.0.16/28", "10.0.0.32/28"))
    first = addresses_of(store, "a")
    store.cancel("a")
    assert first == ["10.0.0.16"]  # a delegated prefix has no network address
    store.restore([("old", parse_address("10.0.0.40"))], [])
    assert addresses_of(store, "b") == ["10.0.0.32"]
    assert store.stats() == PoolStats(total=32, assigned=2, prefixes=2, free_prefixes=1)
    assert store.idle_cidrs("eni-0") == [parse_prefix("10.0.0.16/28")]


def test_addresses_of_a_prefix() -> None:
    assert len(list(pod_addresses(parse_prefix("10.0.0.16/28")))) == 16
    assert list(pod_addresses(parse_prefix("10.0.0.5"))) == [parse_address("10.0.0.5")]
    first = next(pod_addresses(parse_prefix("fd00::1:0:0:0/80")))
    assert first == parse_address("fd00::1:0:0:1")


def test_an_address_finds_its_eni() -> None:
    store, _ = store_with(eni(0, "10.0.0.5"), eni(1, "10.0.1.16/28", "fd00::/80"))
    for text, device in (("10.0.0.5", 0), ("10.0.1.31", 1), ("fd00::77", 1)):
        home = store.eni_of(parse_address(text))
        assert home is not None
        assert home.record.device_index == device
    assert store.eni_of(parse_address("10.0.0.6")) is None


def test_restored_addresses_go_to_nobody_else_before_the_enis_are_known() -> None:
    store, _ = store_with()
    store.restore([("a", parse_address("10.0.0.5"))], [(parse_address("10.0.0.6"), 120.0)])
    assert store.stats() == PoolStats()
    store.add_eni(eni(0, "10.0.0.5", "10.0.0.6", "10.0.0.7"), usable=True)
    assert addresses_of(store, "b", "a") == ["10.0.0.7", "10.0.0.5"]
    assert store.stats() == PoolStats(total=3, assigned=2, cooling=1)


def test_what_ec2_does_not_show_is_not_given_out_and_leaves_on_the_second_look() -> None:
    both = eni(0, "10.0.0.5", "10.0.0.6")
    store, _ = store_with(both)
    store.assign("a")
    less = replace(both, cidrs=frozenset([parse_prefix("10.0.0.6")]))
    changes = store.observe([less], store.turn)
    assert changes.doubtful
    assert not changes.lost_cidrs
    assert store.stats() == PoolStats(total=1)
    changes = store.observe([less], store.turn)
    assert not changes.doubtful
    assert changes.lost_cidrs == 1
    assert store.owners[parse_address("10.0.0.5")].owner == "a"  # the pod keeps what it has
    store.observe([both], store.turn)
    assert store.stats() == PoolStats(total=2, assigned=1)


def test_what_comes_back_in_between_was_never_gone() -> None:
    both = eni(0, "10.0.0.5", "10.0.0.6")
    store, _ = store_with(both)
    less = replace(both, cidrs=frozenset([parse_prefix("10.0.0.6")]))
    for answer in (less, both, less):
        changes = store.observe([answer], store.turn)
        assert not changes.lost_cidrs
    assert changes.doubtful


def test_an_eni_that_is_missing_once_gives_no_addresses_and_takes_none() -> None:
    store, _ = store_with(eni(0), eni(1, "10.0.1.5"))
    assert store.observe([eni(0)], store.turn).doubtful
    assert addresses_of(store, "a") == [""]
    assert store.view(store.enis["eni-1"], slots=9).free_slots == 0
    changes = store.observe([eni(0)], store.turn)
    assert [record.id for record in changes.lost] == ["eni-1"]
    assert set(store.enis) == {"eni-0"}


def test_an_answer_from_before_our_own_change_says_nothing() -> None:
    store, _ = store_with(eni(0, "10.0.0.5", "10.0.0.6"))
    asked_at = store.turn
    store.remove_cidrs("eni-0", [parse_prefix("10.0.0.6")])  # unassigned meanwhile
    store.observe([eni(0, "10.0.0.5", "10.0.0.6")], asked_at)
    assert store.stats().total == 1
    asked_at = store.turn
    store.add_cidrs("eni-0", [parse_prefix("10.0.0.7")])  # assigned meanwhile
    for _ in range(2):
        assert not store.observe([eni(0, "10.0.0.5")], asked_at).doubtful
    assert store.stats().total == 2
    store.observe([eni(0, "10.0.0.5")], store.turn)
    assert store.stats().total == 1


def test_new_enis_are_reported_and_not_added() -> None:
    store, _ = store_with(eni(0))
    changes = store.observe([eni(0), eni(1, "10.0.1.5")], store.turn)
    assert [record.id for record in changes.new] == ["eni-1"]
    assert set(store.enis) == {"eni-0"}


def test_ipv6_prefixes_are_counted_as_prefixes_only() -> None:
    store, _ = store_with(eni(0, "fd00::/80"))
    assert store.assign("a")
    stats = store.stats()
    assert (stats.total, stats.assigned, stats.prefixes, stats.free_prefixes) == (0, 1, 1, 0)
    prefix: Prefix = parse_prefix("fd00::/80")
    assert store.idle_cidrs("eni-0") == []
    assert prefix in store.enis["eni-0"].cidrs
