"""Geneve devices: how they are asked for, and pods that meet through them where there are any."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from podwire.kernel import geneve
from podwire.kernel.geneve import Geneve
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket
from podwire.nodes import OVERLAY_DEVICES
from tests.conftest import present
from tests.kernel.test_node_routes import Cluster, exchange

MAC = bytes.fromhex("0a5800000001")


def test_the_probe_says_what_the_kernel_says(sock: NetlinkSocket) -> None:
    _, failures = sock.attempt([geneve.add_geneve(End("gnv0"), Geneve(6081))])
    assert geneve.is_supported() == (not failures)


@pytest.fixture
def supported() -> None:
    if not geneve.is_supported():
        pytest.skip("this kernel has no Geneve devices (CONFIG_GENEVE)")


@pytest.mark.usefixtures("supported")
def test_geneve_reads_back(sock: NetlinkSocket) -> None:
    sock.run(geneve.add_geneve(End("gnv0", mac=MAC, mtu=1400), Geneve(6081)))
    found = present(sock, "gnv0")
    assert (found.kind, found.mac, found.mtu) == ("geneve", MAC, 1400)
    assert geneve.read(found) == Geneve(6081)


@pytest.mark.usefixtures("supported")
def test_pods_reach_each_other_through_geneve(make_netns: Callable[[], int]) -> None:
    cluster = Cluster("vxlan", make_netns, protocol="geneve")
    cluster.put(1, 2)
    cluster.apply()
    one, two, _ = cluster.members
    for family in (4, 6):
        assert exchange(one, two, family) == one.pod(family)
    assert one.routes.verify() == []
    assert present(one.sock, OVERLAY_DEVICES["geneve"]).mtu == 1550
    cluster.close()
