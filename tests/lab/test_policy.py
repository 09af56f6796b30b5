"""Policies in a whole lab: through API, agent and kernel, and what `podwire policy` says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from podwire.cli import main
from podwire.datapath.ebpf.programs import missing
from podwire.lab import manifests
from podwire.lab.cluster import Lab
from podwire.lab.connect import ask

WORLD = """
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: x}}
- apiVersion: v1
  kind: Pod
  metadata: {name: server, namespace: x, labels: {app: server}}
  spec: {nodeName: node1, containers: [{name: c, ports: [{containerPort: 80, name: web}]}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: friend, namespace: x, labels: {app: friend}}
  spec: {nodeName: node1, containers: [{name: c}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: stranger, namespace: x, labels: {app: stranger}}
  spec: {nodeName: node2, containers: [{name: c}]}
- apiVersion: v1
  kind: Service
  metadata: {name: server, namespace: x}
  spec: {selector: {app: server}, ports: [{port: 8080, targetPort: web}]}
- &policy
  apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: friends, namespace: x}
  spec:
    podSelector: {matchLabels: {app: server}}
    ingress:
    - from: [{podSelector: {matchLabels: {app: friend}}}]
      ports: [{port: web}]
"""
STRANGERS = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends, namespace: x}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: stranger}}}]
"""


def podwire(lab: Lab, *command: str) -> tuple[int, Any]:
    """Exit status and JSON answer of `podwire policy …`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit:
        main.main(["policy", *command, "--lab", lab.name, "--json"])
    assert isinstance(exit.value.code, int)
    text = out.getvalue()
    return exit.value.code, json.loads(text) if text.startswith(("[", "{")) else text


def bpf(lab: Lab, action: str) -> list[dict[str, Any]]:
    """What `podwire bpf ACTION` says of node1: one document, or one per line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main.main(["bpf", action, "--lab", lab.name, "--node", "node1", "--json"])
    text = out.getvalue()
    return [json.loads(text)] if action == "status" else list(map(json.loads, text.splitlines()))


def reaches(lab: Lab, source: str) -> bool:
    fd = lab.netns_fd(source, "x")
    try:
        address = lab.pod("server", "x")["status"]["podIP"]
        return ask(fd, address, 80, timeout_s=0.4).outcome == "ok"
    finally:
        os.close(fd)


@pytest.mark.parametrize("datapath", ["nftables", "ebpf"])
def test_a_policy_from_the_api_to_the_kernel_and_back(
    make_lab: Callable[..., Lab], tmp_path: Path, datapath: str
) -> None:
    if datapath == "ebpf" and missing():
        pytest.skip("no eBPF data path here")
    wiring = "bridge" if datapath == "nftables" else "routed"
    lab = make_lab(datapath=datapath, wiring=wiring)
    lab.apply(manifests.parse(WORLD, "world"))
    lab.wait(30)
    assert podwire(lab, "wait", "x/friends")[0] == 0
    kubeconfig = str(lab.dir.kubeconfig)  # as on a cluster: the nodes' reports, by the API
    assert podwire(lab, "wait", "x/friends", "--kubeconfig", kubeconfig)[0] == 0
    assert reaches(lab, "friend")
    assert not reaches(lab, "stranger")

    status, (answer,) = podwire(lab, "why", "x/friend", "x/server:8080")
    assert status == 1, "a pod and a Service of one name: the pod is meant"
    status, (answer,) = podwire(lab, "why", "x/friend", "x/server:80")
    assert (status, answer["verdict"]) == (0, "allow")
    status, (answer,) = podwire(lab, "why", "x/stranger", "x/server:80", "--node", "node2")
    assert (status, answer["verdict"]) == (1, "deny")
    assert answer["directions"][1]["isolating"] == ["NetworkPolicy x/friends"]

    _, drops = podwire(lab, "drops", "--node", "node1")
    assert [drops["source_name"], drops["policies"]] == ["x/stranger", ["NetworkPolicy x/friends"]]
    counted = {(row["verdict"], *row["policies"]) for row in podwire(lab, "counts")[1]}
    assert {("allow", "NetworkPolicy x/friends"), ("deny", "NetworkPolicy x/friends")} <= counted
    if datapath == "ebpf":
        links = bpf(lab, "status")[0]["links"]
        pods = {link["pod"] for link in links if link["program"] == "from_pod"}
        assert pods >= {"x/server", "x/friend"}
        assert "tcx ingress" in {link["hook"] for link in links}
        (drop,) = bpf(lab, "drops")
        assert [drop["reason"], drop["source_name"], drop["destination_name"], drop["port"]] == [
            "policy", "x/stranger", "x/server", 80,
        ]  # fmt: skip

    new = tmp_path / "new.yaml"
    new.write_text(STRANGERS)
    _, answer = podwire(lab, "diff", "-f", str(new))
    web = {(c["source"], c["after"]) for c in answer["changes"] if c["port"] == 80}
    assert web == {("x/friend", "deny"), ("x/stranger", "allow")}

    agent = lab.process("agent-node1").pid
    os.kill(agent, signal.SIGKILL)
    assert not reaches(lab, "stranger"), "what was closed stays closed without an agent"
    assert reaches(lab, "friend")
    until = time.monotonic() + 20
    while podwire_healthy(lab) is False:
        assert time.monotonic() < until
        time.sleep(0.1)
        assert not reaches(lab, "stranger"), "and while a new one starts"
    lab.apply(manifests.parse(STRANGERS, "new"))
    assert podwire(lab, "wait", "x/friends")[0] == 0
    assert reaches(lab, "stranger")
    assert not reaches(lab, "friend")


def podwire_healthy(lab: Lab) -> bool:
    try:
        return bool(lab.agent("node1", "/v1/status").get("healthy"))
    except Exception:
        return False
