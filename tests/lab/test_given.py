"""Whole applications from public projects come up unchanged, and their Services answer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from podwire.kernel import netns
from podwire.lab import connect, manifests
from podwire.lab.cluster import Lab

GIVEN = Path(__file__).parents[3] / "shared" / "manifests" / "given"
APPLICATIONS = (
    "guestbook-all-in-one",
    "online-boutique",
    "starwars-http-sw-app",
    "service-dual-stack-tcp-echo",
    "service-etp-local",
    "service-nodeport-vtctld",
)

pytestmark = [
    pytest.mark.skipif(not GIVEN.is_dir(), reason=f"{GIVEN} is not here"),
]


@pytest.fixture(scope="module")
def lab(module_lab: Callable[..., Lab]) -> Lab:
    """One dual-stack lab with each application in a namespace of its own."""
    lab = module_lab(dual_stack=True)
    for application in APPLICATIONS:
        lab.apply(
            manifests.parse(
                f"{{apiVersion: v1, kind: Namespace, metadata: {{name: {application}}}}}", "here"
            )
        )
        found = manifests.read([str(GIVEN / f"{application}.yaml")])
        results = lab.apply(found, application)
        assert [r for r in results if r["verb"] != "created" or not r["known"]] == []
    lab.wait()
    return lab


def selected(pods: list[dict[str, Any]], service: dict[str, Any]) -> list[dict[str, Any]]:
    selector = service["spec"]["selector"].items()
    return [p for p in pods if selector <= (p["metadata"].get("labels") or {}).items()]


@pytest.mark.parametrize("application", APPLICATIONS)
def test_every_service_answers_from_every_pod(lab: Lab, application: str) -> None:
    pods = lab.items(f"/api/v1/namespaces/{application}/pods")
    services = [
        s
        for s in lab.items(f"/api/v1/namespaces/{application}/services")
        if s["spec"].get("selector")
    ]
    assert services
    with contextlib.ExitStack() as stack:
        asks: list[connect.Ask] = []
        for pod in pods or lab.items("/api/v1/namespaces/guestbook-all-in-one/pods"):
            fd = netns.open_path(lab.dir.netns(f"pod-{pod['metadata']['uid']}"))
            stack.callback(os.close, fd)
            for service in services:
                backends = {p["metadata"]["name"] for p in selected(pods, service)}
                for address in service["spec"]["clusterIPs"]:
                    for port in service["spec"]["ports"]:
                        label = (pod["metadata"]["name"], service["metadata"]["name"], backends)
                        asks.append(
                            connect.Ask(fd, address, port["port"], timeout_s=5, label=label)
                        )
        for answer in connect.ask_all(asks):
            *who, backends = answer.ask.label
            if backends:
                assert answer.outcome == "ok", (who, answer.ask.port, answer.outcome)
                assert answer.seen["pod"] in backends
            else:  # vtctld comes without its pods
                assert answer.outcome == "refused", (who, answer.outcome)


def test_names_resolve_and_balancers_are_reached_from_outside(lab: Lab) -> None:
    resolved = lab.run("xwing", ["getent", "hosts", "deathstar"], namespace="starwars-http-sw-app")
    service = "/api/v1/namespaces/starwars-http-sw-app/services/deathstar"
    assert resolved.stdout.split()[0] == lab.api("GET", service)["spec"]["clusterIP"]
    outside = lab.netns_fd("outside")
    try:
        for namespace, name in (
            ("service-etp-local", "lb-service-local"),
            ("online-boutique", "frontend-external"),
        ):
            status = lab.api("GET", f"/api/v1/namespaces/{namespace}/services/{name}")["status"]
            address = status["loadBalancer"]["ingress"][0]["ip"]
            answer = connect.ask(outside, address, 80)
            assert answer.outcome == "ok"
            local = name == "lb-service-local"
            assert answer.seen["client"].startswith("203.0.113.10:") == local
    finally:
        os.close(outside)


def test_policies_and_unknown_kinds_are_accepted(lab: Lab) -> None:
    for path in sorted([*GIVEN.glob("recipe-*.yaml"), *GIVEN.glob("starwars-sw_*.yaml")]):
        results = lab.apply(manifests.read([str(path)]), "default")
        assert [r for r in results if r["verb"] == "failed"] == [], path.name
