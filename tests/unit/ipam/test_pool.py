import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.errors import ConfigError
from podwire.ipam.pool import Cursor, Demand, Exhausted, NotAvailable, Pool, Resting, _Space
from podwire.ipam.ranges import check_sets, make_range
from podwire.net import format_address, parse_address
from podwire.wiring import Key


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def key(container):
    return Key("net", container, "eth0")


def demand(*sets, requested=()):
    ranges = tuple(
        tuple(make_range(subnet) for subnet in ([each] if isinstance(each, str) else each))
        for each in sets
    )
    return Demand("net", check_sets(ranges), tuple(map(parse_address, requested)))


def texts(addresses):
    return [format_address(each.address) for each in addresses]


def test_one_address_of_each_set_with_its_gateway_and_length():
    pool = Pool(Clock())
    got = pool.allocate(key("a"), demand(["10.1.2.0/24", "10.2.2.0/24"], "2001:db8:1::/64"))
    assert texts(got) == ["10.1.2.2", "2001:db8:1::2"]
    assert [each.length for each in got] == [24, 64]
    assert [format_address(each.gateway) for each in got] == ["10.1.2.1", "2001:db8:1::1"]


def test_the_same_owner_gets_the_same_address():
    pool = Pool(Clock())
    first = pool.allocate(key("a"), demand("10.0.0.0/29"))
    assert pool.allocate(key("a"), demand("10.0.0.0/29")) == first


def test_round_robin_goes_through_the_ranges_and_back():
    clock = Clock()
    pool = Pool(clock)
    sets = demand(["10.0.0.0/30", "10.0.1.0/30"])
    assert texts(pool.allocate(key("a"), sets)) == ["10.0.0.2"]
    assert texts(pool.allocate(key("b"), sets)) == ["10.0.1.2"]
    pool.release(key("a"))
    with pytest.raises(Exhausted, match=r"10.0.0.1-10.0.0.2, 10.0.1.1-10.0.1.2 \(1 rest"):
        pool.allocate(key("c"), sets)
    clock.now = 31
    assert texts(pool.allocate(key("c"), sets)) == ["10.0.0.2"]


def test_a_freed_address_rests_even_when_it_is_the_next():
    clock = Clock()
    pool = Pool(clock)
    assert texts(pool.allocate(key("a"), demand("192.168.1.0/29"))) == ["192.168.1.2"]
    pool.release(key("a"))
    assert texts(pool.allocate(key("b"), demand("192.168.1.0/29"))) == ["192.168.1.3"]
    assert pool.counts() == {"net": {"used": 1, "resting": 1}}


def test_only_the_last_one_is_free():
    pool = Pool(Clock())
    pool.restore([], [], [Cursor("net", 0, 32, int.from_bytes(parse_address("10.0.0.2"), "big"))])
    assert texts(pool.allocate(key("a"), demand("10.0.0.0/30"))) == ["10.0.0.2"]


def test_a_cursor_outside_the_ranges_counts_as_none():
    pool = Pool(Clock())
    pool.restore([], [], [Cursor("net", 0, 32, 7)])
    assert texts(pool.allocate(key("a"), demand("10.0.0.0/29"))) == ["10.0.0.2"]


def test_a_cancelled_allocation_is_free_at_once():
    pool = Pool(Clock())
    pool.allocate(key("a"), demand("10.0.0.0/30"))
    pool.cancel(key("a"))
    assert texts(pool.allocate(key("b"), demand("10.0.0.0/30"))) == ["10.0.0.2"]


def test_requested_addresses():
    pool = Pool(Clock())
    sets = (["172.16.1.0/24", "10.1.2.0/24"], "2001:db8:1::/48")
    got = pool.allocate(key("a"), demand(*sets, requested=["10.1.2.88", "2001:db8:1::999"]))
    assert texts(got) == ["10.1.2.88", "2001:db8:1::999"]
    for bad in (["10.1.2.88"], ["10.1.2.1"], ["192.0.2.1"], ["10.1.2.7", "10.1.2.8"]):
        with pytest.raises(NotAvailable):
            pool.allocate(key("b"), demand(*sets, requested=bad))
    assert pool.counts()["net"]["used"] == 2
    pool.release(key("a"))  # and by name it may come back without a rest
    assert texts(pool.allocate(key("b"), demand(*sets, requested=["10.1.2.88"])))[0] == "10.1.2.88"
    assert pool.counts()["net"] == {"used": 2, "resting": 1}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([["10.0.0.0/31"]], "Network 10.0.0.0/31 too small to allocate from"),
        ([["10.0.0.1/24"]], "host bits set"),
        ([["10.1.2.0/24", "10.1.0.0/16"]], "overlap"),
        ([["10.1.2.0/24"], ["10.1.2.128/25"]], "overlap"),
        ([["10.1.2.0/24", "2001:db8::/64"]], "mixed address families"),
        ([[]], "empty"),
        ([["10.1.2.0"]], "prefix length"),
        ([[""]], "no subnet"),
    ],
)
def test_bad_ranges_are_named(sets, message):
    with pytest.raises(ConfigError, match=message):
        check_sets([tuple(make_range(subnet) for subnet in ranges) for ranges in sets])


def test_range_limits():
    one = make_range("10.0.0.0/24", "10.0.0.10", "10.0.0.20", "10.0.0.254")
    assert str(one) == "10.0.0.10-10.0.0.20"
    assert str(make_range("fd00::/120")) == "fd00::1-fd00::ff"
    for start, end in (("10.0.1.1", ""), ("", "10.0.1.1"), ("10.0.0.9", "10.0.0.3"), ("x", "")):
        with pytest.raises(ConfigError):
            make_range("10.0.0.0/24", start, end)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=80))
def test_intervals_are_a_set(changes):
    space, model = _Space(), set()
    for add, number in changes:
        (space.add if add else space.remove)(number)
        (model.add if add else model.discard)(number)
        assert all((n in space) == (n in model) for n in range(41))
        assert all(
            space.next_free(n) == next(f for f in range(n, 99) if f not in model) for n in range(41)
        )


@given(st.data())
@settings(max_examples=60)
def test_no_address_is_given_twice_and_none_before_its_rest(data):
    clock, pool = Clock(), Pool(Clock(), rest_s=10)
    pool._clock = clock
    owned, freed = {}, {}
    for number in range(data.draw(st.integers(1, 40))):
        clock.now += data.draw(st.integers(0, 5))
        if owned and data.draw(st.booleans()):
            owner = data.draw(st.sampled_from(sorted(owned)))
            pool.release(key(owner))
            freed[owned.pop(owner)] = clock.now
        else:
            try:
                (got,) = pool.allocate(key(str(number)), demand("10.0.0.0/28"))
            except Exhausted:
                taken = len(owned) + sum(clock.now - t < 10 for t in freed.values())
                assert taken >= 13
                continue
            assert got.address not in owned.values()
            assert clock.now - freed.get(got.address, -10) >= 10
            freed.pop(got.address, None)
            owned[str(number)] = got.address


def test_restore_knows_taken_and_resting():
    clock = Clock()
    pool = Pool(clock)
    taken = pool.allocate(key("a"), demand("10.0.0.0/29"))
    other = Pool(clock)
    other.restore([(key("a"), "net", taken)], [Resting("net", parse_address("10.0.0.3"), 5)], [])
    assert texts(other.allocate(key("b"), demand("10.0.0.0/29"))) == ["10.0.0.4"]
    assert other.allocate(key("a"), demand("10.0.0.0/29")) == taken
