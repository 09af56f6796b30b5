"""Random connections that are open at once: each packet, there and back, finds its own.

Few ports and few backends, so that connections collide once they are translated.
"""

import random

import pytest

from podwire.net import Protocol, format_address
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_draws import (
    CLIENTS,
    EXTERNAL,
    LOOPBACK,
    PROTOCOLS,
    SECOND,
    SEEDS,
    VIPS,
    draw_packet,
    draw_ports,
    draw_table,
)
from tests.kernel.ebpf_node import whole_node
from tests.kernel.ebpf_runs import DROP, assert_sound
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, POD

pytestmark = NEEDS_EBPF

LOCAL = {*POD[1].values(), *POD[2].values()}
OWN = {*NODE.values(), *SECOND.values(), *LOOPBACK.values()}


@pytest.fixture(scope="module")
def node():
    with whole_node() as made:
        yield made


def link_of(address):
    """Where what `address` sends comes in."""
    for number in (1, 2):
        if address in POD[number].values():
            return f"pod{number}"
    return "" if address in OWN else "up0"


def make_packet(ends, protocol, number, first):
    """Of a connection from (address, port) to (address, port)."""
    (source, source_port), (target, target_port) = ends
    ports = (source_port, target_port)
    if protocol == Protocol.TCP and not first:
        tag = packets.marker(number)
        return packets.tcp(source, target, ports, packets.ACK, number, number, tag)
    return packets.first(source, target, protocol, ports, number)


def ends_of(wire):
    return (wire.source, wire.source_port), (wire.destination, wire.destination_port)


def draw_connection(draw, table):
    """``(link, protocol, ends)`` as a client begins it, or None: nobody would."""
    family = draw.choice((4, 6))
    link, packet = draw_packet(draw, table, family)
    source, target = format_address(packet.source), format_address(packet.destination)
    if link.startswith("pod"):
        source = POD[int(link[3:])][family]
    elif link and source in LOCAL | OWN:
        source = CLIENTS[family][-1]
    transit = target not in (*VIPS[family], *EXTERNAL[family]) and link_of(target) == link
    if packet.protocol not in PROTOCOLS or source == target or transit:
        return None
    if source == LOOPBACK[family]:
        return None
    return (
        link,
        packet.protocol,
        ((source, 5000 + draw.randrange(3)), (target, packet.destination_port)),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_packets_of_open_connections_find_their_way(node, seed):
    draw = random.Random(seed)
    table = draw_table(draw, draw_ports(draw))
    node.services.apply(table)
    node.programs.connections.clear()
    translated = {}
    for number in range(100):
        if translated and draw.random() < 0.6:
            link, protocol, ends = connection = draw.choice(list(translated))
            client, server = translated[connection]
            there, back = (ends, (client, server)), ((server, client), (ends[1], ends[0]))
            sent, wanted = draw.choice((there, back))
            come_in = link if sent is ends else link_of(server[0])
            verdict, out = node.run(make_packet(sent, protocol, number, False), come_in)
            assert verdict != DROP, (connection, wanted)
            assert ends_of(packets.parse(out)) == wanted, connection
            assert_sound(out)
            continue
        connection = draw_connection(draw, table)
        if connection is None or connection in translated:
            continue
        link, protocol, ends = connection
        verdict, out = node.run(make_packet(ends, protocol, number, True), link)
        wire = packets.parse(out)
        to_itself = not link and wire.destination in OWN
        if verdict != DROP and not wire.is_error and not to_itself:
            translated[connection] = ends_of(wire)
