"""XDP is where the node's addresses are, in the way that was asked for, and nowhere else."""

from contextlib import closing

import pytest

from podwire.datapath.ebpf import inspect
from podwire.datapath.ebpf.layout import Phase
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.uplinks import Uplinks
from podwire.kernel.bpf import features
from podwire.net import parse_address
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, World

pytestmark = [
    NEEDS_EBPF,
    pytest.mark.skipif(not features.has_xdp_link(), reason="the kernel lacks XDP links"),
]

ADDRESSES = [parse_address(text) for text in NODE.values()]


@pytest.fixture(scope="module")
def world():
    with World() as made, closing(Programs(made.name, made.spaces["node"])) as programs:
        programs.enable("services")
        made.programs = programs
        yield made


@pytest.fixture(autouse=True)
def nothing_accelerated(world):
    yield
    Uplinks(world.programs, "disabled").sync()


def shown(world):
    """What `podwire bpf status` says."""
    (place,) = [place for place in inspect.places() if place.node == world.name]
    links = inspect.link_states(place)
    return {(link.target, link.hook) for link in links if link.program == "from_driver"}


def test_each_way_takes_the_place_of_the_other(world):
    uplink = world.ifindex("up0")
    for acceleration, hook in (("native", "xdp"), ("generic", "xdp generic"), ("native", "xdp")):
        uplinks = Uplinks(world.programs, acceleration)
        uplinks.follow(ADDRESSES)
        assert shown(world) == {(uplink, hook)}
        assert uplinks.problems == []
    Uplinks(world.programs, "disabled").sync()
    assert shown(world) == set()


def test_a_new_process_without_it_takes_it_away(world):
    Uplinks(world.programs, "native").follow(ADDRESSES)
    with closing(Programs(world.name, world.spaces["node"])) as second:
        second.enable("services")
        Uplinks(second, "disabled").follow(ADDRESSES)
        assert shown(world) == set()


def test_a_link_that_runs_it_before_all_else_gets_the_other_programs():
    """An agent that takes over accelerates first and attaches when all its parts are complete."""
    with World() as fresh, closing(Programs(fresh.name, fresh.spaces["node"])) as programs:
        programs.enable("services", attach=False)
        Uplinks(programs, "native").follow(ADDRESSES)
        programs.attach(Phase.SERVING)
        uplink = fresh.ifindex("up0")
        here = {name.split("-")[0] for name in programs.attachments() if f"-{uplink}-" in name}
        assert here == {"from_driver", "from_network", "from_node"}
        programs.cleanup()


def test_it_follows_the_addresses(world):
    node = world.spaces["node"]
    world.batch(node, "link add other0 type veth peer name other1", "link set other0 up")
    try:
        uplinks = Uplinks(world.programs, "generic")
        uplinks.follow([parse_address("192.0.2.1")])
        assert shown(world) == set()
        assert "no link carries" in uplinks.problems[0]
        world.batch(node, "addr add 192.0.2.1/24 dev other0")
        assert uplinks.sync() == ["XDP runs on other0"]
        assert shown(world) == {(world.ifindex("other0"), "xdp generic")}
        assert uplinks.problems == []
        uplinks.follow(ADDRESSES)
        assert shown(world) == {(world.ifindex("up0"), "xdp generic")}
    finally:
        world.batch(node, "link del other0")


@pytest.mark.parametrize("acceleration", ["native", "best-effort"])
def test_a_driver_that_cannot_is_named_or_gone_without(world, acceleration, caplog):
    node = world.spaces["node"]
    world.batch(node, "link add bridge0 type bridge", "addr add 192.0.2.2/24 dev bridge0")
    try:
        uplinks = Uplinks(world.programs, acceleration)
        uplinks.follow([parse_address("192.0.2.2")])
        uplinks.sync()
        assert shown(world) == set()
        assert [r.message.split(":")[0] for r in caplog.records] == ["no XDP on bridge0"]
        assert bool(uplinks.problems) == (acceleration == "native")
    finally:
        world.batch(node, "link del bridge0")
