"""Handshakes in the middle of every step of a change of the data path; no packet of one is lost.

Ports are used again: every client has had another connection from its port, which has ended and is
remembered, and about half of these were led to another backend.
"""

import itertools
from functools import wraps

import msgspec
import pytest

from podwire.agent.carry import Carry
from podwire.datapath.ebpf import pinned, takeover
from podwire.datapath.ebpf.connections import Connections
from podwire.datapath.ebpf.growing import GrowingMap
from podwire.datapath.ebpf.layout import Phase
from podwire.datapath.ebpf.pinned import PinnedMaps
from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.iptables.services import ServicesPart as IptablesServicesPart
from podwire.datapath.nftables.services import ServicesPart as NftablesServicesPart
from podwire.kernel import sysctl
from podwire.kernel.ctnetlink import Table
from podwire.kube.objects import Namespace, NetworkPolicy
from podwire.kube.store import Store
from podwire.net import Protocol, parse_address
from podwire.policy import Attachment, PolicyCompiler
from tests.kernel.ebpf_policies import pod
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, OUTSIDE, POD, REMOTE, World
from tests.kernel.handshakes import Dialogue, Wire
from tests.kernel.test_ebpf_takeover import ebpf, join, netfilter, on_node

pytestmark = NEEDS_EBPF
PARTS = [NftablesServicesPart, IptablesServicesPart]
STEPS = [
    (Programs, "attach"), (Programs, "set_phase"), (GrowingMap, "settle"),
    (Connections, "clear"), (Connections, "add"), (Connections, "correct"),
    (Table, "entries"), (Table, "create"), (Table, "delete_entries"),
    (Carry, "track"), (Carry, "begin"), (Carry, "cleanup"),
    (takeover, "_set_phase"), (PinnedMaps, "items"), (sysctl, "write"), (pinned, "remove"),
    *itertools.product(PARTS, ("apply", "cleanup")),
]  # fmt: skip
DELAYS = (1, 3)
PAUSES = [(0, 0), *((delay, 0) for delay in DELAYS), *((0, delay) for delay in DELAYS)]
"""Steps between a SYN and its answer, and between this and the third packet."""


class Play:
    """Dialogues of every kind, which begin at each step and go on a few steps later."""

    def __init__(self, wire):
        self._wire = wire
        self._kinds = {
            "pod to Service": ("pod2", POD[2][4], (VIP[4], 80)),
            "pod to Service by IPv6": ("pod2", POD[2][6], (VIP[6], 80)),
            "pod to pod": ("pod2", POD[2][4], (POD[1][4], 80)),
            "pod to a Service of the node itself": ("pod2", POD[2][4], (VIP[4], 81)),
            "outside to NodePort": ("outside", OUTSIDE[4], (NODE[4], 30080)),
            "node to Service": ("node", NODE[4], (VIP[4], 80)),
        }
        self._all, self._due = [], {}
        self.dialogues, self.steps = [], []
        self.ended = False

    def use_ports(self):
        """All that 25 steps are going to use, by connections that end."""
        for kind, number in itertools.product(self._kinds, range(25 * len(PAUSES))):
            dialogue = self._dialogue(kind, number)
            dialogue.finish()
            dialogue.close()
            assert not dialogue.wrong

    def step(self, name):
        now = len(self.steps)
        self.steps.append(name)
        for kind, (each, (first, second)) in itertools.product(self._kinds, enumerate(PAUSES)):
            dialogue = self._dialogue(kind, now * len(PAUSES) + each)
            self.dialogues.append(dialogue)
            for when in (now, now + first, now + first + second):
                self._due.setdefault(when, []).append(dialogue)
        for dialogue in self._due.pop(now):
            dialogue.advance(name)

    def end(self):
        self.step("the last step")
        self.ended = True
        for dialogue in self.dialogues:
            dialogue.finish()
        clients = {}
        for each in self._all:
            clients.setdefault(each.ends, set()).add(each.client)
        # one of 64,000 ports is chosen at random: two may get the same, before one table or the
        # other knows of both
        wrong = [
            each.wrong for each in self.dialogues if each.wrong and len(clients[each.ends]) == 1
        ]
        assert wrong == [], self.steps

    def _dialogue(self, kind, number):
        space, address, target = self._kinds[kind]
        port = 40000 + 1000 * list(self._kinds).index(kind) + number
        family = 6 if ":" in address else 4
        servers = {"pod1": POD[1], "outside": REMOTE, "node": NODE}
        servers = {name: addresses[family] for name, addresses in servers.items()}
        self._all.append(Dialogue(self._wire, kind, (space, (address, port)), target, servers))
        return self._all[-1]


def table():
    return make_table(
        [
            make_port("web4", 80, [POD[1][4], REMOTE[4]], family=4, protocol=Protocol.TCP),
            make_port("web6", 80, [POD[1][6], REMOTE[6]], family=6, protocol=Protocol.TCP),
            make_port("own", 81, [NODE[4]], family=4, protocol=Protocol.TCP),
        ]
    )


def judge(made):
    """All is allowed to the pods, and so remembered."""
    compiler, store = PolicyCompiler("node"), Store()
    store.put(msgspec.convert({"metadata": {"name": "x"}}, Namespace))
    for number, addresses in POD.items():
        store.put(pod(f"pod{number}", "node", addresses))
        packed = tuple(parse_address(text) for text in addresses.values())
        compiler.attach(Attachment(("x", f"pod{number}"), f"pod{number}", packed))
    spec = {"podSelector": {}, "ingress": [{}]}
    policy = {"metadata": {"name": "all", "namespace": "x"}, "spec": spec}
    store.put(msgspec.convert(policy, NetworkPolicy))
    PolicyPart(programs=made).apply(compiler.update(store.take()))


@pytest.fixture
def world():
    with World() as made:
        yield made


@pytest.fixture
def play(world):
    with Wire(world, world.spaces) as wire:
        yield Play(wire)


@pytest.fixture
def at_every_step(play, monkeypatch):
    """Call it when the switch begins."""

    def begin():
        for owner, name in STEPS:
            monkeypatch.setattr(owner, name, stepping(getattr(owner, name), play))

    return begin


def stepping(body, play):
    @wraps(body)
    def steps(*args, **kwargs):
        if not play.ended:
            play.step(body.__qualname__)
        found = body(*args, **kwargs)
        # what is read lazily is read now
        return list(found) if body.__name__ == "entries" else found

    return steps


@pytest.mark.parametrize("part", PARTS)
def test_from_netfilter_to_ebpf(world, play, at_every_step, part):
    before = netfilter(world, table(), part)
    play.use_ports()
    made = ebpf(world, table())
    judge(made)
    at_every_step()
    carried = join(world, made)
    on_node(world, Carry().begin)
    before.cleanup()
    with Table(world.spaces["node"]) as kernel:
        kernel.delete_entries(carried)
    play.end()
    made.cleanup()


@pytest.mark.parametrize("part", PARTS)
def test_from_ebpf_to_netfilter(world, play, at_every_step, part):
    made = ebpf(world, table())
    judge(made)
    made.attach(Phase.SERVING)
    play.use_ports()
    made.close()
    at_every_step()
    on_node(world, Carry().track)
    with Table(world.spaces["node"]) as kernel:
        takeover.announce(world.name, kernel)
        after = netfilter(world, table(), part)
        assert takeover.leave(world.name, kernel) == 0
    on_node(world, Carry().cleanup)
    play.end()
    after.cleanup()
