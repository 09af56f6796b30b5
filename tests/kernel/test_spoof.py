"""A pod on a bridge tries every false source it can; frames are made by hand."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from podwire.datapath.nftables.spoof import TABLE, SpoofGuard
from podwire.kernel import link, netns, sysctl
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket, attributes
from podwire.net import parse_address
from tests.conftest import present

A = parse_address
MAC, OTHER = bytes.fromhex("0a5800000001"), bytes.fromhex("0a5800000002")
IP, IP6, LINK_LOCAL = A("10.0.0.1"), A("fd00::1"), A("fe80::858:ff:fe00:1")
STRANGE, STRANGE6 = A("10.0.0.2"), A("fd00::2")
EVERYBODY = b"\xff" * 6


def ether(kind: int, payload: bytes, source: bytes = MAC) -> bytes:
    return (EVERYBODY + source + struct.pack(">H", kind) + payload).ljust(60, b"\0")


def ipv4(source: bytes, mac: bytes = MAC) -> bytes:
    return ether(
        0x0800, struct.pack(">BBHHHBBH", 0x45, 0, 20, 0, 0, 9, 17, 0) + source + bytes(4), mac
    )


def ipv6(source: bytes, protocol: int = 17, payload: bytes = b"", mac: bytes = MAC) -> bytes:
    header = struct.pack(">IHBB", 6 << 28, len(payload), protocol, 255)
    return ether(0x86DD, header + source + A("ff02::1") + payload, mac)


def icmpv6(kind: int, target: bytes, source: bytes = IP6) -> bytes:
    return ipv6(source, 58, struct.pack(">BBHI", kind, 0, 0, 0) + target)


def arp(sender_ip: bytes, sender_mac: bytes = MAC, mac: bytes = MAC) -> bytes:
    head = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)
    return ether(0x0806, head + sender_mac + sender_ip + bytes(6) + STRANGE, mac)


HONEST = {
    "IPv4": ipv4(IP),
    "ARP": arp(IP),
    "ARP probe": arp(bytes(4)),
    "IPv6": ipv6(IP6),
    "IPv6 link-local": ipv6(LINK_LOCAL),
    "neighbour advertisement": icmpv6(136, IP6),
    "neighbour solicitation": icmpv6(135, STRANGE6),
    "duplicate address detection": icmpv6(135, IP6, bytes(16)),
}
SPOOFED = {
    "IPv4 address": ipv4(STRANGE),
    "IPv4 of nobody": ipv4(bytes(4)),
    "MAC": ipv4(IP, OTHER),
    "ARP sender address": arp(STRANGE),
    "ARP sender MAC": arp(IP, OTHER),
    "ARP Ethernet source": arp(IP, MAC, OTHER),
    "ARP probe with a false MAC": arp(bytes(4), OTHER, OTHER),
    "IPv6 address": ipv6(STRANGE6),
    "IPv6 link-local": ipv6(A("fe80::1")),
    "IPv6 MAC": ipv6(IP6, mac=OTHER),
    "IPv6 of nobody": ipv6(bytes(16)),
    "advertisement for another": icmpv6(136, STRANGE6),
    "router advertisement": icmpv6(134, bytes(16), LINK_LOCAL),
    "redirect": icmpv6(137, STRANGE6),
    "VLAN tag": ether(0x8100, struct.pack(">HH", 5, 0x0800) + bytes(40)),
    "unknown protocol": ether(0x88B5, bytes(40)),
}


_BRPORT_STATE, _FORWARDING = 1, b"\3"


@dataclass
class Lan:
    """Frames go into the bridge port `pod` and are looked for at another port."""

    host: int
    sock: NetlinkSocket
    guard: SpoofGuard
    sender: socket.socket
    receiver: socket.socket

    def passes(self, frame: bytes) -> bool:
        """Send the frame and then a marker from a port that nobody guards; see which arrive."""
        self.sender.send(frame)
        with netns.entered(self.host), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as marker:
            marker.bind(("free-peer", 0))
            marker.send(ether(0x88B6, bytes(40), OTHER))
        while select.select([self.receiver], [], [], 5)[0]:
            seen = self.receiver.recv(2000)
            if seen[12:14] == b"\x88\xb6":
                return False
            untagged = frame[:12] + frame[16:]  # what a packet socket shows of a VLAN tag
            if seen in (frame, untagged):
                assert self.receiver.recv(2000)[12:14] == b"\x88\xb6"
                return True
        raise AssertionError("the marker was lost")


def packet_socket(host: int, ifname: str) -> socket.socket:
    with netns.entered(host):
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        made.bind((ifname, 3))
    return made


def wait_until_forwarding(sock: NetlinkSocket, ports: tuple[str, ...]) -> None:
    """The kernel notices a veth's carrier in a worker of its own; until then the port is shut."""
    until = time.monotonic() + 10
    for port in ports:
        while attributes(present(sock, port).port_data)[_BRPORT_STATE] != _FORWARDING:
            assert time.monotonic() < until, f"{port} does not forward"
            time.sleep(0.01)


@pytest.fixture
def lan(make_netns: Callable[[], int]) -> Iterator[Lan]:
    host = make_netns()
    # br_netfilter would judge these frames too: their checksums are wrong.
    sysctl.write({f"net.bridge.bridge-nf-call-{x}tables": 0 for x in ("ip", "ip6", "arp")}, host)
    guard = SpoofGuard(host)
    guard.start()
    with NetlinkSocket(netns_fd=host) as sock:
        sock.run(link.add_bridge(End("br0"), multicast_snooping=False), link.change("br0", up=True))
        bridge = present(sock, "br0").index
        for name in ("pod", "listen", "free"):
            sock.run(
                link.add_veth(End(name), End(f"{name}-peer"), master=bridge),
                *(
                    request
                    for end in (name, f"{name}-peer")
                    for request in (
                        link.configure(end, ipv6_address_generation="none"),
                        link.change(end, up=True),
                    )
                ),
            )
        wait_until_forwarding(sock, ("pod", "listen", "free"))
        with packet_socket(host, "pod-peer") as sender, packet_socket(host, "listen-peer") as got:
            yield Lan(host, sock, guard, sender, got)
    guard.close()


def test_honest_frames_pass_and_no_others(lan: Lan) -> None:
    # an unbound port is free
    assert [name for name, frame in SPOOFED.items() if not lan.passes(frame)] == []
    lan.guard.bind("pod", MAC, [IP, IP6])
    assert [name for name, frame in HONEST.items() if not lan.passes(frame)] == []
    assert [name for name, frame in SPOOFED.items() if lan.passes(frame)] == []


def test_an_ipv4_pod_has_no_ipv6(lan: Lan) -> None:
    lan.guard.bind("pod", MAC, [IP])
    assert lan.passes(HONEST["IPv4"])
    assert not lan.passes(HONEST["IPv6"])
    assert not lan.passes(HONEST["IPv6 link-local"])


def test_of_a_pod_without_known_addresses_the_mac_is_checked(lan: Lan) -> None:
    lan.guard.bind("pod", MAC, [])
    assert lan.passes(SPOOFED["IPv4 address"])
    assert not lan.passes(SPOOFED["MAC"])
    assert lan.guard.verify() == []


def test_a_new_binding_replaces_the_old(lan: Lan) -> None:
    lan.guard.bind("pod", MAC, [IP, STRANGE])
    lan.guard.bind("pod", MAC, [IP6, STRANGE])
    assert lan.passes(SPOOFED["IPv4 address"])
    assert not lan.passes(HONEST["IPv4"])
    lan.guard.unbind("never-bound")
    lan.guard.unbind("pod")
    lan.guard.bind("pod", MAC, [IP])
    assert not lan.passes(SPOOFED["IPv4 address"])
    lan.guard.unbind("pod")
    lan.guard.flush()
    lan.guard.flush()
    assert lan.passes(SPOOFED["MAC"])
    assert lan.guard.verify() == []


def test_restart_adopts_and_corrects(lan: Lan) -> None:
    lan.guard.bind("pod", MAC, [IP])
    lan.guard.bind("gone", OTHER, [STRANGE])
    again = SpoofGuard(lan.host)
    again.start()
    assert not lan.passes(SPOOFED["IPv4 address"])
    again.restore({"pod": (MAC, [IP])})
    assert again.verify() == []
    assert lan.passes(HONEST["IPv4"])
    assert not lan.passes(SPOOFED["IPv4 address"])
    listing = netns.run(lan.host, ["nft", "list", "ruleset"]).stdout
    assert "gone" not in listing
    again.close()


@pytest.mark.parametrize(
    "command",
    [
        f"delete table bridge {TABLE}",
        f"flush chain bridge {TABLE} prerouting",
        f"flush set bridge {TABLE} ports",
        f"flush set bridge {TABLE} ipv4",
    ],
)
def test_interference_is_repaired(lan: Lan, command: str) -> None:
    lan.guard.bind("pod", MAC, [IP])
    assert netns.run(lan.host, ["nft", command]).returncode == 0
    assert lan.guard.verify()
    assert lan.guard.verify() == []
    assert lan.passes(HONEST["IPv4"])
    assert not lan.passes(SPOOFED["IPv4 address"])
    assert netns.run(lan.host, ["nft", command]).returncode == 0
    lan.guard.bind("pod", MAC, [STRANGE])
    lan.guard.verify()
    assert not lan.passes(HONEST["IPv4"])


def test_cleanup(lan: Lan) -> None:
    lan.guard.bind("pod", MAC, [IP])
    lan.guard.cleanup()
    lan.guard.cleanup()
    assert netns.run(lan.host, ["nft", "list", "ruleset"]).stdout == ""
