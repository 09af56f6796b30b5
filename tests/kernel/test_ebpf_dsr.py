"""Direct server return between two nodes: what the server sees, what the client gets, and what
happens when the option does not fit, comes from somebody else, or meets another connection.
"""

import contextlib
import os
import socket
import struct
import time

import pytest

from podwire.datapath.ebpf.balancing import Balancing
from podwire.datapath.ebpf.layout import CONNECTION
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel import ethtool
from podwire.net import Protocol, parse_address, parse_prefix
from podwire.services import (
    DetectLocal,
    Frontend,
    FrontendKind,
    NodeFacts,
    ProxyConfig,
    ServicePort,
    ServicePortName,
    backend,
)
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_nodes import CLIENT, MACS, NODES, POD, POD_CIDRS, VIP, Nodes, ask, fill_up
from tests.kernel.ebpf_runs import assert_sound, make_frame, run_tcx, run_xdp
from tests.kernel.ebpf_world import NEEDS_EBPF
from tests.service_objects import service_table

pytestmark = NEEDS_EBPF

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
DROP, REDIRECT, TX, XDP_DROP = 2, 7, 3, 1


def make_port(name, number, family, kind, *, here, backends=None, **fields):
    """A Service at node port 30000 + number and at the load balancer's address."""
    pod = backend(parse_address(POD[family]), 80)
    chosen = (pod,) if backends is None else backends
    return ServicePort(
        name=ServicePortName(
            "default", name, "", Protocol.TCP if kind == TCP else Protocol.UDP, family
        ),
        frontends=(
            Frontend(FrontendKind.NODE_PORT, b"", 30000 + number),
            Frontend(FrontendKind.LOAD_BALANCER, parse_address(VIP[family]), number),
        ),
        cluster=chosen,
        on_node=chosen if here else (),
        hosted=chosen if here else (),
        has_endpoints=True,
        **fields,
    )


def make_table(node, ports, more=()):
    prefixes = tuple(parse_prefix(cidr) for cidr in POD_CIDRS[node])
    config = ProxyConfig(detect_local=DetectLocal(prefixes=prefixes))
    texts = (*NODES[node].values(), *more)
    facts = NodeFacts(node, tuple(parse_address(text) for text in texts))
    return service_table(ports, facts, config)


BOTH = [(family, kind) for family in (4, 6) for kind in (TCP, UDP)]


def make_ports(here):
    dead = (backend(parse_address(POD[4]), 81),)
    return [
        *(make_port(f"web{kind}", 80, family, kind, here=here) for family, kind in BOTH),
        make_port("other", 90, 4, TCP, here=here),
        make_port("closed", 91, 4, UDP, here=here, backends=dead),
    ]


@pytest.fixture(scope="module", params=["tcx", "xdp"])
def world(request):
    """With the first node's program at tcx, or (in the stack, for tests) at the driver."""
    with Nodes() as made:
        made.a, made.b = made.start("a"), made.start("b")
        made.a.apply(make_table("a", make_ports(here=False)))
        made.b.apply(make_table("b", make_ports(here=True)))
        for family, kind in BOTH:
            made.serve("pod", POD[family], 80, kind)
        made.first_program = "from_network"
        if request.param == "xdp":
            made.first_program = "from_driver"
            made.a.programs.accelerate(made.ifindex("a", "up0"), generic=True)
            ethtool.offload_checksums("up0", False, made.spaces["client"])  # or tcx serves it
        yield made


@pytest.fixture(autouse=True)
def fresh(world):
    world.a.services.connections.clear()
    world.b.services.connections.clear()


def targets(family):
    return [(NODES["a"][family], 30080), (VIP[family], 80)]


@pytest.mark.parametrize(("family", "kind"), BOTH)
def test_the_server_sees_the_client_and_the_client_the_service(world, family, kind):
    for target in targets(family):
        with world.connect(*target, kind) as client:
            assert ask(client) == (CLIENT[family], 3)
            assert ask(client, b"x" * 1200)[0] == CLIENT[family]
    # answers do not pass the first node
    assert all(not state for key, state in states(world.a) if key == POD[family])


def states(node):
    """Source and state of all entries."""
    for key, value in node.programs.growing["connections"].map.items():
        source = key[12:16] if key[:12] == bytes(10) + b"\xff\xff" else key[:16]
        yield (
            socket.inet_ntop(socket.AF_INET if len(source) == 4 else socket.AF_INET6, source),
            CONNECTION.unpack(value)[3],
        )


@pytest.mark.parametrize("family", [4, 6])
def test_a_megabyte_both_ways(world, family):
    with world.connect(NODES["a"][family], 30080) as client:
        sent = 0
        while sent < 1 << 20:
            seen, size = ask(client, os.urandom(60000))
            assert seen == CLIENT[family]
            sent += size


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("size", [1472, 5000])
def test_datagrams_without_room_for_the_option_get_through(world, family, size):
    """As the first of their flow masqueraded, later as those before them."""
    size -= 20 if family == 6 else 0
    target = NODES["a"][family], 30080, UDP
    with world.connect(*target) as client:
        assert ask(client, os.urandom(size)) == (NODES["a"][family], size)
        assert ask(client) == (NODES["a"][family], 3)
    with world.connect(*target) as client:
        assert ask(client) == (CLIENT[family], 3)
        assert ask(client, os.urandom(size)) == (CLIENT[family], size)


def test_one_port_of_the_client_for_two_services_with_one_backend(world):
    """Their answers would be the same on the wire: the second connection is masqueraded."""
    with (
        world.connect(NODES["a"][4], 30080, source_port=47000) as first,
        world.connect(NODES["a"][4], 30090, source_port=47000) as second,
    ):
        assert ask(first) == (CLIENT[4], 3)
        assert ask(second) == (NODES["a"][4], 3)
        assert ask(first) == (CLIENT[4], 3)


def test_a_port_that_is_used_again_gets_a_new_connection(world):
    for _ in range(3):
        client = world.connect(NODES["a"][4], 30080, source_port=47001)
        assert ask(client) == (CLIENT[4], 3)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # with a reset


def test_the_clients_of_the_cluster_are_masqueraded(world):
    with world.connect(NODES["a"][4], 30080, space="b") as client:
        assert ask(client) == (NODES["a"][4], 3)


def test_a_udp_flow_leaves_a_backend_that_is_gone(world):
    world.serve("pod", POD[4], 82, UDP)
    nodes = {"a": world.a, "b": world.b}
    try:
        with world.connect(NODES["a"][4], 30092, UDP, source_port=47005) as client:
            for number in (80, 82):
                served = (backend(parse_address(POD[4]), number),)
                for name, node in nodes.items():
                    fields = {"here": name == "b", "backends": served, "serving": served}
                    port = make_port("moving", 92, 4, UDP, **fields)
                    node.apply(make_table(name, [*make_ports(name == "b"), port]))
                assert ask(client) == (CLIENT[4], 3)
                led = {to.destination_port for _, to in world.a.services.connections.items()}
                assert number in led
    finally:
        for name, node in nodes.items():
            node.apply(make_table(name, make_ports(name == "b")))


def test_an_address_that_other_nodes_do_not_know_is_masqueraded(world):
    second = "198.18.0.21"
    world.batch(world.spaces["a"], f"addr add {second}/24 dev up0")
    world.batch(world.spaces["client"], f"neigh add {second} lladdr {MACS['a']} dev up0")
    world.a.apply(make_table("a", make_ports(here=False), [second]))
    try:
        with world.connect(second, 30080) as client:
            assert ask(client) == (NODES["a"][4], 3)
    finally:
        world.a.apply(make_table("a", make_ports(here=False)))


def test_a_refusal_comes_back_under_the_services_address(world):
    with world.connect(NODES["a"][4], 30091, UDP) as client:
        client.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(10)


def test_a_connection_survives_that_its_first_node_forgets_it(world):
    with world.connect(NODES["a"][4], 30080) as client:
        assert ask(client) == (CLIENT[4], 3)
        world.a.services.connections.clear()
        assert ask(client, b"again") == (CLIENT[4], 5)


def age(node, seconds):
    """Make all entries last seen so long ago."""
    table = node.programs.growing["connections"].map
    for key, value in list(table.items()):
        to, _, *rest = CONNECTION.unpack(value)
        table.update(key, CONNECTION.pack(to, int(time.monotonic()) - seconds, *rest))


def entries(node, port):
    """How many the connection of this client's port has."""
    flows = (flow for flow, _ in node.services.connections.items())
    return sum(port in (flow.source_port, flow.destination_port) for flow in flows)


def test_silence_ends_no_open_connection_and_what_ended_goes_soon(world):
    port = 47004
    with world.connect(NODES["a"][4], 30080, source_port=port) as client:
        assert ask(client) == (CLIENT[4], 3)
        for node in (world.a, world.b):
            age(node, 3600)
            node.services.connections.expire()
            assert entries(node, port) == 2
        assert ask(client) == (CLIENT[4], 3)
    for node in (world.a, world.b):
        deadline = time.monotonic() + 10  # until the server has closed, too
        while entries(node, port) and time.monotonic() < deadline:
            time.sleep(0.01)
            age(node, 62)
            node.services.connections.expire()
        assert entries(node, port) == 0


@pytest.mark.parametrize("generic_xdp", [False, True])
def test_nodes_change_their_mode_one_by_one_and_no_connection_breaks(generic_xdp):
    with Nodes() as made, contextlib.ExitStack() as opened:
        nodes = {name: made.start(name, Balancing(mode="snat")) for name in NODES}
        if generic_xdp:
            nodes["a"].programs.accelerate(made.ifindex("a", "up0"), generic=True)
            ethtool.offload_checksums("up0", False, made.spaces["client"])
        for kind in (TCP, UDP):
            made.serve("pod", POD[4], 80, kind)
        modes = dict.fromkeys(NODES, "snat")
        open_ones = []
        for name, mode in (("", ""), ("a", "dsr"), ("b", "dsr"), ("a", "snat"), ("b", "snat")):
            modes[name] = mode
            for each, node in nodes.items():
                balancing = Balancing(mode=modes[each])
                part = ServicesPart(programs=node.programs, balancing=balancing)  # a new agent
                part.apply(make_table(each, make_ports(each == "b")))
            seen = CLIENT[4] if modes["a"] == "dsr" else NODES["a"][4]
            for kind in (TCP, UDP):
                client = opened.enter_context(made.connect(NODES["a"][4], 30080, kind))
                open_ones.append((client, seen))
            for client, server_sees in open_ones:
                assert ask(client) == (server_sees, 3)


# --- packets ----------------------------------------------------------------------------------


def run(world, node, packet, name="from_network"):
    """``(verdict, IP packet)`` of a packet that comes in from the network."""
    frame = make_frame(packet, (MACS[node], MACS["client"]))
    at = world.spaces[node], getattr(world, node).programs.program(name)
    if name == "from_driver":
        verdict, out = run_xdp(*at, world.ifindex(node, "up0"), frame)
        return verdict, out[14:]
    return run_tcx(*at, world.ifindex(node, "up0"), frame)


def with_option(packet, service, port):
    """The packet as another node would lead it here."""
    address = parse_address(service)
    if packet[0] >> 4 == 4:
        option = struct.pack(">BBH", 0x9A, 8, port) + address
        head = bytearray(packet[:20])
        head[0] = 0x47
        head[2:4] = struct.pack(">H", len(packet) + 8)
        head[10:12] = bytes(2)
        head[10:12] = struct.pack(">H", packets._checksum(bytes(head) + option))
        return bytes(head) + option + packet[20:]
    option = struct.pack(">BBBBHH", packet[6], 2, 0x1B, 20, port, 0) + address
    length = struct.unpack(">H", packet[4:6])[0] + 24
    return packet[:4] + struct.pack(">HB", length, 60) + packet[7:40] + option + packet[40:]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_the_option_on_the_wire(world, family, protocol):
    """What the first node sends is what this test would, and the other takes it off again."""
    sent = packets.first(CLIENT[family], NODES["a"][family], protocol, (5000, 30080), 1)
    verdict, led = run(world, "a", sent, world.first_program)
    plain = packets.first(CLIENT[family], POD[family], protocol, (5000, 80), 1)
    assert verdict == (TX if world.first_program == "from_driver" else REDIRECT)
    ttl = 8 if family == 4 else 7
    plain = plain[:ttl] + bytes([plain[ttl] - 1]) + plain[ttl + 1 :]
    wanted = with_option(plain, NODES["a"][family], 30080)
    assert _without_ip_checksum(led) == _without_ip_checksum(wanted)
    verdict, delivered = run(world, "b", led)
    assert verdict == REDIRECT
    assert_sound(delivered)
    wire = packets.parse(delivered)
    assert (wire.source, wire.destination) == (CLIENT[family], POD[family])
    assert (wire.source_port, wire.destination_port) == (5000, 80)


def test_an_error_about_an_answer_finds_the_backend(world):
    """A router tells the Service's address that an answer is too big: the pod must hear of it."""
    with world.connect(NODES["a"][4], 30080, source_port=47003) as client:
        assert ask(client) == (CLIENT[4], 3)
        quoted = packets.first(NODES["a"][4], CLIENT[4], Protocol.TCP, (30080, 47003), 1)[:28]
        body = struct.pack(">BBHHH", 3, 4, 0, 0, 1400) + quoted
        error = packets._ip("198.18.0.77", NODES["a"][4], Protocol.ICMP, body)
        verdict, told = run(world, "a", error)
        assert verdict == REDIRECT
        assert_sound(told)
        assert told[16:20] == parse_address(POD[4])
        inner = told[28:]
        assert inner[12:20] == parse_address(POD[4]) + parse_address(CLIENT[4])
        assert struct.unpack(">HH", inner[20:24]) == (80, 47003)


def _without_ip_checksum(packet):
    return packet[:10] + packet[12:] if packet[0] >> 4 == 4 else packet


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_full_table_refuses_what_is_new_on_either_node(world, name):
    sent = packets.first(CLIENT[4], NODES["a"][4], Protocol.TCP, (5003, 30080), 1)
    first = world.first_program
    led = run(world, "a", sent, first)[1]
    packet = (sent, first) if name == "a" else (led, "from_network")
    node = getattr(world, name)
    node.services.connections.clear()
    fill_up(node.programs)
    before = node.outcomes()["connections_full"]
    assert run(world, name, *packet)[0] == (XDP_DROP if packet[1] == "from_driver" else DROP)
    assert node.outcomes()["connections_full"] == before + 1
    node.services.connections.clear()
    assert run(world, name, *packet)[0] in (REDIRECT, TX)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    "forged",
    [
        lambda f: (NODES["a"][f], 30099),  # no such Service
        lambda f: (CLIENT[f], 30080),  # a node port, but no node
        lambda f: (POD[f], 30080),
        lambda f: (NODES["a"][f], 30091),  # leads to another port, or is not there
    ],
)
def test_an_option_that_names_no_service_with_this_backend_is_dropped(world, family, forged):
    plain = packets.first(CLIENT[family], POD[family], Protocol.TCP, (5001, 80), 1)
    before = world.b.outcomes()["led_astray"]
    verdict, _ = run(world, "b", with_option(plain, *forged(family)))
    assert verdict == DROP
    assert world.b.outcomes()["led_astray"] == before + 1


def test_no_member_of_the_cluster_is_believed(world):
    for source in (NODES["a"][4], "10.244.1.9"):
        plain = packets.first(source, POD[4], Protocol.TCP, (5002, 80), 1)
        verdict, _ = run(world, "b", with_option(plain, NODES["a"][4], 30080))
        assert verdict == DROP


def test_an_option_does_not_take_over_a_connection(world):
    with contextlib.closing(world.connect(POD[4], 80, source_port=47002)) as direct:
        assert ask(direct) == (CLIENT[4], 3)
        plain = packets.first(CLIENT[4], POD[4], Protocol.TCP, (47002, 80), 1)
        verdict, _ = run(world, "b", with_option(plain, NODES["a"][4], 30080))
        assert verdict == DROP
        assert ask(direct) == (CLIENT[4], 3)
