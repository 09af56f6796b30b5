"""A routed pod with a false source, both families: dropped, also behind rules of an ENI."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from podwire.datapath.nftables.spoof_routed import TABLE, RoutedSpoofGuard
from podwire.kernel import address, link, netns, sysctl
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import parse_address as A
from podwire.wiring import Attachment, Key, Pod, PodAddress
from podwire.wiring.routed import RoutedWiring
from tests.conftest import present
from tests.traffic import udp_source


@pytest.mark.parametrize("table", [0, 2])
@pytest.mark.parametrize(
    ("own", "false", "node"),
    [("10.0.1.5", "10.0.1.6", "192.168.0.1"), ("fd00::5", "fd00::6", "fd01::1")],
)
def test_a_false_source(
    sock: NetlinkSocket,
    netns_fd: int,
    make_netns: Callable[[], int],
    own: str,
    false: str,
    node: str,
    table: int,
) -> None:
    sock.run(link.add_bridge(End("eth0"), up=True))
    bits = len(A(own)) * 8
    sock.run(address.add(InterfaceAddress(present(sock, "eth0").index, A(node), bits)))
    wiring, guard, pod_fd = RoutedWiring(netns_fd), RoutedSpoofGuard(netns_fd), make_netns()
    guard.start()
    made = wiring.attach(
        Attachment(
            key=Key("n", "c", "eth0"),
            pod=Pod("default", "liar"),
            addresses=(PodAddress(A(own), bits),),
            wiring="routed",
            route_table=table,
        ),
        pod_fd,
    )
    with NetlinkSocket(netns_fd=pod_fd) as pod:
        index = present(pod, "eth0").index
        pod.run(address.add(InterfaceAddress(index, A(false), bits)))
    # IPv4 has rp_filter as well; here the table alone must do
    sysctl.write({f"net.ipv4.conf.{made.host_ifname}.rp_filter": 0}, netns_fd)
    assert udp_source(pod_fd, netns_fd, node, source=own) == own
    assert udp_source(pod_fd, netns_fd, node, source=false, wait_s=0.3) == ""
    assert guard.verify() == []
    assert netns.run(netns_fd, ["nft", f"flush table inet {TABLE}"]).returncode == 0
    assert len(guard.verify()) == 1
    assert udp_source(pod_fd, netns_fd, node, source=false, wait_s=0.3) == ""
    guard.cleanup()
    assert netns.run(netns_fd, ["nft", "list", "ruleset"]).stdout == ""
    guard.close()
    wiring.close()
