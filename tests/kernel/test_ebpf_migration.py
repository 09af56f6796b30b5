"""Maps of another layout are left under traffic: no connection breaks, nothing is balanced anew."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from podwire.datapath.ebpf import migration, pinned, programs
from podwire.datapath.ebpf.layout import CONNECTION, VERSION, Phase
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from tests.kernel.ebpf_agent import Talk, agent, ports
from tests.kernel.ebpf_services import VIP, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, POD, World

CLANG = next(filter(None, map(shutil.which, ("clang-19", "clang-18", "clang"))), None)
BPF = Path(__file__).parents[2] / "bpf"

pytestmark = [NEEDS_EBPF, pytest.mark.skipif(CLANG is None, reason="no clang")]

OLDER = VERSION - 1
ROOM = 8  # bytes that the older entry of a connection had more


@pytest.fixture(scope="module")
def older_objects(tmp_path_factory):
    """Our programs, with a longer entry for connections."""
    source = tmp_path_factory.mktemp("older") / "bpf"
    shutil.copytree(BPF, source)
    header = source / "conntrack.h"
    text = header.read_text()
    assert text.count("__u8 pad[6];") == 1
    header.write_text(text.replace("__u8 pad[6];", f"__u8 pad[{6 + ROOM}];"))
    built = source / "built"
    built.mkdir()
    include = ["-I", f"/usr/include/{os.uname().machine}-linux-gnu", "-I", str(source)]
    for path in source.glob("*.bpf.c"):
        target = built / path.name.replace(".bpf.c", ".bpf.o")
        command = [CLANG, "-O2", "-g", "-target", "bpf", "-mcpu=v3", *include, "-c", str(path)]
        subprocess.run([*command, "-o", str(target)], check=True, timeout=60)
    return built


@pytest.fixture
def world(older_objects, monkeypatch):
    """A node that runs the older programs on maps of the older layout."""
    with World() as made, monkeypatch.context() as old:
        for family in (4, 6):
            made.echo("pod1", POD[1][family], 80)
        shape = programs._GROWING["connections"]
        longer = (*shape[:2], CONNECTION.size + ROOM, shape[3])
        old.setitem(programs._GROWING, "connections", longer)
        old.setattr(programs, "OBJECTS", older_objects)
        for module in (pinned, migration):
            old.setattr(module, "VERSION", OLDER)
        agent(made)[0].close()
        assert list(pinned.layouts(pinned.folder(made.name))) == [OLDER]
        old.undo()
        yield made


def shorten(key, value):
    return key, value[: CONNECTION.size]


def talks(world):
    found = [
        Talk(world, space, target)
        for space, target in (
            ("pod2", (VIP[4], 80)),
            ("pod2", (VIP[6], 80)),
            ("outside", (NODE[4], 30080)),
            ("outside", (NODE[6], 30080)),
        )
    ]
    for talk in found:
        talk.start()
    return found


def end(found):
    for talk in found:
        talk.stopped.set()
    for talk in found:
        talk.join(timeout=10)
    assert [talk.failure for talk in found] == [None] * len(found)
    assert all(talk.turns for talk in found)


def upgrade(world):
    """As an agent does: the new maps are filled while the old programs serve."""
    made = Programs(world.name, world.spaces["node"])
    made.enable("services", "pods", attach=False)
    services = ServicesPart(programs=made)
    services.start()
    services.apply(make_table(ports()))
    return made


def test_connections_are_converted_under_traffic(world, monkeypatch):
    monkeypatch.setattr(migration, "STEPS", {OLDER: {"connections": shorten}})
    before = talks(world)
    made = upgrade(world)
    assert made.phase is None
    meanwhile = talks(world)  # begun by the old programs, after the new maps were made
    made.attach(Phase.SERVING)
    after = talks(world)
    end(before + meanwhile + after)
    assert list(pinned.layouts(pinned.folder(world.name))) == [VERSION]
    assert made.phase is Phase.SERVING
    made.close()


def test_an_upgrade_that_died_half_way_is_finished_by_the_next_start(world, monkeypatch):
    monkeypatch.setattr(migration, "STEPS", {OLDER: {"connections": shorten, "frontends": None}})
    before = talks(world)
    made = upgrade(world)
    monkeypatch.setattr(Programs, "_attach", lambda self: os._exit(9))
    child = os.fork()
    if child == 0:
        made.attach(Phase.SERVING)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    monkeypatch.setattr(migration, "STEPS", {OLDER: {"connections": shorten, "frontends": None}})
    made.close()
    made = upgrade(world)
    made.attach(Phase.SERVING)
    end(before)
    made.close()
