"""Maglev in the kernel: where a client goes follows from the client and the backends alone."""

from array import array
from contextlib import closing

import pytest

from podwire.datapath.ebpf import maglev
from podwire.datapath.ebpf.balancing import Balancing
from podwire.datapath.ebpf.layout import mapped
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.datapath.ebpf.spelling import table_room
from podwire.net import Protocol, parse_address
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_runs import run
from tests.kernel.ebpf_services import EXTERNAL, VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, POD, World

pytestmark = NEEDS_EBPF

CLIENT = {4: "198.51.100.9", 6: "fd51::9"}
SIZE = 1021
BACKENDS = {
    4: [f"10.244.0.{n}" for n in range(100, 110)],
    6: [f"fd44::{n}" for n in range(100, 110)],
}


@pytest.fixture(scope="module")
def world():
    with World() as made, closing(Programs(made.name, made.spaces["node"])) as programs:
        made.programs = programs
        made.part = ServicesPart(programs=programs, balancing=Balancing("maglev", SIZE))
        made.part.start()
        yield made


def mix(value):
    value = (value ^ value >> 32) * 0xD6E8FEB86659FD93 % (1 << 64)
    return value ^ value >> 32


def client_hash(source, source_port, port, protocol):
    """As in bpf/service.h, where fields in network order are read as the machine's numbers."""
    packed = mapped(parse_address(source))
    halves = [int.from_bytes(packed[at : at + 8], "little") for at in (0, 8)]
    source_port, port = (
        int.from_bytes(n.to_bytes(2, "big"), "little") for n in (source_port, port)
    )
    hash = mix(mix(halves[0]) ^ halves[1]) ^ port << 16 ^ protocol << 32
    return mix(hash ^ source_port) & 0xFFFFFFFF


def expected(port, family, source_port, number):
    table = array("H", maglev.table(port.cluster, SIZE))
    hash = client_hash(CLIENT[family], source_port, number, Protocol.TCP)
    return port.cluster[table[hash % SIZE]][:-2]


def chosen(world, family, target, number, source_ports, link="up0", source=CLIENT):
    out = []
    for source_port in source_ports:
        packet = packets.first(source[family], target, Protocol.TCP, (source_port, number), 1)
        out.append(parse_address(packets.parse(run(world, packet, link)[1]).destination))
    return out


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("target", [NODE, EXTERNAL])
def test_the_table_decides_for_clients_outside(world, family, target):
    port = make_port("web", 80, BACKENDS[family], family=family, protocol=Protocol.TCP)
    world.part.apply(make_table([port]))
    world.part.connections.clear()
    number = 30080 if target is NODE else 80
    ports = range(20000, 20060)
    wanted = [expected(port, family, each, number) for each in ports]
    assert len(set(wanted)) > 5
    assert chosen(world, family, target[family], number, ports) == wanted


def test_pods_choose_at_random(world):
    world.part.apply(
        make_table([make_port("web", 80, BACKENDS[4], family=4, protocol=Protocol.TCP)])
    )
    seen = set()
    for _ in range(2):
        world.part.connections.clear()
        seen.add(tuple(chosen(world, 4, VIP[4], 80, range(20000, 20020), "pod1", POD[1])))
    assert len(seen) == 2


def test_a_list_that_changes_gets_a_new_table_and_gives_the_old_one_back(world):
    ports = range(21000, 21100)
    world.part.flush()
    before = world.part._tables.top
    for backends in (BACKENDS[4], BACKENDS[4][:-1], BACKENDS[4], BACKENDS[4][1:]):
        port = make_port("web", 80, backends, family=4, protocol=Protocol.TCP)
        world.part.apply(make_table([port]))
        world.part.connections.clear()
        wanted = [expected(port, 4, each, 30080) for each in ports]
        assert chosen(world, 4, NODE[4], 30080, ports) == wanted
        world.part.flush()
    room = table_room(next(iter(world.part._leases.values())).maglev).size
    assert world.part._tables.top <= before + 2 * room


def test_a_new_process_keeps_tables_and_takes_another_algorithm(world):
    port = make_port("web", 80, BACKENDS[4], family=4, protocol=Protocol.TCP)
    table = make_table([port])
    world.part.apply(table)
    held = world.part._leases[port.name].maglev
    for balancing, wanted in ((Balancing("maglev", SIZE), held), (Balancing(), (0, 0))):
        with closing(Programs(world.name, world.spaces["node"])) as programs:
            part = ServicesPart(programs=programs, balancing=balancing)
            part.start()
            part.apply(table)
            assert part._leases[port.name].maglev == wanted


def test_affinity_goes_by_the_clients_address_alone(world):
    port = make_port(
        "web", 80, BACKENDS[4], family=4, protocol=Protocol.TCP, affinity_timeout_s=100
    )
    world.part.apply(make_table([port]))
    world.part.connections.clear()
    assert len(set(chosen(world, 4, NODE[4], 30080, range(22000, 22020)))) == 1
