"""A lab's beginning and end, also when parts of it are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from podwire.errors import ConfigError
from podwire.lab import cgroups, manifests, teardown
from podwire.lab.cluster import Lab
from tests.lab.conftest import left_of, wait_for

PODS = """
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: a}
  spec: {nodeName: node1, containers: [{name: c, ports: [{containerPort: 80}]}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: b}
  spec:
    nodeName: node2
    hostname: bee
    containers:
    - name: c
      ports: [{containerPort: 80}, {containerPort: 53, protocol: UDP}]
      readinessProbe: {httpGet: {path: /healthz, port: 80}, periodSeconds: 1, failureThreshold: 1}
"""


def links() -> str:
    """The machine's own network: what a lab must not touch."""
    commands = ("ip -o link", "ip rule", "ip route show table all", "ip -o addr")
    return "".join(
        subprocess.run(c.split(), capture_output=True, text=True, timeout=10).stdout
        for c in commands
    )


def up_with_pods(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab()
    lab.apply(manifests.parse(PODS, "pods"))
    lab.wait()
    return lab


def seen_by(lab: Lab, source: str, target: str) -> dict[str, object]:
    """What the echo server of `target` says of a request from `source`."""
    from podwire.lab import connect

    address = lab.pod(target)["status"]["podIP"]
    fd = lab.netns_fd(source)
    try:
        return connect.ask(fd, address, 80).seen
    finally:
        os.close(fd)


def test_pods_reach_each_other_and_are_run_in(make_lab: Callable[..., Lab]) -> None:
    lab = up_with_pods(make_lab)
    address = lab.pod("a")["status"]["podIP"]
    seen = seen_by(lab, "a", "b")
    assert (seen["pod"], seen["node"]) == ("b", "node2")
    assert str(seen["client"]).startswith(f"{address}:")  # not masqueraded
    assert seen_by(lab, "node/node1", "b")["pod"] == "b"
    inside = lab.run("b", "hostname; cat /etc/hostname; grep bee /etc/hosts; exit 3")
    assert inside.stdout.split() == ["bee", "bee", lab.pod("b")["status"]["podIP"], "bee"]
    assert inside.returncode == 3
    cgroup = lab.run("b", "tail -1 /proc/self/cgroup").stdout
    assert cgroup == f"0::/podwire/{lab.name}/node2\n" or cgroups.root() is None
    requests = [entry["request"] for entry in lab.logs("b")]
    assert "GET /" in requests
    assert "GET /healthz" in requests  # the probe


def test_a_failing_probe_makes_a_pod_unready_until_it_recovers(
    make_lab: Callable[..., Lab],
) -> None:
    lab = up_with_pods(make_lab)
    path = "/api/v1/namespaces/default/pods/b"
    for healthy in ("false", "true"):
        patch = {"metadata": {"annotations": {"lab.podwire.dev/healthy": healthy}}}
        lab.api("PATCH", path, patch, "application/merge-patch+json")
        wanted = "True" if healthy == "true" else "False"
        wait_for(lambda wanted=wanted: ready(lab.api("GET", path)) == wanted)


def ready(pod: dict[str, object]) -> str:
    conditions = pod["status"]["conditions"]  # pyright: ignore
    return next(c["status"] for c in conditions if c["type"] == "Ready")  # pyright: ignore


def test_a_deleted_pod_leaves_nothing(make_lab: Callable[..., Lab]) -> None:
    lab = up_with_pods(make_lab)
    uid = lab.pod("a")["metadata"]["uid"]
    count = "ip -o link | grep -c master"
    before = int(lab.run("node/node1", count).stdout)
    lab.delete(manifests.parse(PODS, "pods"))
    wait_for(lambda: not lab.items("/api/v1/namespaces/default/pods"))
    wait_for(lambda: not lab.dir.netns(f"pod-{uid}").exists())
    wait_for(lambda: int(lab.run("node/node1", count).stdout) == before - 1)


def test_down_leaves_nothing_and_touches_nothing_else(make_lab: Callable[..., Lab]) -> None:
    before = links()
    lab, other = up_with_pods(make_lab), make_lab(nodes=1)
    lab.down()
    assert left_of(lab.name) == []
    assert other.items("/api/v1/nodes")  # the one beside it lives on
    other.down()
    assert links() == before
    with pytest.raises(ConfigError, match="no lab"):
        Lab(lab.name)


@pytest.mark.parametrize("role", ["supervisor", "api", "runtime", "agent-node1"])
def test_after_any_process_is_killed_down_leaves_nothing(
    make_lab: Callable[..., Lab], role: str
) -> None:
    lab = up_with_pods(make_lab)
    os.kill(lab.process(role).pid, signal.SIGKILL)
    assert teardown.down(lab.dir)
    assert left_of(lab.name) == []


def test_a_lab_killed_while_it_comes_up_is_taken_away() -> None:
    chance = random.Random(7)
    for attempt in range(6):
        name = f"pwt-{os.getpid()}-k{attempt}"
        command = [sys.executable, "-m", "podwire", "lab", "up", "--name", name, "--no-wait"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            time.sleep(0.3 + chance.random() * 0.4)
            child.kill()
            child.wait(10)
        finally:
            from podwire.lab.state import LabDir

            teardown.down(LabDir(name))
        assert left_of(name) == []


def test_the_runtime_takes_its_pods_up_again(make_lab: Callable[..., Lab]) -> None:
    lab = up_with_pods(make_lab)
    address = lab.pod("b")["status"]["podIP"]
    os.kill(lab.process("runtime").pid, signal.SIGKILL)
    wait_for(lambda: seen_by(lab, "a", "b").get("pod") == "b")
    assert lab.pod("b")["status"]["podIP"] == address


def test_pods_deleted_while_no_runtime_runs_are_ended_later(make_lab: Callable[..., Lab]) -> None:
    lab = up_with_pods(make_lab)
    gone = lab.dir.netns(f"pod-{lab.pod('b')['metadata']['uid']}")
    links = "ip -o link | grep -c master"
    before = int(lab.run("node/node2", links).stdout)
    lab.control("stop", process="runtime", signal=signal.SIGKILL)
    path = "/api/v1/namespaces/default/pods/b"
    lab.api("DELETE", path, {"gracePeriodSeconds": 0})
    assert gone.exists()
    lab.control("start", process="runtime")
    wait_for(lambda: not gone.exists())
    wait_for(lambda: int(lab.run("node/node2", links).stdout) == before - 1)


def test_an_agent_that_dies_interrupts_no_pod(make_lab: Callable[..., Lab]) -> None:
    lab = up_with_pods(make_lab)
    lab.control("stop", process="agent-node1", signal=signal.SIGKILL)
    assert seen_by(lab, "a", "b")["pod"] == "b"
    lab.control("start", process="agent-node1")
    lab.wait()
    assert seen_by(lab, "a", "b")["pod"] == "b"


def test_an_agent_that_stops_answers_the_call_it_is_busy_with(
    make_lab: Callable[..., Lab], make_netns: Callable[[], int], tmp_path: Path
) -> None:
    lab = make_lab(nodes=1)
    config = tmp_path / "config"
    config.write_text('{"cniVersion": "1.1.0", "name": "podwire", "type": "podwire"}')
    links = "ip -o link | grep -c master"
    before = int(lab.run("node/node1", links).stdout)
    add = subprocess.Popen(
        [lab.dir.path / "bin" / "podwire"],
        preexec_fn=lab.place("node/node1").enter,
        env={
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": "waits",
            "CNI_NETNS": f"/proc/{os.getpid()}/fd/{make_netns()}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(lab.dir.path / "bin"),
            "CNI_ARGS": "K8S_POD_NAMESPACE=default;K8S_POD_NAME=nobody-knows-it",
            "PODWIRE_CNI_SOCKET": str(lab.dir.run_dir("node1") / "cni.sock"),
        },
        stdin=config.open(),
        stdout=subprocess.PIPE,
        text=True,
    )
    with add:
        wait_for(lambda: int(lab.run("node/node1", links).stdout) == before + 1)
        lab.control("stop", process="agent-node1")
        answer = json.loads(add.communicate()[0])
    assert (answer["code"], "the agent ends" in answer["msg"]) == (11, True), answer
    assert int(lab.run("node/node1", links).stdout) == before
