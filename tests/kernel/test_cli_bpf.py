"""`podwire bpf` over a node's pins."""

import json
import os

import pytest

from podwire.cli.main import main
from podwire.datapath.ebpf.programs import OBJECTS, Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel.bpf import features
from podwire.net import Protocol
from tests.kernel.ebpf_world import POD, World
from tests.kernel.test_ebpf_services import VIP, make_port, make_table

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not list(OBJECTS.glob("*.bpf.o")), reason="no compiled eBPF programs"),
]
if os.geteuid() == 0 and features.missing():
    pytestmark.append(pytest.mark.skip(reason=f"the kernel lacks {features.missing()[0]}"))


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
    code, out, _ = ask(capsys, "status", "--node", world.name, "--json")
    answer = json.loads(out)
    links = {(link["program"], link["hook"], link["target"]) for link in answer["links"]}
    assert ("from_network", "tcx ingress", world.ifindex("pod2")) in links
    assert ("from_node", "tcx egress", 1) in links
    assert answer["outcomes"][world.name]["translated"] >= 1
    assert code == 0
    assert "tcx ingress" in ask(capsys, "status", "--node", world.name)[1]


def test_maps_shows_what_is_held(world, capsys):
    answer = json.loads(ask(capsys, "maps", "--node", world.name, "--json")[1])
    held = {state["name"]: (state["held"], state["capacity"]) for state in answer}
    assert held["frontends"] == (3, 1024)
    assert held["connections"][0] == 2
    assert held["events"][0] is None
    assert "frontends" in ask(capsys, "maps", "--node", world.name)[1]


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
