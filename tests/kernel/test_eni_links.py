"""ENIs on the node: tables, rules, and their way back after somebody wiped them."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass, replace

import pytest

from podwire.errors import KernelError
from podwire.kernel import address, link, netns, route, rule
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.link import End
from podwire.kernel.monitor import Monitor
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import Address, Prefix, parse_address, parse_mac, parse_prefix
from podwire.wiring.eni import EniLinks
from podwire.wiring.interference import GROUPS
from tests.conftest import present

A, P = parse_address, parse_prefix


@dataclass(frozen=True)
class Eni:
    mac: str
    address: Address
    subnet: Prefix
    gateway: Address
    table: int
    mtu: int = 9001
    primary: bool = False


PRIMARY = Eni("02:00:00:00:00:01", A("10.0.0.10"), P("10.0.0.0/20"), A("10.0.0.1"), 254, 1500, True)
SECONDARY = Eni("02:00:00:00:00:02", A("10.0.0.20"), P("10.0.0.0/20"), A("10.0.0.1"), 2)


def rules(netns_fd: int) -> list[str]:
    done = netns.run(netns_fd, ["ip", "rule"])
    return [line.split(" proto")[0] for line in done.stdout.splitlines()]


@pytest.fixture
def enis(sock: NetlinkSocket, netns_fd: int) -> EniLinks:
    for each, name in ((PRIMARY, "eth0"), (SECONDARY, "eth1")):
        mac = parse_mac(each.mac)
        sock.run(
            link.add_veth(End(name, mac=mac), End(f"{name}-vpc", mtu=9001)),
            link.change(f"{name}-vpc", up=True),
        )
    # left over from an earlier use of the ENI
    old = InterfaceAddress(present(sock, "eth1").index, A("10.0.0.99"), 20)
    sock.run(address.add(old))
    made = EniLinks(netns_fd)
    asyncio.run(made.set_up(PRIMARY, 1))
    asyncio.run(made.set_up(SECONDARY, 1))
    return made


def test_tables_and_rules(enis: EniLinks, sock: NetlinkSocket, netns_fd: int) -> None:
    assert rules(netns_fd) == [
        "0:\tfrom all lookup local",
        "1024:\tfrom all fwmark 0x80/0x80 lookup main",
        "32765:\tfrom 10.0.0.20 lookup 2",
        "32766:\tfrom all lookup main",
        "32767:\tfrom all lookup default",
    ]
    eth1 = present(sock, "eth1")
    assert (eth1.mtu, eth1.up) == (9001, True)
    ipv4 = [a for a in address.dump(sock, link=eth1.index) if len(a.address) == 4]
    assert [(a.address, a.length) for a in ipv4] == [(A("10.0.0.20"), 20)]
    assert netns.run(netns_fd, ["ip", "route", "show", "table", "2"]).stdout.split("\n")[:2] == [
        "default via 10.0.0.1 dev eth1 proto 112 ",
        "10.0.0.1 dev eth1 proto 112 scope link ",
    ]
    assert netns.run(netns_fd, ["ip", "route", "show", "dev", "eth1"]).stdout == ""
    assert enis.restore() == []
    enis.close()


def test_what_somebody_wiped_comes_back(enis: EniLinks, sock: NetlinkSocket, netns_fd: int) -> None:
    before = rule.dump(sock), route.dump(sock, table=2)
    eth1 = present(sock, "eth1").index
    monitor = Monitor(GROUPS, netns_fd)
    for each in rule.dump(sock):
        if each.protocol == 112:
            sock.run(rule.delete(each))
            assert any(map(enis.concerns, monitor.drain()))
    sock.run(link.change(eth1, up=False, mtu=1500))
    assert any(map(enis.concerns, monitor.drain()))
    monitor.close()
    assert route.dump(sock, table=2) == []
    assert len(enis.restore()) == 5  # the link, two rules, two routes
    assert (rule.dump(sock), route.dump(sock, table=2)) == before
    assert enis.restore() == []
    enis.close()


def test_tear_down(enis: EniLinks, sock: NetlinkSocket, netns_fd: int) -> None:
    asyncio.run(enis.tear_down(SECONDARY))
    asyncio.run(enis.tear_down(SECONDARY))
    assert "32765:\tfrom 10.0.0.20 lookup 2" not in rules(netns_fd)
    assert route.dump(sock, table=2) == []
    sock.run(link.delete("eth1"))
    asyncio.run(enis.tear_down(SECONDARY))
    assert enis.restore() == []
    enis.close()


def test_a_link_that_comes_late_or_never(enis: EniLinks, sock: NetlinkSocket) -> None:
    late = replace(SECONDARY, mac="02:00:00:00:00:03", address=A("10.0.0.30"), table=3)

    async def appear() -> None:
        waiting = asyncio.create_task(enis.set_up(late, 5))
        await asyncio.sleep(0)
        sock.run(link.add_veth(End("eth2", mac=bytes.fromhex("020000000003")), End("x", mtu=9001)))
        sock.run(link.change("x", up=True))
        await waiting

    asyncio.run(appear())
    assert len(route.dump(sock, table=3)) == 2
    never = replace(late, mac="02:00:00:00:00:04")
    with pytest.raises(KernelError, match="did not appear within 0 s") as caught:
        asyncio.run(enis.set_up(never, 0))
    assert caught.value.errno == errno.ENODEV
    enis.close()


def test_diverted_cidrs_and_another_mark(enis: EniLinks, netns_fd: int) -> None:
    other = EniLinks(netns_fd, mark=0x40, diverted=[P("203.0.113.0/24")])
    asyncio.run(other.set_up(PRIMARY, 1))
    held = rules(netns_fd)
    assert any(r.startswith("1024:") and "fwmark 0x40/0x40" in r for r in held)
    assert any(r.startswith("1535:") and "to 203.0.113.0/24" in r for r in held)
    asyncio.run(other.tear_down(PRIMARY))
    assert not any(r.startswith("1535:") for r in rules(netns_fd))
    other.close()
