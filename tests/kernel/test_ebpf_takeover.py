"""From nftables to eBPF and back under open connections, also when the process dies over it."""

import pytest

from podwire.agent.carry import Carry
from podwire.datapath.ebpf import pinned, takeover
from podwire.datapath.ebpf.connections import Connections
from podwire.datapath.ebpf.layout import Phase
from podwire.datapath.ebpf.pods import EbpfPods
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.datapath.nftables.services import ServicesPart as NftablesServicesPart
from podwire.kernel import netns
from podwire.kernel.ctnetlink import Table
from tests.kernel.ebpf_agent import DIED, Talk, die_at, end, ports
from tests.kernel.ebpf_services import VIP, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, POD, World

pytestmark = NEEDS_EBPF


@pytest.fixture
def world():
    with World() as made:
        for family in (4, 6):
            made.echo("pod1", POD[1][family], 80)
        yield made


def on_node(world, body):
    return netns.call(world.spaces["node"], body)


def nftables(world):
    return netfilter(world, make_table(ports()), NftablesServicesPart)


def netfilter(world, table, part):
    made = part(table.settings.config, world.spaces["node"])
    made.start()
    made.apply(table)
    return made


def ebpf(world, table=None):
    """Maps filled, nothing attached, as the agent's parts leave it."""
    made = Programs(world.name, world.spaces["node"])
    made.enable("services", "policy", "pods", attach=False)
    EbpfPods(made).replace(world.pod_link(n) for n in (1, 2))
    services = ServicesPart(programs=made)
    services.start()
    services.apply(table or make_table(ports()))
    return made


def talks(world):
    found = [
        Talk(world, space, target)
        for family in (4, 6)
        for space, target in (
            ("pod2", (VIP[family], 80)),
            ("pod2", (POD[1][family], 80)),
            ("node", (VIP[family], 80)),
            ("outside", (NODE[family], 30080)),
        )
    ]
    for talk in found:
        talk.start()
    return found


def join(world, made):
    with Table(world.spaces["node"]) as table:
        return takeover.join(made, table)


def test_there_and_back(world):
    nft = nftables(world)
    under_nftables = talks(world)
    made = ebpf(world)
    assert made.phase is None
    carried = join(world, made)
    assert carried
    on_node(world, Carry().begin)
    nft.cleanup()
    with Table(world.spaces["node"]) as table:
        table.delete_entries(carried)
    assert made.phase is Phase.SERVING
    under_ebpf = talks(world)
    turns = [talk.turns for talk in under_nftables]
    wait_for_turns(under_nftables, turns)
    made.close()

    with Table(world.spaces["node"]) as table:
        takeover.announce(world.name, table)
        nft = nftables(world)
        assert takeover.leave(world.name, table) == 0
    assert not pinned.folder(world.name).exists()
    on_node(world, Carry().cleanup)
    turns = [talk.turns for talk in under_nftables + under_ebpf]
    wait_for_turns(under_nftables + under_ebpf, turns)
    end(under_nftables + under_ebpf + talks(world))
    nft.cleanup()


def wait_for_turns(found, turns):
    """Until each has spoken again, or failed."""
    while any(
        talk.turns <= before + 3 and talk.is_alive()
        for talk, before in zip(found, turns, strict=True)
    ):
        for talk in found:
            talk.join(timeout=0.01)
    assert [f"{talk.name}: {talk.failure}" for talk in found if talk.failure] == []


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(Programs, "set_phase", 2), (Programs, "set_phase", 3), (Connections, "correct", 1)],
)
def test_a_death_on_the_way_there(world, owner, name, call):
    nft = nftables(world)
    before = talks(world)
    made = ebpf(world)
    assert die_at(owner, name, call, lambda: join(world, made)) == DIED
    made.close()
    after = talks(world)
    made = ebpf(world)
    assert made.phase in (Phase.WAITING, Phase.JOINING)
    join(world, made)
    on_node(world, Carry().begin)
    nft.cleanup()
    end(before + after + talks(world))
    made.cleanup()


@pytest.mark.parametrize("call", [1, 2])
def test_a_death_on_the_way_back(world, call):
    """In LEAVING and in WAITING: the next one finishes it."""
    made = ebpf(world)
    made.attach(Phase.SERVING)
    before = talks(world)
    made.close()
    with Table(world.spaces["node"]) as table:
        takeover.announce(world.name, table)
    nft = nftables(world)

    def leave():
        with Table(world.spaces["node"]) as table:
            return takeover.leave(world.name, table)

    assert die_at(takeover, "_set_phase", call, leave, after=True) == DIED
    after = talks(world)
    assert leave() == 0
    end(before + after + talks(world))
    nft.cleanup()
