"""`podwire bpf` over a node's pins."""

import json
import os
from pathlib import Path

import pytest

from podwire.cli.main import main
from podwire.datapath.ebpf import inspect
from podwire.datapath.ebpf.layout import VERSION
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel.bpf import pins
from podwire.net import Protocol
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, POD, World

pytestmark = NEEDS_EBPF


@pytest.fixture(scope="module")
def world():
    with World() as made:
        programs = Programs(made.name, made.spaces["node"])
        part = ServicesPart(programs=programs)
        part.start()
        port = make_port("web", 80, [POD[1][4]], family=4, protocol=Protocol.TCP)
        part.apply(make_table([port]))
        made.serve("pod1", POD[1][4], 80)
        made.ask("pod2", VIP[4], 80)
        yield made
        programs.close()


def ask(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(["bpf", *arguments])
    out = capsys.readouterr()
    return exit.value.code, out.out, out.err


def test_status_names_links_and_outcomes(world, capsys):
    world.batch(world.spaces["node"], "link set pod2 alias default/two")
    code, out, _ = ask(capsys, "status", "--node", world.name, "--json")
    answer = json.loads(out)
    links = {(link["program"], link["hook"], link["target"]): link for link in answer["links"]}
    assert ("from_network", "tcx ingress", world.ifindex("pod2")) in links
    assert ("from_node", "tcx egress", 1) in links
    assert answer["outcomes"][world.name]["translated"] >= 1
    assert answer["layouts"] == {world.name: VERSION}
    assert answer["kernel"]["missing"] == []
    assert code == 0
    assert f"node {world.name}" in ask(capsys, "status", "--node", world.name)[1]


def test_status_shows_interfaces_and_pods_by_name(world):
    """As on the node itself: names are those of its own network namespace."""
    world.batch(world.spaces["node"], "link set pod2 alias default/two")
    path = Path(f"/proc/{os.getpid()}/fd/{world.spaces['node']}")
    (place,) = [p for p in inspect.places() if p.node == world.name]
    states = list(inspect.link_states(place._replace(netns=path)))
    found = {(s.program, s.hook, s.interface, s.pod) for s in states}
    assert ("from_network", "tcx ingress", "pod2", "default/two") in found
    assert ("from_node", "tcx egress", "lo", "") in found
    assert len(found) == 2 * 4 - 1


def test_maps_shows_what_is_held_and_what_happens_when_they_are_full(world, capsys):
    answer = json.loads(ask(capsys, "maps", "--node", world.name, "--json")[1])
    held = {s["name"]: (s["held"], s["capacity"], s["when_full"]) for s in answer}
    assert held["frontends"] == (3, 1024, "grows")
    assert held["connections"][0] == 2
    assert held["events"] == (None, 1 << 18, "newest are lost")
    assert held["affinities"] == (0, 262144, "refuses")
    assert held["fragments"][2] == "oldest go"
    assert all(state["memory"] > 0 for state in answer if state["held"])
    assert "frontends" in ask(capsys, "maps", "--node", world.name)[1]


def test_what_an_agent_left_behind_is_told_from_what_runs(capsys):
    with World() as gone:
        part = ServicesPart(programs=Programs(gone.name, gone.spaces["node"]))
        part.start()
        part._programs.close()
        for link in (pins.ROOT / "podwire" / gone.name / "links").iterdir():
            link.unlink()
        out = ask(capsys, "status", "--node", gone.name)[1]
        assert "nothing is attached" in out
        assert f"podwire agent --cleanup --node-name {gone.name}" in out


def test_progs_shows_runs_and_the_verifiers_work(world, capsys):
    arguments = ("progs", "--node", world.name, "--seconds", "0.01")
    answer = json.loads(ask(capsys, *arguments, "--json")[1])
    by_name = {state["name"]: state for state in answer}
    assert by_name["from_network"]["links"] == 3
    assert 1000 < by_name["from_network"]["verified_instructions"] < 500_000
    assert "from_node" in ask(capsys, *arguments)[1]


def test_an_unknown_node_is_named(world, capsys):
    code, _, err = ask(capsys, "maps", "--node", "nobody")
    assert code == 1
    assert "no eBPF of node 'nobody' here" in err
