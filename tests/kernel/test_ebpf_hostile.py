"""Packets that somebody made up, and rare ones: a whole node, by test runs and for real."""

import array
import fcntl
import os
import select
import socket
import struct

import msgspec
import pytest

from podwire.datapath.ebpf.layout import mapped
from podwire.kernel import netns
from podwire.net import Protocol, parse_address, parse_mac
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_node import CLIENT, ISOLATED, service, whole_node
from tests.kernel.ebpf_runs import DROP, NEXT, REDIRECT, assert_sound, make_frame
from tests.kernel.ebpf_services import KINDS, VIP, make_port
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, OUTSIDE, POD, REMOTE, UPLINK_MAC

pytestmark = NEEDS_EBPF

STRANGER = "02:00:00:00:07:07"


@pytest.fixture(scope="module")
def node():
    with whole_node() as made:
        yield made


@pytest.fixture(autouse=True)
def afresh(node):
    node.programs.connections.clear()


# --- the link ------------------------------------------------------------------------------------


def test_frames_for_others_are_left_alone(node):
    """A capture makes the uplink promiscuous; what others get must not be answered twice."""
    service(node, 4, Protocol.TCP, [])
    packet = packets.first(CLIENT[4], NODE[4], Protocol.TCP, (5000, 30080), 1)
    assert node.run(packet, "up0")[0] == REDIRECT
    for mac in (STRANGER, "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"):
        assert node.run(packet, "up0", host_mac=mac) == (NEXT, packet)


def test_what_is_for_a_bridge_is_seen_at_its_ports(node):
    """By an address that is the bridge's: there are no programs on the bridge itself."""
    service(node, 4, Protocol.TCP, [])
    packet = packets.first(CLIENT[4], NODE[4], Protocol.TCP, (5000, 30080), 1)
    space = node.world.spaces["node"]
    node.world.batch(space, "link add br0 type bridge", "link add port0 type veth peer name port1")
    try:
        assert node.run(packet, "port0", host_mac=STRANGER)[0] == NEXT
        node.world.batch(space, "link set port0 master br0")
        assert node.run(packet, "port0", host_mac=STRANGER)[0] == REDIRECT
    finally:
        node.world.batch(space, "link del port0", "link del br0")


def test_what_belongs_to_a_vlan_is_for_the_device_of_the_vlan(node):
    service(node, 4, Protocol.TCP, [])
    packet = packets.first(CLIENT[4], NODE[4], Protocol.TCP, (5000, 30080), 1)
    host, peer = map(parse_mac, UPLINK_MAC)
    with netns.socket(node.world.spaces["outside"], socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        for tag, refused in ((0x8100_0005, 0), (0x8100_0000, 1)):  # a priority tag is no VLAN
            before = node.count("rejected")
            raw.send(host + peer + struct.pack(">IH", tag, 0x0800) + packet)
            raw.send(make_frame(packet, UPLINK_MAC))
            while node.count("rejected") == before:
                pass
            assert node.count("rejected") == before + 1 + refused


@pytest.mark.parametrize("family", [4, 6])
def test_sources_that_nobody_has_are_dropped(node, family):
    service(node, family, Protocol.UDP, [POD[2][family]])
    for source in {4: ("127.0.0.1", "224.0.0.5", "255.255.255.255"), 6: ("::1", "ff02::5")}[family]:
        packet = packets.first(source, VIP[family], Protocol.UDP, (5000, 80), 1)
        assert node.run(packet, "up0")[0] == DROP


def test_ipv6_addresses_that_look_like_ipv4_are_dropped(node):
    service(node, 4, Protocol.UDP, [POD[2][4]])
    packet = packets.first(CLIENT[6], VIP[6], Protocol.UDP, (5000, 80), 1)
    for at, address in ((8, CLIENT[4]), (24, VIP[4])):
        made_up = packet[:at] + mapped(parse_address(address)) + packet[at + 16 :]
        assert node.run(made_up, "up0")[0] == DROP


# --- headers -------------------------------------------------------------------------------------


def with_options(packet, count, kind=60):
    """An IPv6 packet with extension headers (8 bytes each) before its transport header."""
    body, last = packet[40:], packet[6]
    for _ in range(count):
        body = struct.pack(">BB6x", last, 0) + body
        last = kind
    return packet[:4] + struct.pack(">HB", len(body), last) + packet[7:40] + body


def test_extension_headers_are_skipped_and_too_many_are_no_way_past_a_policy(node):
    service(node, 6, Protocol.TCP, [POD[2][6]])
    packet = packets.first(CLIENT[6], VIP[6], Protocol.TCP, (5000, 80), 1)
    for kind in (0, 43, 60):
        verdict, out = node.run(with_options(packet, 3, kind), "up0")
        assert verdict == REDIRECT
        assert packets.parse(out).destination == POD[2][6]
        assert out[40 + 24 :][2:4] == packet[42:44]
    assert node.run(with_options(packet, 7), "up0")[0] == DROP


def test_sctp_without_a_checksum_yet_stays_so(node):
    """A local socket leaves it to the device: 0 on the way there."""
    node.serve(make_port("sctp", 3868, [POD[2][4]], family=4, protocol=Protocol.SCTP))
    packet = packets.first(POD[1][4], VIP[4], Protocol.SCTP, (5000, 3868), 1)
    packet = packet[:28] + bytes(4) + packet[32:]
    verdict, out = node.run(packet)
    assert (verdict, packets.parse(out).destination_port) == (REDIRECT, 80)
    assert out[28:32] == bytes(4)


@pytest.fixture
def jumbo(node):
    spaces = node.world.spaces
    links = (("node", "up0"), ("node", "pod1"), ("outside", "eth0"), ("pod1", "eth0"))
    for size in (9000, 1500):
        for space, name in links:
            node.world.batch(spaces[space], f"link set {name} mtu {size}")
        if size == 9000:
            yield


@pytest.mark.parametrize("family", [4, 6])
def test_headers_may_lie_in_another_page(node, jumbo, family):
    """Some drivers hand over nothing but the Ethernet header in one piece."""
    spaces = node.world.spaces
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    body = struct.pack(">HHHH", 5555, 80, 5008, 0) + bytes(5000)
    packet = packets._ip(OUTSIDE[family], POD[1][family], Protocol.UDP, body)
    with (
        netns.socket(spaces["pod1"], kind, socket.SOCK_DGRAM) as server,
        netns.socket(spaces["outside"], socket.AF_PACKET, socket.SOCK_RAW) as raw,
    ):
        server.bind((POD[1][family], 80))
        server.settimeout(3)
        raw.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR: says how much is in one piece
        raw.bind(("eth0", 0))
        raw.send(struct.pack("=BBHHHH", 0, 0, 14, 0, 0, 0) + make_frame(packet, UPLINK_MAC))
        assert len(server.recv(9000)) == 5000


# --- ICMP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_a_quote_may_end_behind_the_ports(node, family):
    """All that RFC 792 asks of a router is eight bytes."""
    service(node, family, Protocol.TCP, [REMOTE[family]])
    there = node.run(packets.first(POD[1][family], VIP[family], Protocol.TCP, (5000, 80), 1))[1]
    quote = there[: {4: 28, 6: 48}[family]]
    error = packets.icmp_port_unreachable(quote, OUTSIDE[family], POD[1][family])
    verdict, out = node.run(error, "up0")
    assert verdict == REDIRECT
    quoted = packets.parse(out).quoted
    assert (quoted.source, quoted.source_port) == (POD[1][family], 5000)
    assert (quoted.destination, quoted.destination_port) == (VIP[family], 80)
    assert_sound(out)


@pytest.mark.parametrize("family", [4, 6])
def test_an_error_about_nothing_is_judged_as_any_packet(node, family):
    """Otherwise it would carry whatever an isolated pod has to say."""
    made_up = packets.first(CLIENT[family], POD[1][family], Protocol.UDP, (53, 5000), 1)
    error = packets.icmp_port_unreachable(made_up, POD[1][family], CLIENT[family])
    node.enforce()
    assert node.run(error)[0] != DROP
    node.enforce(ISOLATED)
    assert node.run(error)[0] == DROP
    node.enforce({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]})
    sent = packets.first(POD[1][family], REMOTE[family], Protocol.UDP, (5000, 53), 1)
    assert node.run(sent)[0] != DROP
    error = packets.icmp_port_unreachable(sent, REMOTE[family], POD[1][family])
    assert node.run(error, "up0")[0] != DROP
    node.enforce()


def test_neighbour_discovery_ends_at_the_link(node):
    node.enforce(ISOLATED)
    body = struct.pack(">BBHI", 135, 0, 0, 0) + parse_address(REMOTE[6])
    for target, verdict in ((REMOTE[6], DROP), (NODE[6], NEXT), ("fe80::1", NEXT)):
        packet = packets._ip(POD[1][6], target, Protocol.ICMPV6, body)
        assert node.run(packet)[0] == verdict
    node.enforce()


def test_no_pod_is_a_router(node):
    before = node.count("spoofed")
    for kind, verdict in ((133, NEXT), (134, DROP), (136, NEXT), (137, DROP)):
        body = struct.pack(">BBHI", kind, 0, 0, 0) + bytes(16)
        assert node.run(packets._ip("fe80::5", "ff02::1", Protocol.ICMPV6, body))[0] == verdict
    assert node.count("spoofed") == before + 2


def test_nobody_answers_a_reset_or_a_later_fragment(node):
    service(node, 4, Protocol.TCP, [])
    reset = packets.tcp(CLIENT[4], VIP[4], (5000, 80), packets.RST, 1, 0, packets.marker(1))
    assert node.run(reset, "up0")[0] == DROP


@pytest.fixture
def plain_link(node):
    """An uplink that makes no checksums: what a local sender left open is closed before it."""
    make_sums(node, False)
    yield
    make_sums(node, True)


def make_sums(node, on):
    with netns.socket(node.world.spaces["node"], socket.AF_INET, socket.SOCK_DGRAM) as control:
        value = array.array("B", struct.pack("=II", 0x17, on))  # ETHTOOL_STXCSUM
        request = struct.pack("16sP", b"up0", value.buffer_info()[0])
        fcntl.ioctl(control, 0x8946, request)  # SIOCETHTOOL


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", list(KINDS))
def test_a_refusal_is_sound_whoever_makes_its_checksum(node, plain_link, family, protocol):
    service(node, family, protocol, [])
    for target, port in ((VIP[family], 80), (VIP[family], 99), (NODE[family], 30080)):
        with pytest.raises(ConnectionRefusedError):
            node.world.ask("outside", target, port, KINDS[protocol])


# --- interfaces without Ethernet -----------------------------------------------------------------


class Tunnel:
    """A tun device of the node: what the world sends is written to it, what it gets is read."""

    def __init__(self, node):
        self.node, space = node, node.world.spaces["node"]
        self.fd = netns.call(space, self._open)
        node.world.batch(
            space,
            "link set tun0 up",
            "addr add 192.168.99.1/24 dev tun0",
            "addr add fd99::1/64 dev tun0 nodad",
            f"route add {CLIENT[4]} dev tun0",
            f"route add {CLIENT[6]} dev tun0",
        )
        node.programs.sync_links()

    def _open(self):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        request = struct.pack("16sH22x", b"tun0", 0x1001)  # IFF_TUN | IFF_NO_PI
        fcntl.ioctl(fd, 0x400454CA, request)  # TUNSETIFF
        return fd

    def ask(self, packet):
        """The next packet for CLIENT after this one, or None."""
        os.write(self.fd, packet)
        return self.read()

    def read(self):
        while select.select([self.fd], [], [], 0.5)[0]:
            wire = packets.parse(os.read(self.fd, 2000))
            if wire.destination in CLIENT.values():
                return wire
        return None


@pytest.fixture
def tunnel(node):
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("no /dev/net/tun")
    made = Tunnel(node)
    yield made
    os.close(made.fd)


@pytest.mark.parametrize("family", [4, 6])
def test_services_and_policies_hold_where_there_is_no_ethernet(node, tunnel, family):
    node.world.serve("pod1", POD[1][family], 8053, socket.SOCK_DGRAM)
    node.world.serve("node", NODE[family], 8053, socket.SOCK_DGRAM)
    backend = {"family": family, "protocol": Protocol.UDP, "external_local": True}
    to_pod = packets.first(CLIENT[family], POD[1][family], Protocol.UDP, (7000, 8053), 1)
    to_port = packets.first(CLIENT[family], NODE[family], Protocol.UDP, (7000, 30080), 1)
    refused = packets.first(CLIENT[family], NODE[family], Protocol.UDP, (7000, 30081), 1)
    for server in (POD[1], NODE):
        port = make_port("web", 80, [server[family]], local=[server[family]], **backend)
        eighty_fifty_three = tuple(b[:-2] + (8053).to_bytes(2, "big") for b in port.local)
        node.serve(
            msgspec.structs.replace(port, local=eighty_fifty_three, cluster=eighty_fifty_three),
            make_port("none", 81, [], family=family, protocol=Protocol.UDP),
        )
        answer = tunnel.ask(to_port)
        assert (answer.source, answer.source_port) == (NODE[family], 30080)
        assert answer.payload[8:].decode().split() == [server[family], CLIENT[family]]
        assert tunnel.ask(refused).is_error
    assert tunnel.ask(to_pod).source == POD[1][family]
    node.enforce(ISOLATED)
    assert tunnel.ask(to_pod) is None
    node.enforce()
