"""`podwire lab …` as people type it, and `make demo`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from podwire.lab import teardown
from podwire.lab.cluster import Lab
from podwire.lab.state import LabDir
from tests.lab.conftest import left_of

NAME = f"pwt-{os.getpid()}-cli"
MANIFEST = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: example.org/v1
kind: Teapot
metadata: {name: t}
"""


def podwire(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command line, with $PODWIRE_LAB naming the lab of this test."""
    return subprocess.run(
        [sys.executable, "-m", "podwire", *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "PODWIRE_LAB": NAME},
    )


@pytest.fixture(scope="module")
def up() -> Iterator[subprocess.CompletedProcess[str]]:
    yield podwire("lab", "up", "-f", "-", stdin=MANIFEST)
    teardown.down(LabDir(NAME))


def test_up_waits_until_all_is_ready(up: subprocess.CompletedProcess[str]) -> None:
    assert up.returncode == 0, up.stderr
    assert f"lab {NAME} is up: 2 nodes" in up.stdout
    assert "nothing here acts on it: Teapot" in up.stdout
    assert "\x1b" not in up.stdout  # not a terminal: plain
    listed = podwire("lab", "ls", "--name", NAME).stdout
    assert listed.count("Running") >= 2
    assert "NotReady" not in listed
    assert podwire("lab", "status").returncode == 0
    assert json.loads(podwire("lab", "status", "--json").stdout)["well"] is True
    again = podwire("lab", "up")
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_exec_runs_in_the_pod_with_its_names(up: subprocess.CompletedProcess[str]) -> None:
    script = "getent hosts web >/dev/null && hostname && cat && exit 5"
    ran = podwire("lab", "exec", "web", "--", "sh", "-c", script, stdin="from outside")
    assert ran.returncode == 5, ran.stderr
    assert ran.stdout.startswith("web-")
    assert ran.stdout.endswith("from outside")
    missing = podwire("lab", "exec", "nobody", "--", "true")
    assert missing.returncode == 1
    assert "no pod nobody in namespace default; there are: web-" in missing.stderr
    assert "cannot run" in podwire("lab", "exec", "web", "--", "/no/such").stderr
    on_node = podwire("lab", "exec", "node/node2", "--", "hostname")
    assert on_node.stdout == "node2\n"


def test_reach_shows_who_reaches_whom(up: subprocess.CompletedProcess[str]) -> None:
    found = json.loads(podwire("lab", "reach", "--json").stdout)
    pods = [name for name in found if name.startswith("default/web-")]
    assert len(pods) == 2
    assert found[pods[0]] == {pods[1]: "ok", "svc default/web": "ok"}
    assert set(found["outside"].values()) == {"timeout"}
    shown = podwire("lab", "reach").stdout
    assert ". reached 10" in shown
    assert "X no answer 2" in shown
    logs = podwire("lab", "logs", "web").stdout.splitlines()
    assert logs
    assert all(" protocol=TCP port=80 client=" in line for line in logs)


def test_agents_of_the_named_lab_are_asked(up: subprocess.CompletedProcess[str]) -> None:
    """$PODWIRE_LAB holds for them too, and the node of the client's pod decides."""
    assert podwire("status").stdout.count("healthy") == 2
    for pod in Lab(NAME).items("/api/v1/namespaces/default/pods"):
        words = ("services", "resolve", f"default/{pod['metadata']['name']}", "default/web:80")
        answer = json.loads(podwire(*words, "--json").stdout)
        node = pod["spec"]["nodeName"]
        assert (answer["node"], answer["from"]) == (node, f"a pod of {node}")
        kept = [each for each in answer["backends"] if not each["masquerade"]]
        assert len(kept) == len(answer["backends"]) - 1 == 1  # all but the way to itself
        other = "node1" if node == "node2" else "node2"
        assert f"{node} decides" in podwire(*words, "--node", other).stdout


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
def test_kubectl_works_with_the_kubeconfig(up: subprocess.CompletedProcess[str]) -> None:
    path = podwire("lab", "kubeconfig").stdout.strip()
    assert podwire("lab", "kubeconfig", "--shell").stdout == f"export KUBECONFIG={path}\n"
    command = ["kubectl", "--kubeconfig", path, "get", "deployment", "web", "-o", "name"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert found.stdout == "deployment.apps/web\n"
    assert Path(path).stat().st_mode & 0o077 == 0


def test_a_malformed_manifest_changes_nothing(
    up: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("{apiVersion: v1, kind: Namespace, metadata: {name: new}}\n---\n{a: [}\n")
    answer = podwire("lab", "apply", "-f", str(bad))
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"podwire: {bad}, document 2: line 3")
    assert len(answer.stderr.splitlines()) == 1
    namespaces = Lab(NAME).items("/api/v1/namespaces")
    assert "new" not in [namespace["metadata"]["name"] for namespace in namespaces]


def test_apply_and_delete_say_what_they_did(up: subprocess.CompletedProcess[str]) -> None:
    pod = "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c}]}}"
    assert podwire("lab", "apply", "-f", "-", stdin=pod).stdout == "Pod default/p created\n"
    assert podwire("lab", "apply", "-f", "-", stdin=pod).stdout == "Pod default/p unchanged\n"
    assert podwire("lab", "delete", "-f", "-", stdin=pod).stdout == "Pod default/p deleted\n"
    refused = podwire("lab", "apply", "-f", "-", "--no-wait", stdin=pod.replace("name: c", "x: c"))
    assert refused.returncode == 1
    assert "Pod p: " in refused.stdout


def test_the_demo_proves_everything_and_leaves_nothing() -> None:
    command = [sys.executable, "-m", "podwire.lab.demo"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "FAILED" not in ran.stdout
    assert "proofs hold" in ran.stdout
    names = [word for word in ran.stdout.split() if word.startswith("demo-")]
    assert all(left_of(name) == [] for name in names)
