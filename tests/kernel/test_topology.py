"""The lab's network and its removal, in the real kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from podwire.lab import cgroups, enter, mounts, teardown, topology
from podwire.lab.state import LabDir


@pytest.fixture
def lab() -> Iterator[LabDir]:
    lab = LabDir(f"pwt-{os.getpid()}")
    for directory in ("netns", "log"):
        (lab.path / directory).mkdir(parents=True)
    mounts.bind(lab.path, lab.path)
    mounts.share(lab.path)
    try:
        yield lab
    finally:
        teardown.down(lab)


def left_of(lab: LabDir) -> list[str]:
    """Whatever of the lab is still on the machine."""
    cgroup = cgroups.of_lab(lab.name)
    return [
        *(str(path) for path in mounts.below(lab.path)),
        *([str(lab.path)] if lab.path.exists() else []),
        *([str(cgroup)] if cgroup is not None and cgroup.exists() else []),
    ]


def run_on(namespaces: enter.NodeNamespaces, command: str) -> subprocess.CompletedProcess[str]:
    """A shell command in a node's namespaces."""
    return subprocess.run(
        ["sh", "-c", command],
        preexec_fn=namespaces.enter,
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_nodes_reach_each_other_and_the_world_but_no_pod_network(lab: LabDir) -> None:
    topology.build(lab, dual_stack=True)
    nodes = [topology.make_node(f"n{i}", i, True) for i in (1, 2)]
    held = []
    for node in nodes:
        topology.add_node(lab, node, True)
        held.append(enter.make_node_namespaces(lab, node.name))
    try:
        for address in (*nodes[1].addresses, *topology.OUTSIDE, *topology.ROUTER):
            assert run_on(held[0], f"ping -c1 -i0.2 -w5 {address}").returncode == 0, address
        assert run_on(held[0], f"ping -c1 -W1 {nodes[1].pod_cidrs[0][:-4]}5").returncode != 0
        assert run_on(held[0], "hostname").stdout == "n1\n"
        assert run_on(held[0], "stat -f -c %T /sys/fs/bpf").stdout == "bpf_fs\n"
        new = topology.make_node("n2", 2, True, host=99)
        topology.readdress_node(lab, nodes[1], new, True)
        assert run_on(held[0], f"ping -c1 -i0.2 -w5 {new.addresses[1]}").returncode == 0
        assert run_on(held[1], f"ping -c1 -i0.2 -w5 {topology.OUTSIDE[0]}").returncode == 0
        topology.remove_node(lab, new)
        assert run_on(held[0], f"ping -c1 -W1 {new.addresses[0]}").returncode != 0
    finally:
        for namespaces in held:
            namespaces.close()
    assert teardown.down(lab)
    assert left_of(lab) == []


def test_a_node_sees_its_own_cgroup_as_the_root(lab: LabDir) -> None:
    root = cgroups.root()
    if root is None:
        pytest.skip("no cgroup2 on this machine")
    topology.build(lab, dual_stack=False)
    topology.add_node(lab, topology.make_node("n1", 1, False), False)
    namespaces = enter.make_node_namespaces(lab, "n1")

    def become() -> None:
        cgroups.join(cgroups.of_node(lab.name, "n1"))
        namespaces.enter()

    try:
        seen = subprocess.run(
            ["sh", "-c", f"tail -1 /proc/self/cgroup; cat {root}/cgroup.procs | wc -l"],
            preexec_fn=become,
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert seen.stdout.split()[0] == "0::/"
        assert int(seen.stdout.split()[1]) < 10  # only its own, not those of the machine
    finally:
        namespaces.close()


def test_down_ends_processes_that_nobody_wrote_down(lab: LabDir) -> None:
    if cgroups.root() is None:
        pytest.skip("no cgroup2 on this machine")
    child = subprocess.Popen(
        ["sleep", "60"],
        preexec_fn=lambda: cgroups.join(cgroups.of_node(lab.name, "n1")),
        cwd=lab.path,
    )
    assert teardown.down(lab)
    assert child.wait(5) == -signal.SIGKILL
    assert left_of(lab) == []
    assert not teardown.down(lab)


def test_down_takes_half_made_labs_away(lab: LabDir) -> None:
    (lab.path / "lab.json").write_text('{"name": "torn')
    began = time.monotonic()
    assert teardown.down(lab)
    assert left_of(lab) == []
    assert time.monotonic() - began < teardown.PATIENCE_S
    assert not Path(lab.path).exists()
