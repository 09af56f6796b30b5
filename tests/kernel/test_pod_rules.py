"""Host ports and masquerading: what a restart finds it keeps, what nobody wants goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from podwire.errors import KernelError
from podwire.kernel.nftables import INET, NfTables, Set
from podwire.net import parse_address
from podwire.wiring import HostPort, HostPorts, PodAddress, hostports, masquerade
from podwire.wiring.hostports import HostPortRules
from podwire.wiring.masquerade import MasqueradeRules


def pod(text: str) -> PodAddress:
    return PodAddress(parse_address(text), 64 if ":" in text else 24)


def mapping(port: int, *targets: str, host_ip: str = "") -> HostPorts:
    address = parse_address(host_ip) if host_ip else b""
    return HostPorts(
        ports=(HostPort(port, 80, 6, address),), targets=tuple(pod(each) for each in targets)
    )


@pytest.fixture
def namespace(make_netns: Callable[[], int]) -> Iterator[tuple[int, NfTables]]:
    fd = make_netns()
    with NfTables(fd) as nft:
        yield fd, nft


def contents(nft: NfTables, table: str) -> dict[str, set[Any]]:
    names = [name for name in nft.sets(INET, table) if not name.startswith("__")]
    return {name: set(nft.elements(Set(INET, table, name))) for name in names}


def test_host_ports_are_adopted_and_strays_removed(namespace: tuple[int, NfTables]) -> None:
    fd, nft = namespace
    one, two, three = (
        mapping(8080, "10.0.0.2", "fd00::2"),
        mapping(8081, "10.0.0.3"),
        mapping(8080, "10.0.0.4", host_ip="192.0.2.9"),
    )
    first = HostPortRules(fd)
    for each in (one, two, three):
        first.add(each)
        assert first.check(each) == []
    before = contents(nft, hostports.TABLE)
    first.close()
    again = HostPortRules(fd)
    again.reconcile([one, two, three])
    assert contents(nft, hostports.TABLE) == before
    again.reconcile([one])
    assert again.check(one) == []
    assert again.check(two)
    again.remove(one)
    again.remove(one)
    again.remove(three)
    assert all(not elements for elements in contents(nft, hostports.TABLE).values())
    again.reconcile([])
    assert nft.tables(INET) == []
    again.remove(one)
    assert again.check(one)
    again.close()


def test_a_port_belongs_to_one_pod(namespace: tuple[int, NfTables]) -> None:
    fd, nft = namespace
    rules = HostPortRules(fd)
    rules.add(mapping(8080, "10.0.0.2"))
    before = contents(nft, hostports.TABLE)
    with pytest.raises(KernelError):
        rules.add(mapping(8080, "10.0.0.3"))
    assert contents(nft, hostports.TABLE) == before
    rules.close()


def test_masquerading_is_adopted_and_strays_removed(namespace: tuple[int, NfTables]) -> None:
    fd, nft = namespace
    first = MasqueradeRules(fd)
    first.add([pod("10.0.0.2"), pod("fd00::2")])
    first.add([pod("10.0.0.3")])
    before = contents(nft, masquerade.TABLE)
    first.close()
    again = MasqueradeRules(fd)
    again.reconcile([pod("10.0.0.2"), pod("fd00::2"), pod("10.0.0.3")])
    assert contents(nft, masquerade.TABLE) == before
    again.reconcile([pod("10.0.0.3")])
    assert again.check([pod("10.0.0.3")]) == []
    assert again.check([pod("10.0.0.2")])
    again.remove([pod("10.0.0.2")])
    again.remove([pod("10.0.0.3")])
    assert all(not elements for elements in contents(nft, masquerade.TABLE).values())
    again.reconcile([])
    assert nft.tables(INET) == []
    again.close()


def test_another_versions_sets_are_replaced(namespace: tuple[int, NfTables]) -> None:
    fd, nft = namespace
    nft.run(f"table inet {hostports.TABLE} {{ map any4 {{ type inet_service : ipv4_addr; }}\n}}")
    rules = HostPortRules(fd)
    rules.add(mapping(8080, "10.0.0.2"))
    assert rules.check(mapping(8080, "10.0.0.2")) == []
    rules.close()
