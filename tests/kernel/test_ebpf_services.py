"""Services on eBPF with real sockets: what is seen is what the table's evaluator says."""

import socket
import time

import pytest

from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel import netns
from podwire.net import Protocol, format_address, parse_address, parse_prefix
from podwire.services import (
    Packet,
    backend_address,
)
from tests.kernel.ebpf_services import EXTERNAL, KINDS, VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, OUTSIDE, POD, REMOTE, World

pytestmark = NEEDS_EBPF


def make_ports(family, protocol):
    both = {"family": family, "protocol": protocol}
    here, other, far = POD[1][family], POD[2][family], REMOTE[family]
    narrow = (parse_prefix("198.51.100.0/24"), parse_prefix("fd51::/64"))
    return [
        make_port("three", 80, [here, other, far], **both),
        make_port("self", 81, [here], **both),
        make_port("none", 82, [], **both),
        make_port("host", 83, [NODE[family]], **both),
        make_port("local", 84, [here, far], local=[here], external_local=True, **both),
        make_port("remote-only", 85, [far], external_local=True, internal_local=True, **both),
        make_port("guarded", 86, [here], source_ranges=narrow, **both),
    ]


@pytest.fixture(scope="module")
def world():
    with World() as made:
        programs = Programs(made.name, made.spaces["node"])
        part = ServicesPart(programs=programs)
        netns.call(made.spaces["node"], part.start)
        made.part, made.programs = part, programs
        made.apply = lambda table: netns.call(made.spaces["node"], lambda: part.apply(table))
        for family in (4, 6):
            for kind in KINDS.values():
                for space, addresses in (
                    ("pod1", POD[1]),
                    ("pod2", POD[2]),
                    ("outside", REMOTE),
                    ("node", NODE),
                ):
                    made.serve(space, addresses[family], 80, kind)
        yield made
        programs.close()


SOURCES = {"pod1": POD[1], "node": NODE, "outside": OUTSIDE}


def expected(table, source, target, number, protocol):
    packet = Packet(parse_address(source), parse_address(target), protocol, number)
    found = table.resolve(packet)
    if found.verdict != "dnat":
        return {"drop": {"silence"}, "reject": {"refused"}}[found.verdict]
    family = 6 if ":" in source else 4
    return {
        (
            format_address(backend_address(b)),
            NODE[family]
            if found.masquerades(b) and format_address(b[:-2]) != NODE[family]
            else source,
        )
        for b in found.backends
    }


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", list(KINDS))
def test_every_kind_of_service_from_everywhere(world, family, protocol):
    table = make_table(make_ports(family, protocol))
    world.apply(table)
    kind = KINDS[protocol]
    for space, addresses in SOURCES.items():
        source = addresses[family]
        targets = [(VIP[family], n) for n in (*range(80, 87), 99)]
        targets += [(NODE[family], 30000 + n) for n in (80, 82, 84, 85, 86)]
        targets += [(EXTERNAL[family], n) for n in (80, 82, 85, 86)]
        for target, number in targets:
            wanted = expected(table, source, target, number, protocol)
            tries = 24 if len(wanted) > 1 else 1
            wait = 0.1 if wanted == {"silence"} else 3
            seen = world.observe(space, target, number, kind, tries=tries, timeout=wait)
            assert seen == wanted, (space, target, number)


def test_affinity_follows_the_client_until_its_backend_goes(world):
    pods = [POD[1][4], POD[2][4]]
    both = {"family": 4, "protocol": Protocol.TCP, "affinity_timeout_s": 100}
    world.apply(make_table([make_port("sticky", 90, [*pods, REMOTE[4]], **both)]))
    first = world.observe("outside", VIP[4], 90, tries=10)
    assert len(first) == 1
    remaining = [p for p in (*pods, REMOTE[4]) if p != next(iter(first))[0]]
    world.apply(make_table([make_port("sticky", 90, remaining, **both)]))
    second = world.observe("outside", VIP[4], 90, tries=10)
    assert len(second) == 1
    assert second.isdisjoint(first)


def test_a_udp_flow_leaves_a_backend_that_is_gone(world):
    both = {"family": 4, "protocol": Protocol.UDP}
    world.apply(make_table([make_port("dns", 91, [POD[1][4]], **both)]))
    source = (POD[2][4], 45555)
    assert world.ask("pod2", VIP[4], 91, socket.SOCK_DGRAM, source=source)[0] == POD[1][4]
    world.apply(make_table([make_port("dns", 91, [REMOTE[4]], **both)]))
    assert world.ask("pod2", VIP[4], 91, socket.SOCK_DGRAM, source=source)[0] == REMOTE[4]


def test_a_tcp_connection_stays_when_its_backend_leaves_the_list(world):
    both = {"family": 4, "protocol": Protocol.TCP}
    world.apply(make_table([make_port("web", 92, [POD[1][4]], **both)]))
    with netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(3)
        client.connect((VIP[4], 92))
        world.apply(make_table([make_port("web", 92, [], **both)]))
        client.send(b"who")
        assert client.recv(100).decode().split()[0] == POD[1][4]


def test_a_new_process_takes_over_and_the_maps_grow(world):
    both = {"family": 4, "protocol": Protocol.TCP, "external": False}
    ports = [make_port(f"s{n}", n + 1, [POD[1][4], REMOTE[4]], **both) for n in range(3000)]
    table = make_table(ports)
    with netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(3)
        world.apply(make_table(ports[:1]))
        client.connect((VIP[4], 1))
        world.apply(table)
        second = Programs(world.name)
        part = ServicesPart(programs=second)

        def take_over():
            part.start()
            before = second.growing["frontends"].read()
            part.apply(table)
            assert second.growing["frontends"].read() == before
            assert part.verify() == []

        netns.call(world.spaces["node"], take_over)
        client.send(b"who")
        assert client.recv(100).decode().split()[0] in (POD[1][4], REMOTE[4])
        assert world.observe("pod2", VIP[4], 3000, tries=2) <= {
            (POD[1][4], POD[2][4]),
            (REMOTE[4], POD[2][4]),
        }
        second.close()


def test_verify_repairs_what_others_broke(world):
    table = make_table(make_ports(4, Protocol.TCP))
    world.apply(table)
    growing = world.part._programs.growing["frontends"]
    key = next(growing.map.keys())
    growing.map.delete(key)
    assert netns.call(world.spaces["node"], world.part.verify) == ["1 entries of map frontends"]
    assert growing.map.lookup(key)


def test_one_port_to_the_service_and_to_its_backend_at_once(world):
    """Both connections have the same answers on the wire; neither may take the other's."""
    both = {"family": 4, "protocol": Protocol.TCP}
    world.apply(make_table([make_port("web", 93, [POD[1][4]], **both)]))
    clients = []
    for target in ((VIP[4], 93), (POD[1][4], 80)):
        client = netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_STREAM)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.settimeout(3)
        client.bind((POD[2][4], 46000))
        client.connect(target)
        clients.append(client)
    for client in clients:
        client.send(b"who")
        assert client.recv(100).decode().split()[0] == POD[1][4]
        client.close()


def test_an_interface_that_comes_later_is_taken_in(world):
    node = world.spaces["node"]
    world.batch(node, "link add late0 type veth peer name late1")
    index = world.ifindex("late0")
    deadline = time.monotonic() + 10
    wanted = f"from_network-{index}-ingress"
    while wanted not in world.programs.attachments() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wanted in world.programs.attachments()
    world.batch(node, "link del late0")
    while wanted in world.programs.attachments() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wanted not in world.programs.attachments()


def connections(part, port):
    """New connections by frontend, as `podwire services show` has them."""
    return [seen for _, seen in part.counts(port).frontends.values()]


def test_every_frontend_counts_its_connections_also_over_a_restart(world):
    both = {"family": 4, "protocol": Protocol.TCP}
    port = make_port("counted", 91, [POD[1][4], POD[2][4]], **both)
    empty = make_port("empty", 92, [], **both)
    world.apply(make_table([port, empty]))
    for _ in range(5):
        world.ask("pod1", VIP[4], 91)
    world.ask("outside", NODE[4], 30091)
    world.ask("outside", EXTERNAL[4], 91)
    assert world.observe("pod1", VIP[4], 92, tries=1) == {"refused"}
    assert connections(world.part, port) == [5, 1, 1]
    by_backend = world.part.counts(port).backends
    assert list(by_backend) == list(port.cluster)
    assert sum(by_backend.values()) == 7
    assert connections(world.part, empty) == [1, 0, 0]
    element, _ = world.part.counts(port).frontends[port.frontends[0]]
    assert element.startswith("map frontends (service ")
    assert "cluster backends in slots " in element
    assert "no cluster backends" in world.part.counts(empty).frontends[empty.frontends[0]][0]

    programs = Programs(world.name, world.spaces["node"])
    later = ServicesPart(programs=programs)
    netns.call(world.spaces["node"], later.start)
    netns.call(world.spaces["node"], lambda: later.apply(make_table([port])))
    assert connections(later, port) == [5, 1, 1]
    assert later.counts(port).backends == by_backend
    one = make_port("counted", 91, [POD[1][4]], **both)
    netns.call(world.spaces["node"], lambda: later.apply(make_table([one])))
    assert later.counts(one).backends == {one.cluster[0]: by_backend[one.cluster[0]]}
    assert len(list(programs.maps["hits"].items())) == 4, "one of the backends is gone"
    netns.call(world.spaces["node"], lambda: later.apply(make_table([])))
    assert list(programs.maps["hits"].items()) == []
    programs.close()
    world.part._start_over()
    world.apply(make_table([]))


@pytest.mark.parametrize("protocol", list(KINDS))
def test_ip_options_make_no_difference(world, protocol):
    """From real senders, who leave the checksum to the card."""
    world.apply(make_table(make_ports(4, protocol)))
    for space in ("outside", "pod1"):
        assert ask_with_options(world, space, 30080, KINDS[protocol])
        with pytest.raises(ConnectionRefusedError):
            ask_with_options(world, space, 30082, KINDS[protocol])


def ask_with_options(world, space, port, kind):
    with netns.socket(world.spaces[space], socket.AF_INET, kind) as client:
        client.settimeout(3)
        client.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\1" * 12)
        client.connect((NODE[4], port))
        client.send(b"who")
        return client.recv(100)
