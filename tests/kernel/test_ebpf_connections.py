"""When entries of the connection table end, and what takes their place."""

import struct

import pytest

from podwire.datapath.ebpf.layout import CONNECTION, FLOW, mapped
from podwire.net import Protocol, parse_address
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_node import CLIENT, service, whole_node
from tests.kernel.ebpf_runs import DROP, grow_older
from tests.kernel.ebpf_services import EXTERNAL, VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, OUTSIDE, POD, REMOTE

pytestmark = NEEDS_EBPF


@pytest.fixture(scope="module")
def node():
    with whole_node() as made:
        yield made


@pytest.fixture(autouse=True)
def afresh(node):
    node.programs.connections.clear()


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
    grow_older(node, 130)
    assert node.programs.connections.expire().removed == 2
