"""An agent that starts gives rule sets and identities other numbers; no packet sees a mixture."""

import itertools
import struct

from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.kernel.bpf import Map
from podwire.net import Protocol, parse_address
from podwire.policy import Attachment
from tests.kernel.ebpf_policies import policy, populate
from tests.kernel.ebpf_runs import DROP, make_frame, run_tcx
from tests.kernel.ebpf_world import HOST_MAC, MAC, NEEDS_EBPF, POD, World

pytestmark = NEEDS_EBPF
POLICIES = [
    policy(
        f"for-{app}",
        {
            "podSelector": {"matchLabels": {"app": app}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": peer}}}],
                         "ports": [{"protocol": "TCP", "port": port}]}],
        },
    )
    for app, peer, port in (("web", "client", 80), ("client", "web", 81))
]  # fmt: skip
WANTED = {(2, 1, 80): True, (2, 1, 81): False, (1, 2, 81): True, (1, 2, 80): False}
_ports = itertools.count(20000)


def is_let_through(world, made, source, target, port):
    """Whether a first packet is, by a run of the program on the sender's link."""
    ends = [parse_address(POD[n][4]) for n in (source, target)]
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40, 1, 0, 64, Protocol.TCP, 0, *ends)
    tcp = struct.pack(">HHIIBBHHH", next(_ports), port, 1, 0, 0x50, 2, 1000, 0, 0)
    frame = make_frame(ip + tcp, (HOST_MAC[source], MAC[source]))
    index = world.ifindex(f"pod{source}")
    return run_tcx(world.spaces["node"], made.program("from_pod"), index, frame)[0] != DROP


def judge(world, made):
    return {case: is_let_through(world, made, *case) for case in WANTED}


def start(world, order):
    """A process as new: pods and policies come in another order, so numbers differ."""
    populate(world)
    for _, name in order:
        world.compiler.detach(("x", name))
    for number, name in order:
        addresses = tuple(parse_address(text) for text in POD[number].values())
        world.compiler.attach(Attachment(("x", name), f"pod{number}", addresses))
    made = Programs(world.name, world.spaces["node"])
    part = PolicyPart(programs=made)
    part.start()
    return made, part


def table_of(world, policies):
    for one in policies:  # one after the other: each gets its numbers when it comes
        world.store.put(one)
        table = world.compiler.update(world.store.take())
    return table


def test_every_packet_is_judged_by_one_table(monkeypatch):
    with World() as world:
        made, part = start(world, [(1, "one"), (2, "two")])
        part.apply(table_of(world, POLICIES))
        assert judge(world, made) == WANTED
        before = made.growing["subjects"].read()
        made.close()

        made, part = start(world, [(2, "two"), (1, "one")])
        table = table_of(world, POLICIES[::-1])
        seen = []

        def watched(name, body):
            def run(self, *args):
                done = body(self, *args)
                if self.info.name != "connections":
                    seen.append((name, self.info.name, judge(world, made)))
                return done

            return run

        for name in ("update", "update_packed", "delete", "delete_batch"):
            monkeypatch.setattr(Map, name, watched(name, getattr(Map, name)))
        part.apply(table)
        monkeypatch.undo()
        assert made.growing["subjects"].read() != before
        assert [each for each in seen if each[2] != WANTED] == []
        assert len(seen) > 4
        assert judge(world, made) == WANTED
        assert part.verify() == []
        made.cleanup()
