"""Random tables and packets: what the programs do by test run is what the evaluators say."""

import random

import pytest

from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.net import Protocol, format_address, parse_address
from podwire.policy import Packet as PolicyPacket
from podwire.policy import PolicyCompiler, Verdict
from podwire.services import backend
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_draws import (
    BACKENDS,
    CLIENTS,
    NUMBERS,
    PROTOCOLS,
    SECOND,
    SEEDS,
    draw_cluster,
    draw_packet,
    draw_ports,
    draw_table,
)
from tests.kernel.ebpf_runs import DROP, ENDS, REDIRECT, assert_sound, make_frame, run_tcx
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, OUTSIDE, POD, REMOTE, World

pytestmark = NEEDS_EBPF


@pytest.fixture(scope="module")
def services():
    with World() as made:
        for family, length in ((4, 32), (6, 128)):
            flags = " nodad" * (family == 6)
            made.batch(made.spaces["node"], f"addr add {SECOND[family]}/{length} dev lo{flags}")
        programs = Programs(made.name, made.spaces["node"], connections=65536)
        made.part = ServicesPart(programs=programs)
        made.part.start()
        made.programs = programs
        yield made
        made.part.cleanup()


def run(world, packet, link):
    """``(verdict, IP packet)``; link "" is a process of the node."""
    name = {"pod": "from_pod", "": "from_node"}.get(link[:3], "from_network")
    return run_tcx(
        world.spaces["node"],
        world.programs.program(name),
        world.ifindex(link or "up0"),
        make_frame(packet, ENDS[link or "up0"]),
    )


def check(world, table, link, packet, seed):
    found = table.resolve(packet)
    source, target = format_address(packet.source), format_address(packet.destination)
    ports = (seed % 20000 + 5000, packet.destination_port)
    sent = packets.first(source, target, packet.protocol, ports, seed % 1000000)
    verdict, out = run(world, sent, link)
    story = (link, source, target, packet.protocol.name, packet.destination_port, found, verdict)
    wire = packets.parse(out)
    if found.verdict == "drop":
        assert verdict == DROP, story
    elif found.verdict == "reject":
        assert verdict == REDIRECT, story
        assert wire.is_error, story
        assert (wire.source, wire.destination) == (target, source), story
        assert_sound(out)
    elif found.verdict == "accept":
        assert verdict != DROP, story
        assert out == sent, story
    else:
        reached = backend(parse_address(wire.destination), wire.destination_port)
        assert verdict != DROP, story
        assert reached in found.backends, (story, wire)
        own = {*NODE.values(), *SECOND.values(), "127.0.0.1", "::1"}
        if found.masquerades(reached):
            assert wire.source in own, (story, wire)
        else:
            assert wire.source == source or (source in own and wire.source in own), (story, wire)
        assert_sound(out)


@pytest.mark.parametrize("seed", SEEDS)
def test_services_are_what_the_evaluator_says(services, seed):
    draw = random.Random(seed)
    table = draw_table(draw, draw_ports(draw))
    services.part.apply(table)
    services.programs.connections.clear()
    affinities = services.programs.maps["affinities"]
    affinities.delete_batch([key for key, _ in affinities.items()])
    for n in range(40):
        link, packet = draw_packet(draw, table, draw.choice((4, 6)))
        check(services, table, link, packet, seed * 100 + n)


@pytest.fixture(scope="module")
def policies():
    with World() as made:
        made.programs = Programs(made.name, made.spaces["node"], connections=65536)
        made.part = PolicyPart(programs=made.programs)
        made.part.start()
        yield made
        made.part.cleanup()


def judged(table, packet, link):
    """What this node enforces of the evaluator's judgement."""
    found = table.judge(packet)
    ends = []
    if link.startswith("pod"):
        ends.append(found.egress)
    if format_address(packet.destination) in (*POD[1].values(), *POD[2].values()):
        ends.append(found.ingress)
    return all(end.verdict is not Verdict.DENY for end in ends), found


@pytest.mark.parametrize("seed", SEEDS)
def test_policies_are_what_the_evaluator_says(policies, seed):
    draw = random.Random(seed)
    table = draw_cluster(draw, PolicyCompiler("node"))
    policies.part.apply(table)
    policies.programs.connections.clear()
    for n in range(60):
        family = draw.choice((4, 6))
        link = draw.choice(("pod1", "pod2", "up0", ""))
        source = {"pod1": POD[1], "pod2": POD[2], "": NODE}.get(link, {}).get(family)
        source = source or draw.choice([REMOTE[family], OUTSIDE[family], CLIENTS[family][-1]])
        target = draw.choice([a for a in (*BACKENDS[family], CLIENTS[family][-1]) if a != source])
        if link == "up0":
            target = draw.choice((POD[1][family], POD[2][family]))
        icmp = Protocol.ICMP if family == 4 else Protocol.ICMPV6
        protocol = draw.choice([*PROTOCOLS, icmp])
        number = draw.choice((1, 79, *NUMBERS, 30081, 65535)) if protocol != icmp else 0
        packet = PolicyPacket(
            parse_address(source),
            parse_address(target),
            protocol,
            number,
            {Protocol.ICMP: 8, Protocol.ICMPV6: 128}.get(protocol),
            source_node=None if link else "node",
        )
        allowed, why = judged(table, packet, link)
        ports = (seed * 100 + n) % 20000 + 5000, number
        verdict, _ = run(policies, packets.first(source, target, protocol, ports, n), link)
        assert (verdict != DROP) == allowed, (link, source, target, protocol.name, number, why)
