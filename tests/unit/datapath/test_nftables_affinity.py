from podwire.datapath.nftables.services_affinity import MOST_LISTS, AffinityIds
from podwire.datapath.nftables.services_rules import ID_MASK
from podwire.net import Protocol
from podwire.services import ServicePortName

BACKENDS = [bytes([10, 0, 0, n, 0, 80]) for n in range(3)]


def name(number: int) -> tuple[ServicePortName, str]:
    return ServicePortName("x", f"s{number}", "", Protocol.TCP, 4), "cluster"


def test_lists_beyond_the_numbers_are_known_and_served_when_one_is_free() -> None:
    ids = AffinityIds()
    for number in range(1, MOST_LISTS):
        assert ids.list_of(name(number), BACKENDS) is not None
    assert ids.without == set()
    late = name(MOST_LISTS)
    assert ids.list_of(late, BACKENDS) is None
    assert ids.list_of(late, BACKENDS) is None
    assert ids.without == {late}
    ids.forget([name(5)])
    assert ids.list_of(late, BACKENDS) is not None
    assert ids.without == set()


def test_a_list_too_long_takes_no_number_from_others() -> None:
    ids = AffinityIds()
    assert ids.list_of(name(1), BACKENDS * (ID_MASK // 3 + 1)) is None
    found = ids.list_of(name(2), BACKENDS)
    assert found is not None
    assert ids.without == {name(1)}
    ids.forget([name(1)])
    assert ids.without == set()
