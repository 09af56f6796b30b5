"""Packets that somebody made up, and rare ones: a whole node, by test runs and for real."""

import array
import fcntl
import os
import select
import socket
import struct

import msgspec
import pytest

from podwire.datapath.ebpf.layout import CONNECTION, FLOW, mapped
from podwire.datapath.ebpf.nodes import NodesPart
from podwire.datapath.ebpf.pods import EbpfPods, PodLink
from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import OBJECTS, Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel import netns
from podwire.kernel.bpf import features
from podwire.kube.objects import Namespace, NetworkPolicy
from podwire.kube.store import Store
from podwire.net import Protocol, parse_address, parse_prefix
from podwire.nodes import RouteTable
from podwire.policy import Attachment, PolicyCompiler
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_world import HOST_MAC, MAC, NODE, OUTSIDE, POD, REMOTE, UPLINK_MAC, World
from tests.kernel.test_ebpf_policy import pod
from tests.kernel.test_ebpf_programs import assert_sound
from tests.kernel.test_ebpf_services import EXTERNAL, KINDS, VIP, make_port, make_table

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not list(OBJECTS.glob("*.bpf.o")), reason="no compiled eBPF programs"),
]
if os.geteuid() == 0 and features.missing():
    pytestmark.append(pytest.mark.skip(reason=f"the kernel lacks {features.missing()[0]}"))

NEXT, DROP, REDIRECT = 0xFFFFFFFF, 2, 7
ENDS = {"pod1": (HOST_MAC[1], MAC[1]), "pod2": (HOST_MAC[2], MAC[2]), "up0": UPLINK_MAC}
CLIENT = {4: "198.51.100.9", 6: "fd51::9"}
GRE = 47
ROOM = 65536  # for entries of connections


class Node:
    """A world and all parts of its node, as an agent has them."""

    def __init__(self, world):
        self.world = world
        self.programs = Programs(
            world.name, world.spaces["node"], connections=ROOM, room={"connections": ROOM}
        )
        self.programs.enable("services", "policy", "pods", "masquerade")
        self.services = ServicesPart(programs=self.programs)
        self.policy = PolicyPart(programs=self.programs)
        self.pods = EbpfPods(self.programs)
        self.nodes = NodesPart(self.programs)
        self.services.apply(make_table([]))
        self.links = {n: self.link(n) for n in (1, 2)}
        self.pods.replace(self.links.values())
        self.nodes.apply(
            RouteTable(
                "node",
                "direct",
                underlay=parse_address(NODE[4]),
                pod_prefixes=frozenset({parse_prefix("10.244.0.0/24"), parse_prefix("fd44::/64")}),
                cluster_prefixes=frozenset(
                    {parse_prefix("10.244.0.0/16"), parse_prefix("fd44::/16")}
                ),
            )
        )
        self.enforce()

    def link(self, number):
        return PodLink(
            self.world.ifindex(f"pod{number}"),
            *(bytes.fromhex(m[number].replace(":", "")) for m in (HOST_MAC, MAC)),
            tuple(parse_address(text) for text in POD[number].values()),
        )

    def serve(self, *ports):
        self.services.apply(make_table(ports))
        self.programs.connections.clear()

    def enforce(self, *specs):
        """These NetworkPolicies hold, for pods one and two of namespace x."""
        compiler, store = PolicyCompiler("node"), Store()
        store.put(msgspec.convert({"metadata": {"name": "x"}}, Namespace))
        for number, name in ((1, "one"), (2, "two")):
            store.put(pod(name, "node", POD[number], app=name))
            addresses = tuple(parse_address(text) for text in POD[number].values())
            compiler.attach(Attachment(("x", name), f"pod{number}", addresses))
        for number, spec in enumerate(specs):
            metadata = {"name": f"p{number}", "namespace": "x"}
            store.put(msgspec.convert({"metadata": metadata, "spec": spec}, NetworkPolicy))
        self.policy.apply(compiler.update(store.take()))
        self.programs.connections.clear()

    def run(self, packet, link="pod1", *, host_mac=None):
        """``(verdict, IP packet)`` of a packet that comes in by `link`; "": the node sends it."""
        kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
        host, peer = (bytes.fromhex(t.replace(":", "")) for t in ENDS.get(link, UPLINK_MAC))
        context = bytearray(192)
        struct.pack_into("=I", context, 40, self.world.ifindex(link or "up0"))
        name = {"pod": "from_pod", "": "from_node"}.get(link[:3], "from_network")
        frame = (host_mac or host) + peer + struct.pack(">H", kind) + packet

        def body():
            return self.programs.program(name).test_run(frame, context=bytes(context))

        done = netns.call(self.world.spaces["node"], body)
        return done.value, done.data[14:]

    def count(self, name):
        return self.programs.outcomes()[name]


@pytest.fixture(scope="module")
def node():
    with World() as world:
        made = Node(world)
        yield made
        made.services.cleanup()


@pytest.fixture(autouse=True)
def afresh(node):
    node.programs.connections.clear()


def service(node, family, protocol, backends, **fields):
    node.serve(make_port("web", 80, backends, family=family, protocol=protocol, **fields))


ISOLATED = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


# --- the link ------------------------------------------------------------------------------------


def test_frames_for_others_are_left_alone(node):
    """A capture makes the uplink promiscuous; what others get must not be answered twice."""
    service(node, 4, Protocol.TCP, [])
    packet = packets.first(CLIENT[4], NODE[4], Protocol.TCP, (5000, 30080), 1)
    assert node.run(packet, "up0")[0] == REDIRECT
    for mac in (b"\2\0\0\0\x07\x07", b"\xff" * 6, b"\1\0\x5e\0\0\1"):
        assert node.run(packet, "up0", host_mac=mac) == (NEXT, packet)


def test_what_is_for_a_bridge_is_seen_at_its_ports(node):
    """By an address that is the bridge's: there are no programs on the bridge itself."""
    service(node, 4, Protocol.TCP, [])
    packet = packets.first(CLIENT[4], NODE[4], Protocol.TCP, (5000, 30080), 1)
    space = node.world.spaces["node"]
    node.world.batch(space, "link add br0 type bridge", "link add port0 type veth peer name port1")
    try:
        assert node.run(packet, "port0", host_mac=b"\2\0\0\0\x07\x07")[0] == NEXT
        node.world.batch(space, "link set port0 master br0")
        assert node.run(packet, "port0", host_mac=b"\2\0\0\0\x07\x07")[0] == REDIRECT
    finally:
        node.world.batch(space, "link del port0", "link del br0")


def test_what_belongs_to_a_vlan_is_for_the_device_of_the_vlan(node):
    service(node, 4, Protocol.TCP, [])
    packet = packets.first(CLIENT[4], NODE[4], Protocol.TCP, (5000, 30080), 1)
    host, peer = (bytes.fromhex(text.replace(":", "")) for text in UPLINK_MAC)
    with netns.socket(node.world.spaces["outside"], socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        for tag, refused in ((0x8100_0005, 0), (0x8100_0000, 1)):  # a priority tag is no VLAN
            before = node.count("rejected")
            raw.send(host + peer + struct.pack(">IH", tag, 0x0800) + packet)
            raw.send(host + peer + struct.pack(">H", 0x0800) + packet)
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


# --- masquerade ----------------------------------------------------------------------------------


def test_protocols_without_ports_are_masqueraded_and_answered(node):
    packet = packets._ip(POD[1][4], CLIENT[4], GRE, bytes(24))
    verdict, out = node.run(packet)
    assert (verdict, packets.parse(out).source) == (REDIRECT, NODE[4])
    verdict, out = node.run(packets._ip(CLIENT[4], NODE[4], GRE, bytes(24)), "up0")
    assert (verdict, packets.parse(out).destination) == (REDIRECT, POD[1][4])


@pytest.mark.parametrize("family", [4, 6])
def test_long_echoes_come_back_in_pieces(node, family):
    target = OUTSIDE[family]
    command = ["ping", "-c2", "-i0.1", "-W2", "-s3000", target]
    done = netns.run(node.world.spaces["pod1"], command, timeout_s=10)
    assert " 0% packet loss" in done.stdout, done.stdout


@pytest.mark.parametrize("family", [4, 6])
def test_the_first_hop_of_what_is_masqueraded_answers(node, family):
    command = ["ping", "-c1", "-W2", "-t1", OUTSIDE[family]]
    done = netns.run(node.world.spaces["pod1"], command, timeout_s=10)
    assert "exceeded" in done.stdout or "limit" in done.stdout, done.stdout


@pytest.fixture(params=["link", "route"])
def narrow(node, request):
    before = node.count("too_big")
    routes = [f"{OUTSIDE[4]}/32 dev up0", f"{OUTSIDE[6]}/128 dev up0"]
    if request.param == "link":
        node.world.batch(node.world.spaces["node"], "link set up0 mtu 1300")
    else:
        node.world.batch(
            node.world.spaces["node"], *(f"route add {each} mtu lock 1300" for each in routes)
        )
    yield
    told = node.count("too_big") - before
    if request.param == "link":
        node.world.batch(node.world.spaces["node"], "link set up0 mtu 1500")
    else:
        node.world.batch(node.world.spaces["node"], *(f"route del {each}" for each in routes))
    for family in (4, 6):
        for space in ("pod1", "node", "outside"):
            netns.run(node.world.spaces[space], ["ip", f"-{family}", "route", "flush", "cache"])
    assert told > 0


@pytest.mark.parametrize("family", [4, 6])
def test_what_is_too_long_for_the_way_out_is_cut_or_refused(node, narrow, family):
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    spaces = node.world.spaces
    with (
        netns.socket(spaces["outside"], kind, socket.SOCK_STREAM) as listener,
        netns.socket(spaces["pod1"], kind, socket.SOCK_STREAM) as client,
    ):
        listener.bind((OUTSIDE[family], 0))
        listener.listen()
        client.settimeout(5)
        client.connect(listener.getsockname())
        server, peer = listener.accept()
        assert peer[0] == NODE[family]
        with server:
            server.settimeout(5)
            client.sendall(bytes(30000))
            left = 30000
            while left:
                left -= len(server.recv(65536))


def test_a_datagram_that_may_be_cut_is(node, narrow):
    spaces = node.world.spaces
    with (
        netns.socket(spaces["outside"], socket.AF_INET, socket.SOCK_DGRAM) as server,
        netns.socket(spaces["pod1"], socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind((OUTSIDE[4], 0))
        server.settimeout(5)
        client.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER: IP_PMTUDISC_DONT
        client.sendto(bytes(1400), server.getsockname())
        data, peer = server.recvfrom(2000)
        assert (len(data), peer[0]) == (1400, NODE[4])


# --- connections ---------------------------------------------------------------------------------


def entry(source, destination, ports, protocol):
    packed = [port.to_bytes(2, "big") for port in ports]
    both = (mapped(parse_address(source)), mapped(parse_address(destination)))
    return FLOW.pack(*both, *packed, protocol)


def fill_ports(node, states):
    """Every port towards REMOTE is taken by a connection whose directions are in these states."""
    table = node.programs.growing["connections"].map
    seen = struct.unpack_from("=I", next(iter(dict(table.items()).values())), 40)[0]
    node.programs.connections.clear()
    entries = {}
    for number in range(20000):
        client = (CLIENT[4], NODE[4], (number + 1, 30080), Protocol.TCP)
        there = entry(NODE[4], REMOTE[4], (10000 + number, 80), Protocol.TCP)
        answer = entry(REMOTE[4], NODE[4], (80, 10000 + number), Protocol.TCP)
        back = entry(NODE[4], CLIENT[4], (30080, number + 1), Protocol.TCP)
        entries[entry(*client)] = CONNECTION.pack(there, seen, 1, states[0], 1)
        entries[answer] = CONNECTION.pack(back, seen, 1, states[1], 3)
    table.update_batch(entries.items())


def test_a_port_is_lent_again_only_when_both_ends_have_closed(node):
    service(node, 4, Protocol.TCP, [REMOTE[4]])
    new = packets.first(OUTSIDE[4], NODE[4], Protocol.TCP, (7000, 30080), 1)
    assert packets.parse(node.run(new, "up0")[1]).destination == REMOTE[4]
    before = node.count("ports_exhausted")
    fill_ports(node, (3, 7))  # the backend has closed its direction; the client still sends
    assert node.run(new, "up0")[0] == DROP
    assert node.count("ports_exhausted") == before + 1
    node.run(new, "up0")
    fill_again = packets.first(OUTSIDE[4], NODE[4], Protocol.TCP, (7001, 30080), 1)
    node.programs.connections.clear()
    node.run(new, "up0")
    fill_ports(node, (7, 7))
    verdict, out = node.run(fill_again, "up0")
    assert verdict != DROP
    port = packets.parse(out).source_port
    # the old owner of the port is gone whole, and takes nothing of the new one's with it
    table = node.programs.growing["connections"].map
    old = entry(CLIENT[4], NODE[4], (port - 10000 + 1, 30080), Protocol.TCP)
    assert table.lookup(old) is None


def test_half_a_connection_expires_alone(node):
    service(node, 4, Protocol.UDP, [REMOTE[4]])
    node.run(packets.first(OUTSIDE[4], NODE[4], Protocol.UDP, (7000, 30080), 1), "up0")
    table = node.programs.growing["connections"].map
    held = dict(table.items())
    stale = entry(CLIENT[4], NODE[4], (7000, 30080), Protocol.UDP)
    mine = entry(OUTSIDE[4], NODE[4], (7000, 30080), Protocol.UDP)
    value = held[mine]
    old = struct.unpack_from("=I", value, 40)[0] - 100
    table.update(stale, value[:40] + struct.pack("=I", old) + value[44:])
    node.programs.connections.expire()
    assert dict(table.items()) == held


def test_a_client_that_was_refused_gets_another_backend_from_the_same_port(node):
    service(node, 4, Protocol.TCP, [POD[1][4]])
    syn = packets.first(CLIENT[4], VIP[4], Protocol.TCP, (7000, 80), 1)
    out = node.run(syn, "up0")[1]
    ports = packets.parse(out).source_port
    refused = packets.tcp(
        POD[1][4],
        packets.parse(out).source,
        (80, ports),
        packets.RST | packets.ACK,
        0,
        2,
        b"12345678",
    )
    assert node.run(refused)[0] != DROP
    node.services.apply(
        make_table([make_port("web", 80, [POD[2][4]], family=4, protocol=Protocol.TCP)])
    )
    assert packets.parse(node.run(syn, "up0")[1]).destination == POD[2][4]


@pytest.mark.parametrize("family", [4, 6])
def test_connections_of_a_pod_end_with_it(node, family):
    """Its address may be another pod's at once; what was allowed for one is not for the other."""
    node.enforce()
    packet = packets.first(CLIENT[family], POD[1][family], Protocol.UDP, (7000, 80), 1)
    assert node.run(packet, "up0")[0] != DROP
    far = packets.first(CLIENT[family], POD[2][family], Protocol.UDP, (7000, 80), 1)
    assert node.run(far, "up0")[0] != DROP
    table = node.programs.growing["connections"].map
    assert len(list(table.keys())) == 4
    node.pods.remove(node.links[1].ifindex)
    node.pods.add(node.links[1])
    assert {FLOW.unpack(key)[2:4] for key, _ in table.items()} == {
        (struct.pack(">H", a), struct.pack(">H", b)) for a, b in ((7000, 80), (80, 7000))
    }
    assert len(list(table.keys())) == 2


def test_a_datagram_flow_that_was_there_before_the_service_ends(node):
    """Sent again and again, it would go past the Service for ever."""
    node.services.apply(make_table([]))
    packet = packets.first(POD[1][4], EXTERNAL[4], Protocol.UDP, (7000, 80), 1)
    assert packets.parse(node.run(packet)[1]).source == NODE[4]
    node.services.apply(
        make_table([make_port("dns", 80, [POD[2][4]], family=4, protocol=Protocol.UDP)])
    )
    assert packets.parse(node.run(packet)[1]).destination == POD[2][4]


def test_answers_to_an_address_that_the_node_has_just_got_are_not_masqueraded(node):
    late = "192.168.77.7"
    node.programs.growing["subjects"].replace({})  # or policies would keep the connection anyway
    assert node.run(packets.first(late, POD[1][4], Protocol.UDP, (7000, 80), 1), "")[0] != DROP
    answer = packets.first(POD[1][4], late, Protocol.UDP, (80, 7000), 2)
    assert packets.parse(node.run(answer)[1]).source == POD[1][4]


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
    macs = b"".join(bytes.fromhex(text.replace(":", "")) for text in UPLINK_MAC)
    with (
        netns.socket(spaces["pod1"], kind, socket.SOCK_DGRAM) as server,
        netns.socket(spaces["outside"], socket.AF_PACKET, socket.SOCK_RAW) as raw,
    ):
        server.bind((POD[1][family], 80))
        server.settimeout(3)
        raw.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR: says how much is in one piece
        raw.bind(("eth0", 0))
        raw.send(
            struct.pack("=BBHHHH", 0, 0, 14, 0, 0, 0)
            + macs
            + struct.pack(">H", 0x0800 if family == 4 else 0x86DD)
            + packet
        )
        assert len(server.recv(9000)) == 5000


def test_a_growth_that_was_cut_short_is_finished(node):
    """The agent may end between two steps of it; entries of the smaller table would never age."""
    service(node, 4, Protocol.UDP, [REMOTE[4]])
    packet = packets.first(CLIENT[4], NODE[4], Protocol.UDP, (7000, 30080), 1)
    first = node.run(packet, "up0")[1]
    outer, growing = node.programs.maps["connections"], node.programs.growing["connections"]
    retiring = (1).to_bytes(4, "little")
    outer.update(retiring, growing.map.fd.to_bytes(4, "little"))
    growing.exchange(growing.make(2 * growing.capacity)).close()
    assert node.run(packet, "up0")[1] == first
    node.programs.connections.maintain()
    assert outer.lookup(retiring) is None
    assert len(list(growing.map.keys())) == 2
    assert node.run(packet, "up0")[1] == first


def grow_older(node, seconds):
    table = node.programs.growing["connections"].map
    for key, value in list(table.items()):
        seen = struct.unpack_from("=I", value, 40)[0] - seconds
        table.update(key, value[:40] + struct.pack("=I", seen) + value[44:])


def test_a_question_and_its_answer_are_soon_forgotten_and_a_stream_is_not(node):
    """Every query of a resolver takes a port of the node's; there are not so many of them."""
    service(node, 4, Protocol.UDP, [REMOTE[4]])

    def exchange():
        question = packets.first(CLIENT[4], NODE[4], Protocol.UDP, (7000, 30080), 1)
        port = packets.parse(node.run(question, "up0")[1]).source_port
        node.run(packets.first(REMOTE[4], NODE[4], Protocol.UDP, (80, port), 2), "up0")
        grow_older(node, 40)

    exchange()
    assert node.programs.connections.expire().removed == 2
    exchange()
    exchange()
    assert node.programs.connections.expire().removed == 0
    grow_older(node, 90)
    assert node.programs.connections.expire().removed == 2


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
