"""An agent dies at a chosen call; the next one finds what it needs, and no connection notices."""

import os

import pytest

from podwire.datapath.ebpf import pinned, programs
from podwire.datapath.ebpf.connections import Connections
from podwire.datapath.ebpf.growing import GrowingMap
from podwire.datapath.ebpf.layout import MEMBER_KEY, NUMBER, Phase, mapped
from podwire.datapath.ebpf.pods import EbpfPods, PodLink
from podwire.kernel.bpf import Link, pins
from podwire.net import parse_address
from tests.kernel.ebpf_agent import DIED, Talk, agent, die_at, end
from tests.kernel.ebpf_services import VIP
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, POD, World

pytestmark = NEEDS_EBPF


@pytest.fixture
def world():
    with World() as made:
        for family in (4, 6):
            made.echo("pod1", POD[1][family], 80)
        yield made


def serves(world):
    """New connections of every kind go through, and programs are the same everywhere."""
    made, services = agent(world)
    for space, target in (("pod2", (VIP[4], 80)), ("outside", (NODE[6], 30080))):
        talk = Talk(world, space, target)
        talk.socket.sendall(b"?")
        assert talk.socket.recv(1) == b"?"
        talk.socket.close()
    assert made.phase is Phase.SERVING
    by_name = {}
    for name, link in made.attachments().items():
        by_name.setdefault(name.split("-")[0], set()).add(link.info.program_id)
    assert all(len(ids) == 1 for ids in by_name.values())
    hooks = [name.split("-")[1:] for name in made.attachments() if "ingress" in name]
    assert len({tuple(hook) for hook in hooks}) == len(hooks), "two programs at one hook"
    assert services.verify() == []
    return made


@pytest.mark.parametrize("call", [1, 2, 20, 45, 50, 55])
def test_the_first_start(world, call):
    """From the first pinned map to the last attached link."""
    assert die_at(pins, "pin", call, lambda: agent(world), after=True) in (DIED, 0)
    serves(world).close()


@pytest.mark.parametrize("call", [1, 4, 7])
def test_the_replacement_of_programs(world, call):
    agent(world)[0].close()
    talks = [Talk(world, "pod2", (VIP[family], 80)) for family in (4, 6)]
    for talk in talks:
        talk.start()
    assert die_at(Link, "update", call, lambda: agent(world)) == DIED
    serves(world).close()
    end(talks)


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (GrowingMap, "exchange", False),  # the old table is in both slots
        (GrowingMap, "exchange", True),  # nothing has moved
        (Connections, "_run", True),  # everything has
    ],
)
def test_the_growth_of_the_connection_table(world, owner, name, after):
    made = agent(world)[0]
    capacity = made.connections.capacity
    talks = [
        Talk(world, "pod2", (VIP[4], 80)),
        Talk(world, "outside", (NODE[4], 30080)),
        Talk(world, "outside", (NODE[6], 30080)),
    ]
    for talk in talks:
        talk.start()
    grow = made.connections.grow
    assert die_at(owner, name, 1, lambda: grow(2 * capacity), after=after) == DIED
    assert made.maps["connections"].lookup(NUMBER.pack(1)) is not None
    made.close()
    made = serves(world)
    assert made.maps["connections"].lookup(NUMBER.pack(1)) is None
    sources = {flow.source_port for flow, _ in made.connections.items()}
    assert sources >= {talk.socket.getsockname()[1] for talk in talks}
    end(talks)
    made.close()


def test_a_pod_that_was_about_to_be_known_as_one(world):
    """Both programs at the ingress of one link: the pods' own stays."""
    agent(world)[0].close()
    name = f"from_pod-{world.ifindex('pod1')}-ingress"
    other = name.replace("from_pod", "from_network")

    def run():
        made = programs.Programs(world.name, world.spaces["node"])
        made.enable("services", "pods")
        made._attachments._attach_tcx("from_network", world.ifindex("pod1"), "ingress")
        os._exit(DIED)

    assert die_at(pins, "mount", -1, run) == DIED
    links = pinned.folder(world.name) / "links"
    assert {name, other} <= {path.name for path in links.iterdir()}
    made = serves(world)
    assert name in made.attachments()
    assert other not in made.attachments()
    made.close()


def test_backends_that_were_about_to_lose_their_flows(world):
    """They may have come back meanwhile."""
    made = agent(world)[0]
    backend = MEMBER_KEY.pack(mapped(parse_address(POD[1][4])), 1, (80).to_bytes(2, "big"), 0)
    assert die_at(Connections, "_run", 1, lambda: made.connections.forget([backend])) == DIED
    assert made.maps["doomed"].lookup(backend) is not None
    made.close()
    made = serves(world)
    assert made.maps["doomed"].lookup(backend) is None
    made.close()


def test_pods_whose_interfaces_went_meanwhile_are_no_reason_to_stop(world):
    """Nor is another interface with the number of one taken for a pod's."""
    made = agent(world)[0]
    address = parse_address("10.244.0.9")
    uplink = world.ifindex("up0")
    EbpfPods(made).replace([PodLink(n, bytes(6), bytes(6), (address,)) for n in (9999, uplink)])
    assert made.maps["endpoints"].lookup(mapped(address)) is None
    assert f"from_network-{uplink}-ingress" in made.attachments()
    made.close()
