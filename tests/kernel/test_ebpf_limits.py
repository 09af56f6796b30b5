"""Maps of the eBPF data path driven to full: told before, named when, and traffic goes on."""

import asyncio
import socket

import pytest

from podwire.agent.ebpf_metrics import MapWatch
from podwire.agent.metrics import Metrics
from podwire.conntrack.ebpf import EbpfSource
from podwire.conntrack.inspector import PRESSURE
from podwire.datapath.ebpf.fill import Pressure, measure
from podwire.datapath.ebpf.layout import MEMBER_KEY, mapped
from podwire.datapath.ebpf.pods import EbpfPods
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.errors import KernelError
from podwire.net import Protocol, parse_address
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_node import whole_node
from tests.kernel.ebpf_nodes import fill_up
from tests.kernel.ebpf_policies import CLOSED, Node1, policy
from tests.kernel.ebpf_runs import DROP, REDIRECT, grow_older, run
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, OUTSIDE, POD, REMOTE, World

pytestmark = NEEDS_EBPF

ROOM = {
    "endpoints": 5, "affinities": 10, "connections": 128, "rulings": 4, "doomed": 2, "prefixes": 8,
}  # fmt: skip


@pytest.fixture
def world():
    with World() as made:
        space = made.spaces["node"]
        made.programs = Programs(made.name, space, connections=64, room=ROOM)
        made.part = ServicesPart(programs=made.programs)
        made.part.start()
        made.programs._housekeeping.stop()  # tests do it when it is time
        made.full = lambda: Pressure().see(measure(made.programs))
        yield made
        made.programs.close()


def ask(world, client, number):
    """The verdict on the first packet of a client of the Service."""
    packet = packets.first(client, VIP[4], Protocol.UDP, (2000 + number, 80), number)
    return run(world, packet, "up0")[0]


def test_a_pod_too_many_is_refused_by_name_and_the_others_go_on(world):
    pods = EbpfPods(world.programs)
    pods.start()
    world.serve("pod1", POD[1][4], 80)
    pods.add(world.pod_link(1))
    assert world.full() == []
    many = world.pod_link(2, "10.244.0.8", "10.244.0.9")
    with pytest.raises(KernelError, match="map endpoints is full: it has room for 5 entries"):
        pods.add(many)
    before = len(list(world.programs.maps["endpoints"].items()))
    assert before == 2, "nothing of the pod is left"
    pods.add(world.pod_link(2))
    (fill,) = world.full()
    assert str(fill) == "eBPF map endpoints is 80% full (4 of 5): pods beyond it cannot be added"
    assert world.ask("pod2", POD[1][4], 80)[0] == POD[1][4]
    pods.replace([many, world.pod_link(1)])
    assert world.ask("node", POD[1][4], 80)[0] == POD[1][4]


async def _until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


def test_the_agent_tells_of_it_in_status_log_and_metrics(world, caplog):
    class Agent:
        metrics = Metrics()

    watch, pods = MapWatch(world.programs), EbpfPods(world.programs)
    pods.start()
    pods.add(world.pod_link(1, "10.244.0.8", "10.244.0.9"))

    async def run():
        task = asyncio.create_task(watch.run(Agent))
        try:
            await _until(watch.reasons)
        finally:
            task.cancel()

    with caplog.at_level("WARNING"):
        asyncio.run(run())
    sentence = "eBPF map endpoints is 80% full (4 of 5): pods beyond it cannot be added"
    assert watch.reasons() == [sentence]
    assert [record.map for record in caplog.records] == ["endpoints"]
    lines = Agent.metrics.text().decode().splitlines()
    assert 'podwire_bpf_map_fill{map="endpoints"} 0.8' in lines
    assert 'podwire_bpf_map_entries{map="endpoints"} 4.0' in lines


def test_affinities_beyond_the_limit_are_told_and_balanced_all_the_same(world):
    both = {"family": 4, "protocol": Protocol.UDP}
    port = make_port("sticky", 80, [POD[1][4], REMOTE[4]], affinity_timeout_s=100, **both)
    world.part.apply(make_table([port]))
    told = []
    for number in range(20):
        world.programs.connections.expire()
        told.append([fill.name for fill in world.full()])
        assert ask(world, f"198.51.100.{number}", 0) == REDIRECT
    assert [bool(names) for names in told] == [False] * 8 + [True] * 12
    assert told[-1] == ["affinities"]
    assert world.programs.outcomes()["affinity_full"] == 10


def test_the_connection_table_is_told_before_it_is_full_and_drops_only_what_is_new(world):
    both = {"family": 4, "protocol": Protocol.UDP}
    world.part.apply(make_table([make_port("dns", 80, [POD[1][4], REMOTE[4]], **both)]))
    source = EbpfSource(world.programs)
    told = 0
    for number in range(64):
        grow_older(world, 0)
        world.programs.connections.maintain()
        usage = source.usage()
        assert usage.limit == 64
        told += usage.used >= PRESSURE * usage.limit
        assert ask(world, "198.51.100.1", number) == REDIRECT
    assert told == 64 - 52
    assert [fill.name for fill in world.full()] == ["connections"]
    assert ask(world, "198.51.100.1", 64) == DROP
    assert ask(world, "198.51.100.1", 63) == REDIRECT
    assert world.programs.outcomes()["connections_full"] == 1


def test_a_full_table_forgets_first_what_is_silent_and_over(world):
    """Never what is young; an open connection only after hours of silence."""
    ports = [
        make_port("dns", 80, [REMOTE[4]], family=4, protocol=protocol)
        for protocol in (Protocol.UDP, Protocol.TCP)
    ]
    world.part.apply(make_table(ports))
    open_flow = shake_hands(world)
    world.programs.connections.grow(128)
    for number in range(63):
        assert ask(world, "198.51.100.1", number) == REDIRECT
    assert ask(world, "198.51.100.1", 63) == DROP
    grow_older(world, 0)
    world.programs.connections.maintain()
    assert ask(world, "198.51.100.1", 63) == DROP, "all that is there is young"
    assert world.programs.connections.filling
    grow_older(world, 5)
    world.programs.connections.maintain()
    assert ask(world, "198.51.100.1", 63) == REDIRECT
    lost = EbpfSource(world.programs).statistics()
    assert lost == {"connections_full": 2, "ports_exhausted": 0, "early_drop": 63}
    assert open_flow in [flow for flow, _ in world.programs.connections.items()]


def shake_hands(world):
    """An open TCP connection through the Service, by its first flow."""
    ports = (1999, 80)
    flags = (packets.SYN, packets.ACK)
    for number, flag in enumerate(flags):
        packet = packets.tcp("198.51.100.1", VIP[4], ports, flag, number, 1, b"PW000001")
        verdict, sent = run(world, packet, "up0")
        assert verdict == REDIRECT
        wire = packets.parse(sent)
        answer = packets.tcp(
            wire.destination,
            wire.source,
            (wire.destination_port, wire.source_port),
            packets.SYN | packets.ACK,
            1,
            number,
            b"PW000002",
        )
        run(world, answer, "up0")
    ((flow, _),) = [
        each for each in world.programs.connections.items() if each[0].source_port == 1999
    ]
    return flow


@pytest.fixture(scope="module")
def node():
    with whole_node() as made:
        yield made


def begin_by_masquerade(node):
    return packets.first(POD[1][4], OUTSIDE[4], Protocol.UDP, (2000, 53), 1)


def begin_under_policy(node):
    node.enforce({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]})
    return packets.first(POD[1][6], REMOTE[6], Protocol.TCP, (2000, 80), 1)


def begin_to_a_service(node):
    node.serve(make_port("web", 80, [POD[2][4]], family=4, protocol=Protocol.TCP))
    return packets.first(POD[1][4], VIP[4], Protocol.TCP, (2000, 80), 1)


@pytest.mark.parametrize("begin", [begin_by_masquerade, begin_under_policy, begin_to_a_service])
def test_every_kind_of_connection_is_refused_by_a_full_table(node, begin):
    """Direct server return and XDP: test_ebpf_dsr.py."""
    packet = begin(node)
    fill_up(node.programs)
    before = node.count("connections_full")
    assert node.run(packet)[0] == DROP
    assert node.count("connections_full") == before + 1
    node.programs.connections.clear()
    assert node.run(packet)[0] != DROP


def test_policies_that_cannot_be_counted_are_enforced(world):
    node = Node1(world, world.programs)
    world.serve("pod1", POD[1][4], 80)
    ports = [80, 81, 82, 83, 84]
    rules = [
        policy(f"p{port}", {**CLOSED, "ingress": [{"ports": [{"port": port}]}]}) for port in ports
    ]
    node.enforce(*rules[:1])
    assert world.full() == []
    node.enforce(*rules)
    (fill,) = world.full()
    assert (fill.name, fill.held, fill.room) == ("rulings", 7, 4)
    assert world.ask("pod2", POD[1][4], 80)[0] == POD[1][4]
    assert world.observe("pod2", POD[1][4], 85, tries=1, timeout=0.1) == {"silence"}
    node.enforce(policy("other", CLOSED))
    assert world.observe("pod2", POD[1][4], 80, tries=1, timeout=0.1) == {"silence"}
    assert node.counts() == {("deny", "ingress", "other"): 1}, "freed room is used again"
    node.reader.close()


def test_more_backends_may_leave_at_once_than_the_map_of_the_doomed_holds(world):
    backends = [f"10.244.0.{n}" for n in range(10, 15)]
    port = make_port("dns", 80, backends, family=4, protocol=Protocol.UDP)
    world.part.apply(make_table([port]))
    for number in range(30):
        ask(world, "198.51.100.1", number)
    assert len(list(world.programs.connections.items())) == 60
    service = world.part._leases[port.name].service
    keys = [
        MEMBER_KEY.pack(mapped(parse_address(b)), service, (80).to_bytes(2, "big"), 0)
        for b in backends
    ]
    assert world.programs.connections.forget(keys).removed == 60
    assert list(world.programs.maps["doomed"].items()) == []


def test_a_table_that_the_kernel_refused_is_written_whole_the_next_time(world):
    world.serve("pod1", POD[1][4], 80)
    table = make_table([make_port("web", 80, [POD[1][4]], family=4, protocol=Protocol.TCP)])
    prefixes = world.programs.maps["prefixes"]
    for number in range(4):
        prefixes.update(mapped_key(number), bytes(4))
    with pytest.raises(KernelError, match="map prefixes is full: it has room for 8 entries"):
        world.part.apply(table)
    for number in range(4):
        prefixes.delete(mapped_key(number))
    world.part.apply(table)
    assert world.ask("pod2", VIP[4], 80, socket.SOCK_STREAM)[0] == POD[1][4]
    assert world.part.verify() == []


def mapped_key(number):
    return (160).to_bytes(4, "little") + bytes(4) + bytes(15) + bytes([number])
