"""The manifests agree with the code: rights, probes, arguments, folders shared with the host."""

from __future__ import annotations

import argparse
import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from podwire.agent import parts
from podwire.agent.endpoints import Endpoints, Health
from podwire.agent.metrics import Metrics
from podwire.agent.options import Options
from podwire.cli.agent import options_from
from podwire.cni import conflist, installation
from podwire.kube import objects
from podwire.kube.resources import ENDPOINTS

ROOT = Path(__file__).resolve().parents[3]
VERBS = {"get", "list", "watch", "patch", "create", "update", "delete"}


def manifests(name: str) -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((ROOT / "deploy" / name).read_text())
    return {document["kind"]: document for document in documents}


PODWIRE = manifests("podwire.yaml")
POD = PODWIRE["DaemonSet"]["spec"]["template"]["spec"]
UNINSTALL = manifests("uninstall.yaml")["DaemonSet"]["spec"]["template"]["spec"]
AGENT = POD["containers"][0]
CONTAINERS = {
    (name, each["name"]): (each, spec)
    for name, spec in (("podwire", POD), ("uninstall", UNINSTALL))
    for each in spec["initContainers"] + spec["containers"]
    if each["command"][0] == "podwire"
}


def right(kind: type[objects.Resource], verb: str, subresource: str = "") -> tuple[str, ...]:
    group = ENDPOINTS[kind].prefix.removeprefix("/api").removeprefix("s/").split("/")[0]
    plural = "/".join(filter(None, (ENDPOINTS[kind].plural, subresource)))
    return group, plural, verb


def calls_of_the_client(path: Path) -> set[tuple[str, ...]]:
    """The rights that direct calls ``client.verb(Kind, …)`` in this source need."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="client"), attr=verb),
                args=[ast.Name(id=name), *_],
            ) if verb in VERBS:
                words = {each.arg: each.value for each in node.keywords}
                below = ast.literal_eval(words["subresource"]) if "subresource" in words else ""
                found.add(right(getattr(objects, name), verb, below))
    return found


def test_the_agent_may_do_what_it_does_and_no_more(monkeypatch) -> None:
    monkeypatch.setenv("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true")
    kinds = {*parts.kinds(Options()), *parts.kinds(Options(wiring="vpc"))}
    needed = {right(kind, verb) for kind in kinds for verb in ("list", "watch")}
    for source in (ROOT / "podwire" / "agent").rglob("*.py"):
        needed |= calls_of_the_client(source)
    for kind in (objects.NetworkPolicy, objects.ClusterNetworkPolicy):
        needed.add(right(kind, "get"))  # `podwire policy wait`, asked inside the pod
    granted = {
        (group, resource, verb)
        for rule in PODWIRE["ClusterRole"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert ("", "nodes/status", "patch") in needed  # the calls were found at all
    assert granted == needed


def test_the_account_is_bound_to_its_role() -> None:
    account, binding = PODWIRE["ServiceAccount"]["metadata"], PODWIRE["ClusterRoleBinding"]
    assert binding["roleRef"]["name"] == PODWIRE["ClusterRole"]["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", **account}]
    assert POD["serviceAccountName"] == account["name"]


@pytest.mark.parametrize("probe", ["livenessProbe", "readinessProbe"])
def test_probes_ask_what_the_agent_answers(probe: str) -> None:
    get = AGENT[probe]["httpGet"]
    host, _, port = Options().healthz_bind_address.rpartition(":")
    assert (get["port"], host) == (int(port), "0.0.0.0")
    health = Endpoints(Metrics(), Health(timeout_s=1), dict).health_application()
    assert get["path"] in {resource.canonical for resource in health.router.resources()}


@pytest.mark.parametrize("key", CONTAINERS, ids="/".join)
def test_commands_are_understood(key: tuple[str, str]) -> None:
    _, command, *arguments = CONTAINERS[key][0]["command"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"podwire.cli.{command}").configure(parser)
    args = parser.parse_args(arguments)
    if command == "agent":
        assert options_from(args).parts == Options().parts


@pytest.mark.parametrize("key", CONTAINERS, ids="/".join)
def test_mounts_are_the_folders_of_the_host(key: tuple[str, str]) -> None:
    container, spec = CONTAINERS[key]
    volumes = {each["name"]: each["hostPath"]["path"] for each in spec["volumes"]}
    for mount in container["volumeMounts"]:
        assert mount["mountPath"].removeprefix("/host") == volumes[mount["name"]]
    places = {each["mountPath"] for each in container["volumeMounts"]}
    options = Options()
    needed = {
        ("podwire", "install"): {f"/host{installation.BIN_DIR}"},
        ("podwire", "agent"): {str(options.run_dir), str(options.state_dir), str(conflist.FOLDER),
                               "/sys/fs/bpf", "/sys/fs/cgroup", "/run/netns"},
        ("uninstall", "files"): {f"/host{installation.BIN_DIR}", str(conflist.FOLDER)},
        ("uninstall", "kernel"): {"/sys/fs/bpf"},
    }  # fmt: skip
    assert needed[key] <= places
    for flag in container["command"]:
        if flag.startswith("--cni-bin-dir="):
            assert flag.removeprefix("--cni-bin-dir=") in places


def test_every_volume_is_used() -> None:
    for spec in (POD, UNINSTALL):
        used = {
            mount["name"]
            for container in spec["initContainers"] + spec["containers"]
            for mount in container.get("volumeMounts", [])
        }
        assert used == {volume["name"] for volume in spec["volumes"]}
