"""Links as we make and read them, with pyroute2 as the oracle for what the kernel holds."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable

import pytest
from pyroute2 import NetNS

from podwire.errors import KernelError
from podwire.kernel import address, bridge, link, netns, sysctl, vxlan
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket
from tests.conftest import present

MAC = bytes.fromhex("0a5800000001")
PEER_MAC = bytes.fromhex("0a5800000002")


def oracle(netns_fd: int) -> NetNS:
    return NetNS(f"/proc/{os.getpid()}/fd/{netns_fd}", flags=0)


def test_veth_ends_are_made_where_they_belong(make_netns: Callable[[], int]) -> None:
    host_fd, pod_fd = make_netns(), make_netns()
    with NetlinkSocket(netns_fd=host_fd) as host, NetlinkSocket(netns_fd=pod_fd) as pod:
        host.run(
            link.add_bridge(End("br0", mac=MAC), up=True),
            link.add_veth(
                End("vethA", mac=MAC, mtu=1450, queues=1),
                End("eth0", pod_fd, mac=PEER_MAC, mtu=1400),
                up=True,
            ),
        )
        pod.run(link.change("eth0", up=True))
        br0, ours = present(host, "br0"), present(host, "vethA")
        peer = present(pod, "eth0")
        assert (ours.kind, ours.mac, ours.mtu, ours.up) == ("veth", MAC, 1450, True)
        assert (peer.kind, peer.mac, peer.mtu, peer.up) == ("veth", PEER_MAC, 1400, True)
        assert ours.link == peer.index
        assert link.find(host, "eth0") is None

        host.run(link.change("vethA", master=br0.index))
        assert [port.name for port in link.dump(host, master=br0.index)] == ["vethA"]
        with oracle(host_fd) as ip:
            (seen,) = ip.get_links(ifname="vethA")
        assert seen.get_attr("IFLA_MASTER") == br0.index
        assert seen.get_attr("IFLA_NUM_TX_QUEUES") == 1

        host.run(link.delete("vethA"))
        assert link.find(pod, "eth0") is None


def test_the_pod_end_may_be_the_first(make_netns: Callable[[], int]) -> None:
    host_fd, pod_fd = make_netns(), make_netns()
    with NetlinkSocket(netns_fd=host_fd) as host, NetlinkSocket(netns_fd=pod_fd) as pod:
        pod.run(link.add_veth(End("eth0"), End("eni01234567890", host_fd)))
        assert {entry.name for entry in link.dump(host, kind="veth")} == {"eni01234567890"}


def test_changes(sock: NetlinkSocket, netns_fd: int) -> None:
    sock.run(
        link.add_bridge(End("br0"), multicast_snooping=False),
        link.change(
            "br0", up=True, promisc=True, allmulti=True, mtu=1300, mac=MAC, tx_queue_length=77
        ),
        link.change("br0", alias="podwire"),
    )
    found = present(sock, "br0")
    assert (found.mtu, found.mac, found.tx_queue_length) == (1300, MAC, 77)
    assert found.flags & (link.IFF_UP | link.IFF_PROMISC | link.IFF_ALLMULTI) == 0x301
    assert (found.promiscuity, found.alias) == (1, "podwire")
    with oracle(netns_fd) as ip:
        data = ip.get_links(ifname="br0")[0].get_attr("IFLA_LINKINFO").get_attr("IFLA_INFO_DATA")
    assert data.get_attr("IFLA_BR_MCAST_SNOOPING") == 0
    assert data.get_attr("IFLA_BR_AGEING_TIME") == 30000
    sock.run(link.change(found.index, promisc=False, up=False, name="br1"))
    renamed = present(sock, "br1")
    assert (renamed.index, renamed.promiscuity, renamed.up) == (found.index, 0, False)


def test_bridge_port_flags(sock: NetlinkSocket) -> None:
    sock.run(link.add_bridge(End("br0")), link.add_veth(End("a"), End("b")))
    br0 = present(sock, "br0")
    sock.run(link.change("a", master=br0.index))
    assert bridge.port_flags(present(sock, "a")) == bridge.PortFlags()
    sock.run(bridge.change_port("a", hairpin=True), bridge.change_port("a", isolated=True))
    assert bridge.port_flags(br0) is None
    assert bridge.port_flags(present(sock, "a")) == bridge.PortFlags(hairpin=True, isolated=True)


def test_bridge_vlans(sock: NetlinkSocket, netns_fd: int) -> None:
    request = link.add_bridge(End("br0"), vlan_filtering=True)
    if sock.attempt([request])[1]:
        pytest.skip("this kernel has no CONFIG_BRIDGE_VLAN_FILTERING")
    br0 = present(sock, "br0").index
    sock.run(link.add_veth(End("a"), End("b")), link.change("a", master=br0))
    port = present(sock, "a").index
    sock.run(
        bridge.add_vlan(port, bridge.PortVlan(100, 100, pvid=True, untagged=True)),
        bridge.add_vlan(port, bridge.PortVlan(200, 210)),
        bridge.add_vlan(br0, bridge.PortVlan(100, 100), on_bridge=True),
        bridge.delete_vlan(port, bridge.PortVlan(1, 1)),
    )
    shown = netns.run(netns_fd, ["bridge", "-json", "vlan", "show"]).stdout
    vlans = {entry["ifname"]: entry["vlans"] for entry in json.loads(shown)}
    assert vlans["a"] == [
        {"vlan": 100, "flags": ["PVID", "Egress Untagged"]},
        {"vlan": 200, "vlanEnd": 210},
    ]
    assert {"vlan": 100} in vlans["br0"]


@pytest.mark.parametrize(
    "wanted",
    [
        vxlan.Vxlan(4096, 8472, local=bytes([127, 0, 0, 1])),
        vxlan.Vxlan(7, 4789, local=bytes(15) + b"\1", learning=True),
        vxlan.Vxlan(0, 4789, collect_metadata=True),
    ],
)
def test_vxlan_reads_back(sock: NetlinkSocket, wanted: vxlan.Vxlan) -> None:
    sock.run(vxlan.add_vxlan(End("vx0", mac=MAC, mtu=1400), wanted))
    found = present(sock, "vx0")
    assert (found.kind, found.mac, found.mtu, vxlan.read(found)) == ("vxlan", MAC, 1400, wanted)


def test_other_kinds(sock: NetlinkSocket) -> None:
    sock.run(link.add_veth(End("a"), End("b")), link.add_ifb(End("ifb9")))
    assert {found.name: found.kind for found in link.dump(sock)} == {
        "lo": "",
        "a": "veth",
        "b": "veth",
        "ifb9": "ifb",
    }


def test_interface_parameters_by_netlink(sock: NetlinkSocket, netns_fd: int) -> None:
    sock.run(
        link.add_veth(End("eth0.7"), End("b")),
        link.configure("eth0.7", {"rp_filter": 2, "proxy_arp": 1}, ipv6_address_generation="none"),
        link.change("eth0.7", up=True),
    )
    conf = "net.ipv4.conf.eth0/7"
    assert sysctl.read(f"{conf}.rp_filter", netns_fd) == "2"
    assert sysctl.read(f"{conf}.proxy_arp", netns_fd) == "1"
    assert address.dump(sock, link=present(sock, "eth0.7").index) == []


def test_an_error_carries_the_kernels_sentence(sock: NetlinkSocket) -> None:
    with pytest.raises(KernelError, match="cannot make the bogus link x") as caught:
        sock.run(link.add(End("x"), "bogus"))
    assert caught.value.errno == errno.EOPNOTSUPP
    assert caught.value.extack == "Unknown device type"
    assert str(caught.value).endswith(": Unknown device type")


def test_a_batch_goes_on_after_a_refusal_and_names_it(sock: NetlinkSocket) -> None:
    requests = [link.add_bridge(End(f"br{i}")) for i in (0, 1, 1, 2)]
    with pytest.raises(KernelError, match=r"make the bridge link br1: File exists"):
        sock.run(*requests)
    sock.run(link.add_bridge(End("br2")).tolerating(errno.EEXIST))
    assert len(link.dump(sock, kind="bridge")) == 3


def test_a_closed_socket_is_a_clear_error(netns_fd: int) -> None:
    closed = NetlinkSocket(netns_fd=netns_fd)
    closed.close()
    with pytest.raises(KernelError, match="cannot write to the netlink socket"):
        closed.run(link.get("lo"))
