"""Pods that no policy concerns: no entries for their TCP, none the worse when a policy comes."""

import socket
import struct

import pytest

from podwire.conntrack.ebpf import EbpfSource
from podwire.conntrack.inspector import Inspector
from podwire.conntrack.names import Names
from podwire.datapath.ebpf import pinned
from podwire.datapath.ebpf.connections import Connections
from podwire.datapath.ebpf.pods import EbpfPods
from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel import netns
from podwire.net import Protocol
from tests.kernel.ebpf_policies import enforce, policy, populate
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, POD, World

pytestmark = NEEDS_EBPF

CLOSED = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
CLOSED_WEB = {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"]}


def start(world):
    """The parts of an agent that starts: it knows pods first and policies then."""
    world.programs = Programs(world.name, world.spaces["node"])
    world.programs.enable("pods", "policy", "services")
    EbpfPods(world.programs).replace(world.pod_link(n, with_sockets=True) for n in (1, 2))
    world.part = PolicyPart(programs=world.programs)


@pytest.fixture
def world():
    with World() as made:
        start(made)
        populate(made)
        for family in (4, 6):
            made.echo("pod1", POD[1][family], 80)
            made.serve("pod1", POD[1][family], 80, socket.SOCK_DGRAM)
        yield made
        made.programs.cleanup()


def entries(world, protocol=Protocol.TCP):
    return [flow for flow, _ in Connections(world.programs).items() if flow.protocol == protocol]


def connected(world, family):
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    client = netns.socket(world.spaces["pod2"], kind, socket.SOCK_STREAM)
    client.settimeout(2)
    client.connect((POD[1][family], 80))
    return client


def answers(client):
    try:
        client.send(b"still there")
        return client.recv(64) == b"still there"
    except TimeoutError:
        return False


def refused(world, family):
    return world.observe("pod2", POD[1][family], 80, tries=1, timeout=0.2) == {"silence"}


@pytest.mark.parametrize("spec", [CLOSED, CLOSED_WEB], ids=["both ends", "one end"])
def test_what_is_open_outlives_a_policy_though_nobody_noted_it(world, spec):
    enforce(world)
    clients = [connected(world, family) for family in (4, 6)]
    assert all(map(answers, clients))
    assert not entries(world)
    enforce(world, policy("closed", spec))
    assert refused(world, 4)
    assert refused(world, 6)
    assert all(map(answers, clients))
    enforce(world)
    assert all(map(answers, clients))
    clients.append(connected(world, 4))
    assert answers(clients[-1])
    for client in clients:
        client.close()


def test_what_closed_unseen_is_no_way_in(world):
    enforce(world, policy("open", {**CLOSED_WEB, "ingress": [{}]}))
    client = connected(world, 4)
    port = client.getsockname()[1]
    assert len(entries(world)) == 2
    enforce(world)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert len(entries(world)) == 2
    enforce(world, policy("closed", CLOSED_WEB))
    with pytest.raises(TimeoutError):
        world.ask("pod2", POD[1][4], 80, source=("", port), timeout=0.2)


def test_policies_of_a_first_start_spare_what_is_open(world):
    client = connected(world, 4)  # no table yet: nobody is judged
    Connections(world.programs).clear()
    enforce(world, policy("closed", CLOSED))
    assert refused(world, 4)
    assert answers(client)
    client.close()


def test_a_new_process_judges_what_the_last_one_judged(world):
    enforce(world, policy("closed", CLOSED))
    world.programs.close()
    start(world)
    assert refused(world, 4)
    enforce(world, policy("closed", CLOSED))
    assert refused(world, 4)
    assert not [flow for flow in entries(world) if flow.destination_port == 80]


def test_answers_of_a_backend_on_the_node_are_translated_back(world):
    both = {"family": 4, "protocol": Protocol.TCP, "external": False}
    table = make_table([make_port("s", 80, [POD[1][4]], **both)])
    ServicesPart(table.settings.config, programs=world.programs).apply(table)
    enforce(world)
    state, first = world.programs.maps["local_entries"], bytes(4)
    with netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(2)
        client.connect((VIP[4], 80))
        assert all(answers(client) for _ in range(3))
        Connections(world.programs).expire()
        assert state.lookup(first) != bytes(4)
        assert answers(client)
    Connections(world.programs).clear()
    Connections(world.programs).expire()
    assert state.lookup(first) == bytes(4)


def test_the_middle_of_a_connection_that_never_began_is_judged(world):
    enforce(world, policy("closed", CLOSED_WEB))
    client = connected_by_force(world)
    assert not answers(client)
    client.close()


def connected_by_force(world):
    """A client that believes it is connected: its peer is a closed pod that never saw a packet."""
    client = netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_STREAM)
    tcp_repair, on, no_window_probe = 19, 1, -1
    client.setsockopt(socket.IPPROTO_TCP, tcp_repair, on)
    client.bind((POD[2][4], 40000))
    client.connect((POD[1][4], 80))
    client.setsockopt(socket.IPPROTO_TCP, tcp_repair, no_window_probe)
    client.settimeout(0.3)
    return client


def test_datagrams_are_noted_also_without_policies(world):
    enforce(world)
    with netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        client.connect((POD[1][4], 80))
        client.send(b"who")
        assert client.recv(100)
        assert entries(world, Protocol.UDP)
        enforce(world, policy("closed", CLOSED))
        client.send(b"who")
        assert client.recv(100)


def test_a_kernel_without_the_iterator_notes_all(monkeypatch):
    monkeypatch.setitem(pinned._NEEDS, "adopt", "no_such_function")
    with World() as world:
        start(world)
        populate(world)
        world.echo("pod1", POD[1][4], 80)
        enforce(world)
        client = connected(world, 4)
        assert answers(client)
        assert len(entries(world)) == 2
        enforce(world, policy("closed", CLOSED))
        assert answers(client)
        client.close()
        world.programs.cleanup()


@pytest.mark.parametrize("family", [4, 6])
def test_what_needs_no_entry_is_listed_from_the_sockets(world, family):
    enforce(world)
    inspector = Inspector(EbpfSource(world.programs), Names)
    with connected(world, family) as client:
        assert answers(client)
        assert entries(world) == []
        (row,) = inspector.ls({"protocol": "tcp"})
        local = client.getsockname()
        original = {"source": POD[2][family], "source_port": local[1], "source_name": None,
                    "destination": POD[1][family], "destination_port": 80,
                    "destination_name": None}  # fmt: skip
        assert row["original"] == original
        assert row["state"] == "ESTABLISHED"
        assert row["status"] == ["SEEN_REPLY", "ASSURED"]
        assert row["bytes"][0] == 11  # what was sent counts when it is acknowledged
        assert not row["tracked"]
        assert list(inspector.ls({"address": "10.9.9.9"})) == []
        enforce(world, policy("closed", CLOSED_WEB))  # it has entries now
        (row,) = inspector.ls({"protocol": "tcp"})
        assert row["tracked"]
        assert row["original"] == original
