"""Agents die and programs are replaced under traffic; no connection notices."""

import os
import signal
import time

import pytest

from podwire.datapath.ebpf import pinned
from podwire.datapath.ebpf import programs as programs_room
from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import OBJECTS, Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.errors import KernelError
from podwire.kernel.bpf import pins
from tests.kernel.ebpf_agent import Talk, agent, ports
from tests.kernel.ebpf_services import VIP, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, POD, World

pytestmark = NEEDS_EBPF


@pytest.fixture
def world():
    with World() as made:
        for family in (4, 6):
            made.echo("pod1", POD[1][family], 80)
        yield made


def survive(world, restarts, replacements):
    """Kill agents and replace programs under traffic; how often each connection spoke."""
    agent(world)[0].close()
    talks = [
        Talk(world, space, target)
        for space, target in (
            ("pod2", (VIP[4], 80)),
            ("pod2", (VIP[6], 80)),
            ("pod2", (POD[1][4], 80)),
            ("node", (VIP[4], 80)),
            ("outside", (NODE[4], 30080)),
            ("outside", (NODE[6], 30080)),
        )
    ]
    for talk in talks:
        talk.start()
    for number in range(restarts):
        child = os.fork()
        if child == 0:
            try:
                agent(world)
                signal.pause()
            finally:
                os._exit(1)
        # at any point of its start, or a while after it
        time.sleep(0.2 * number / restarts)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        new = Talk(world, "outside", (NODE[4], 30080))
        new.socket.sendall(b"?")
        assert new.socket.recv(1) == b"?"
        new.socket.close()
    programs, services = agent(world)
    for _ in range(replacements):
        programs.reload()
    for talk in talks:
        talk.stopped.set()
    for talk in talks:
        talk.join(timeout=10)
    assert [talk.failure for talk in talks] == [None] * len(talks)
    assert services.verify() == []
    programs.close()
    return [talk.turns for talk in talks]


def test_killed_agents_and_replaced_programs_break_no_connection(world):
    """Six and two here; fifty and ten in `make bench BENCH=upgrade`."""
    assert all(turns > 20 for turns in survive(world, 6, 2))


def test_maps_of_a_newer_layout_are_refused_in_words(world):
    pins.directory(world.name, "maps-999")
    programs = Programs(world.name, world.spaces["node"])
    with pytest.raises(KernelError, match=r"layout 999, this podwire knows up to .*--cleanup"):
        ServicesPart(programs=programs).start()
    programs.cleanup()
    assert not pinned.folder(world.name).exists()


def test_parts_join_one_after_the_other(world):
    programs = Programs(world.name, world.spaces["node"])
    services = ServicesPart(programs=programs)
    services.start()
    services.apply(make_table(ports()))
    talk = Talk(world, "pod2", (VIP[4], 80))
    policy = PolicyPart(programs=programs)
    policy.start()
    assert programs.features == {"services", "policy"}
    talk.socket.sendall(b"?")
    assert talk.socket.recv(1) == b"?"
    talk.socket.close()
    programs.close()


def test_pins_of_a_node_that_is_gone_are_not_taken_over(world):
    with World() as other:
        programs = Programs(world.name, other.spaces["node"])
        services = ServicesPart(programs=programs)
        services.start()
        services.apply(make_table(ports()))
        other.serve("pod1", POD[1][4], 80)
        other.ask("pod2", VIP[4], 80)
        assert list(programs.connections.items())
        programs.close()
    deadline = time.monotonic() + 20
    programs = Programs(world.name, world.spaces["node"])
    services = ServicesPart(programs=programs)
    while not pinned.is_abandoned(world.name) and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel takes namespaces down in the background
    services.start()
    assert not list(programs.connections.items())
    programs.close()


def test_programs_of_another_version_are_refused_in_one_sentence(world, monkeypatch, tmp_path):
    monkeypatch.setattr(programs_room, "OBJECTS", tmp_path)
    programs = Programs(world.name, world.spaces["node"])
    sentence = r"the compiled eBPF programs have no {} .*another version of podwire.*tools/setup"
    (tmp_path / "socket.bpf.o").symlink_to(OBJECTS / "socket.bpf.o")
    with pytest.raises(KernelError, match=sentence.format("constant with_[a-z_]+:")):
        programs.enable("services")
    assert not programs.maps  # nothing was loaded
    (tmp_path / "tcx.bpf.o").symlink_to(OBJECTS / "tcx.bpf.o")
    programs.enable("services")
    with pytest.raises(KernelError, match=sentence.format("map departed:")):
        programs.connections.maintain()
    with pytest.raises(KernelError, match=sentence.format("program from_driver:")):
        programs.program("from_driver")
    programs.cleanup()
