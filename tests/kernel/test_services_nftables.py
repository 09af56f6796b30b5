"""Services on nftables: what the tables hold after changes, restarts and somebody's meddling."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from podwire.datapath.nftables.services import ServicesPart
from podwire.datapath.nftables.services_elements import element_sets, from_element, target
from podwire.kernel import netns
from podwire.kernel.nftables import Element, NfTables, Transaction
from podwire.kube import objects as kube
from podwire.net import parse_address
from tests.service_objects import CONFIG, Cluster, endpoint_slice, histories, service

_HISTORY = ("affinity-lists", "affinity-slots", "affinity-backends")
"""Maps whose numbers depend on the order of events."""


class Proxy(Cluster):
    """The data path of one namespace."""

    def __init__(self, fd: int) -> None:
        super().__init__(ServicesPart(CONFIG, fd), CONFIG)
        self.fd = fd
        self.nft = NfTables(fd)
        self.part.start()

    def state(self) -> dict[tuple[int, str], object]:
        """The elements of both tables; of affinity numbers only how many there are."""
        out: dict[tuple[int, str], object] = {}
        for family in (4, 6):
            for name in element_sets():
                elements = self.nft.elements(target(family, name))
                numbered = name.endswith(_HISTORY)
                out[family, name] = len(elements) if numbered else dict(map(from_element, elements))
        return out

    def close(self) -> None:
        self.part.close()
        self.nft.close()


@pytest.fixture
def make_proxy(make_netns: Callable[[], int]) -> Iterator[Callable[..., Proxy]]:
    made: list[Proxy] = []

    def make(fd: int | None = None) -> Proxy:
        made.append(Proxy(make_netns() if fd is None else fd))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture
def proxy(make_proxy: Callable[[], Proxy]) -> Proxy:
    return make_proxy()


def meddle(proxy: Proxy, script: str) -> None:
    """Somebody else runs nft."""
    netns.run(proxy.fd, ["nft", "-f", "-"], stdin=script).check_returncode()


def sticky(**more: object) -> kube.Service:
    return service(session_affinity="ClientIP", **more)


def test_applying_the_same_table_again_makes_no_kernel_call(proxy: Proxy) -> None:
    table = proxy.put(service(), endpoint_slice())
    proxy.part.flush()
    before = proxy.nft.generation()
    proxy.part.apply(table)
    proxy.part.flush()
    assert proxy.part.verify() == []
    assert proxy.nft.generation() == before


def test_the_rules_do_not_grow_with_services(proxy: Proxy) -> None:
    before = (proxy.nft.rules(2, "podwire-services"), proxy.nft.sets(2, "podwire-services"))
    for number in range(1, 200):
        proxy.store.put(service(f"s{number}", ip=f"10.96.0.{number}"))
        proxy.store.put(endpoint_slice(f"s{number}", [f"10.20.1.{number}", f"10.20.2.{number}"]))
    proxy.put()
    assert (proxy.nft.rules(2, "podwire-services"), proxy.nft.sets(2, "podwire-services")) == before


def test_a_new_number_of_backends_makes_one_chain_and_it_goes_when_unused(proxy: Proxy) -> None:
    slice_ = endpoint_slice(addresses=[f"10.20.1.{i}" for i in range(1, 41)])
    proxy.put(service(), slice_)
    assert "lb-40" in proxy.nft.chains(2, "podwire-services")
    for count in range(41, 120):
        proxy.put(endpoint_slice(addresses=[f"10.20.1.{i}" for i in range(1, count)]))
    proxy.part.flush()
    meddle(proxy, "add table ip elsewhere")  # so that verify has a reason to look
    proxy.part.verify()
    chains = proxy.nft.chains(2, "podwire-services")
    assert "lb-118" in chains
    assert "lb-40" not in chains


def test_a_restart_changes_nothing_in_the_kernel_and_keeps_affinity(
    make_proxy: Callable[..., Proxy], make_netns: Callable[[], int]
) -> None:
    fd = make_netns()
    objects = [
        sticky(),
        endpoint_slice(addresses=["10.20.1.11", "10.20.1.12", "10.20.2.21"]),
        service("other", ip="10.96.0.2", external_ips=["203.0.113.1"]),
        endpoint_slice("other"),
    ]
    first = make_proxy(fd)
    first.put(*objects)
    first.put(endpoint_slice(addresses=["10.20.1.12", "10.20.2.21", "10.20.1.13"]))
    first.part.flush()
    by_id = set(first.nft.elements(target(4, "affinity-backends")))
    client = Element(parse_address("10.20.1.5") + next(iter(by_id)).key, next(iter(by_id)).key)
    learnt = Transaction()
    learnt.add(target(4, "affinity"), [client])
    first.nft.commit(learnt)
    objects[1] = endpoint_slice(addresses=["10.20.1.12", "10.20.2.21", "10.20.1.13"])

    second = make_proxy(fd)  # starting remakes the rules in one transaction per family
    before = second.nft.generation()
    second.put(*objects)
    second.part.flush()
    assert second.nft.generation() == before
    assert set(second.nft.elements(target(4, "affinity-backends"))) == by_id
    assert len(second.nft.elements(target(4, "affinity"))) == 1


def test_meddling_is_found_named_and_repaired(proxy: Proxy) -> None:
    proxy.put(service(), endpoint_slice(), service("b", ip="10.96.0.2"), endpoint_slice("b"))
    good = proxy.state()
    meddle(
        proxy,
        "delete element ip podwire-services frontends { 10.96.0.1 . tcp . 80 }\n"
        "add element ip podwire-services cluster-ips { 10.96.0.77 }\n"
        "delete element ip podwire-services service-cidrs { 10.96.0.0/16 }\n"
        "flush chain ip podwire-services refuse\n",
    )
    repairs = proxy.part.verify()
    assert proxy.state() == good
    assert repairs == [
        "made the rules of ip podwire-services again",
        "removed 1 foreign elements of ip podwire-services cluster-ips",
        "restored 1 elements of ip podwire-services frontends",
        "restored ip podwire-services set service-cidrs",
    ]
    assert proxy.part.verify() == []


def test_an_integrity_check_lists_nothing_while_only_we_commit(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.put(service(), endpoint_slice())
    proxy.put(endpoint_slice(addresses=[f"10.20.1.{i}" for i in range(1, 30)]))
    proxy.part.flush()
    proxy.nft.run("add table ip other")  # another part of the same agent
    monkeypatch.setattr(NfTables, "elements", None)  # a listing would fail
    assert proxy.part.verify() == []


def test_a_change_that_does_not_fit_reads_the_kernel_back(proxy: Proxy) -> None:
    proxy.put(service(), endpoint_slice())
    meddle(proxy, "flush map ip podwire-services frontends\n")
    proxy.put(endpoint_slice(addresses=["10.20.1.11", "10.20.1.12"]))
    assert len(proxy.nft.elements(target(4, "frontends"))) == 1


def test_a_whole_table_that_somebody_deleted_comes_back(proxy: Proxy) -> None:
    proxy.put(service(), endpoint_slice())
    good = proxy.state()
    meddle(proxy, "delete table ip podwire-services")
    proxy.put(endpoint_slice(addresses=["10.20.1.12"]))
    proxy.put(endpoint_slice())
    proxy.part.flush()
    assert proxy.state() == good


def test_cleanup_removes_ours_and_only_ours(proxy: Proxy) -> None:
    proxy.nft.run("add table ip theirs")
    proxy.put(service(), endpoint_slice())
    proxy.part.cleanup()
    assert proxy.nft.tables(2) == ["theirs"]
    assert proxy.nft.tables(10) == []
    proxy.part.cleanup()  # again is no error


def test_refused_packets_are_counted_in_the_status(proxy: Proxy) -> None:
    status = proxy.part.status()["ip podwire-services"]
    assert isinstance(status, dict)
    assert (status["packets_rejected"], status["packets_dropped"]) == (0, 0)


def test_nft_lists_the_table_with_all_kinds_of_elements(proxy: Proxy) -> None:
    """nft 1.0.6 crashes on some maps that it has made itself."""
    proxy.put(sticky(external_traffic_policy="Local", external_ips=["203.0.113.1"]))
    proxy.put(endpoint_slice())
    listed = netns.run(proxy.fd, ["nft", "list", "ruleset"])
    assert listed.returncode == 0
    assert "10.96.0.1 . tcp . 80" in listed.stdout


@given(histories(25))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_incremental_and_cold_start_leave_the_same_elements(
    make_proxy: Callable[[], Proxy], history
) -> None:
    warm, cold = make_proxy(), make_proxy()
    cold.put(*warm.play(history))
    assert warm.state() == cold.state()
    meddle(warm, "add table ip elsewhere")
    assert warm.part.verify() == []
