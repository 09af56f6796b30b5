"""Which agent a command asks, from options, $PODWIRE_LAB and what runs here."""

from __future__ import annotations

import argparse

import pytest

from podwire.cli import agents
from podwire.errors import ApiError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two labs of two nodes."""
    monkeypatch.setattr(agents, "RUN_DIR", tmp_path)
    monkeypatch.delenv("PODWIRE_LAB", raising=False)
    for lab in ("blue", "red"):
        for node in ("node1", "node2"):
            (tmp_path / "lab" / lab / "nodes" / node / "run").mkdir(parents=True)
    return tmp_path


def asked(*words: str) -> list[str]:
    parser = argparse.ArgumentParser()
    agents.add_options(parser)
    found = agents.run_dirs(parser.parse_args(words))
    return [str(path.relative_to(agents.RUN_DIR)) for path in found]


def test_a_lab_by_option_or_by_environment(machine, monkeypatch):
    nodes = ["lab/red/nodes/node1/run", "lab/red/nodes/node2/run"]
    assert asked("--lab", "red") == nodes
    monkeypatch.setenv("PODWIRE_LAB", "red")
    assert asked() == nodes
    assert asked("--node", "node2") == nodes[1:]
    assert asked("--lab", "blue", "--node", "node1") == ["lab/blue/nodes/node1/run"]
    (machine / "agent.sock").touch()  # the node's own agent comes after what was named
    assert asked() == nodes


def test_several_labs_and_no_name(machine):
    with pytest.raises(ApiError, match=r"choose one with --lab \(blue, red\)"):
        asked()
    (machine / "agent.sock").touch()
    assert asked() == ["."]


def test_a_lab_or_node_that_is_not_there(machine):
    with pytest.raises(ApiError, match="no lab 'green' runs here"):
        asked("--lab", "green")
    with pytest.raises(ApiError, match="no node 'node9' in lab 'red'"):
        asked("--lab", "red", "--node", "node9")
