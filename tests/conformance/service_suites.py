"""The service-proxy suites that need no packets: tables, decisions, the health server."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from podwire.agent.health import ServiceHealth
from podwire.kernel import link, netns
from podwire.kernel.netlink import NetlinkSocket
from podwire.kube.objects import EndpointHints, Hint
from podwire.net import Protocol, format_address, parse_address
from podwire.services import NodeFacts, ProxyConfig, backend, format_backend
from podwire.services.endpoints import LOCAL, READY, SERVING, TERMINATING, State, select
from podwire.services.nodeports import nodeport_scopes, selected_addresses
from podwire.services.stale import Flow, StaleFlows
from tests.conformance.service_cases import Cluster, object_key, parse_end


def _endpoint_selection(case: Mapping[str, Any]) -> Iterable[str]:
    service = case["service"]
    external = service["externallyAccessible"]
    internal_local = service["internalTrafficPolicy"] == "Local"
    uses_cluster = external or not internal_local
    uses_local = internal_local or (external and service["externalTrafficPolicy"] == "Local")
    endpoints: dict[bytes, State] = {}
    for said in case["endpoints"]:
        address, port = parse_end(said["endpoint"])
        bits = (
            READY * said["ready"]
            | SERVING * said["serving"]
            | TERMINATING * said["terminating"]
            | LOCAL * said["local"]
        )
        hints = EndpointHints(
            for_zones=[Hint(name=zone) for zone in said.get("zoneHints") or ()],
            for_nodes=[Hint(name=node) for node in said.get("nodeHints") or ()],
        )
        endpoints[backend(parse_address(address), port)] = State(bits, hints)
    chosen = select(
        endpoints,
        uses_cluster=uses_cluster,
        uses_local=uses_local,
        node_name=case["node"]["name"],
        zone=case["node"]["labels"].get("topology.kubernetes.io/zone", ""),
    )
    expect = case["expect"]
    for field, got in (
        ("clusterEndpoints", chosen.cluster),
        ("localEndpoints", chosen.local),
        ("allEndpoints", {*chosen.cluster, *chosen.local}),
    ):
        if sorted(map(format_backend, got)) != sorted(expect[field] or []):
            yield f"{field}: expected {expect[field]}, got {sorted(map(format_backend, got))}"
    if chosen.has_endpoints != expect["hasAnyEndpoints"]:
        yield f"hasAnyEndpoints: got {chosen.has_endpoints}"


def _conntrack_cleanup(case: Mapping[str, Any]) -> Iterable[str]:
    cluster = Cluster(case)
    removed = case.get("removedObjects", [])
    before = cluster.apply([*removed, *case["objects"]])
    still = {(obj["kind"], object_key(obj)) for obj in case["objects"]}
    gone = [obj for obj in removed if (obj["kind"], object_key(obj)) not in still]
    after = cluster.apply([], gone)
    changes = {**after.delta(None).ports, **after.delta(before).ports}
    stale = StaleFlows(changes.values(), after.settings)
    for entry in case["entries"]:
        flow = Flow(
            parse_address(entry["originalDst"]["ip"]),
            entry["originalDst"]["port"],
            parse_address(entry["replySrc"]["ip"]),
            entry["replySrc"]["port"],
        )
        deleted = entry["protocol"] == Protocol.UDP.name and flow in stale
        if deleted != (entry["expect"] == "deleted"):
            yield f"{entry}: {'deleted' if deleted else 'kept'}"


def _nodeport_addresses(case: Mapping[str, Any]) -> Iterable[str]:
    addresses = [
        parse_address(text.partition("/")[0])
        for interface in case["interfaces"]
        for text in interface["addresses"]
    ]
    config = ProxyConfig(nodeport_addresses=tuple(case["nodePortAddresses"]))
    scopes = nodeport_scopes(config, NodeFacts("node", tuple(addresses)))
    for family, name in ((4, "IPv4"), (6, "IPv6")):
        expect = case["expect"][name]
        scope = scopes[family]
        if (scope.prefixes is None) != expect["matchAll"]:
            yield f"{name}: matchAll is {scope.prefixes is None}"
        got = sorted(map(format_address, selected_addresses(scope, family, addresses)))
        if got != sorted(expect["addresses"]):
            yield f"{name}: expected {expect['addresses']}, got {got}"


def _no_local_endpoints(case: Mapping[str, Any]) -> Iterable[str]:
    table = Cluster(case).apply(case["objects"])
    family = 6 if case.get("family") == "IPv6" else 4
    for policy, wanted in case["expect"].items():
        got = table.without_local.get((family, policy), 0)
        if got != wanted:
            yield f"{policy}: expected {wanted}, got {got}"


def _service_health(case: Mapping[str, Any]) -> Iterable[str]:
    """Ask the real server, in a namespace of its own."""
    fd = netns.create()
    try:
        with NetlinkSocket(netns_fd=fd) as sock:
            sock.run(link.change("lo", up=True))
        return asyncio.run(_ask_health(case, fd))
    finally:
        os.close(fd)


async def _ask_health(case: Mapping[str, Any], fd: int) -> list[str]:
    cluster = Cluster(case)
    service = case["service"]
    cluster.apply([service])
    healthy = True
    server = ServiceHealth(fd)
    running = asyncio.create_task(server.run(lambda: healthy))
    problems: list[str] = []
    try:
        for number, step in enumerate(case["steps"]):
            table = cluster.apply(step["slices"])
            server.follow(table)
            await asyncio.sleep(0)  # the server takes its turn
            (check,) = table.health_checks.values()
            if check.local_endpoints != step["localReadyEndpoints"]:
                problems.append(f"step {number}: {check.local_endpoints} local endpoints")
            for expect in step["responses"]:
                healthy = expect["proxyHealthy"]
                answer = await asyncio.to_thread(_get, fd, service["spec"]["healthCheckNodePort"])
                problems += [f"step {number}: {wrong}" for wrong in _differences(answer, expect)]
    finally:
        running.cancel()
        await asyncio.wait([running])
    return problems


def _get(fd: int, port: int) -> tuple[int, Mapping[str, str], Any]:
    with netns.socket(fd, socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        deadline = time.monotonic() + 10
        while sock.connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
            time.sleep(0.002)  # the server has not got its turn yet
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")
        response = http.client.HTTPResponse(sock)
        response.begin()
        return response.status, dict(response.getheaders()), json.loads(response.read())


def _differences(
    answer: tuple[int, Mapping[str, str], Any], expect: Mapping[str, Any]
) -> Iterable[str]:
    status, headers, body = answer
    if (status, body) != (expect["status"], expect["body"]):
        yield f"expected {expect['status']} {expect['body']}, got {status} {body}"
    for name, value in expect["headers"].items():
        if headers.get(name) != value:
            yield f"expected {name}: {value}, got {headers.get(name)}"


def _each(
    check: Callable[[Mapping[str, Any]], Iterable[str]],
) -> Callable[[Mapping[str, Any]], Iterable[str]]:
    """A suite file: `check` for every case in it."""

    def run(file: Mapping[str, Any]) -> Iterable[str]:
        for case in file["cases"]:
            for wrong in check(case):
                yield f"{case['id']}: {wrong}"

    return run


SUITES: Mapping[str, Callable[[Mapping[str, Any]], Iterable[str]]] = {
    "endpoint-selection": _each(_endpoint_selection),
    "conntrack-cleanup": _each(_conntrack_cleanup),
    "nodeport-addresses": _each(_nodeport_addresses),
    "no-local-endpoints-metric": _each(_no_local_endpoints),
    "service-health": _each(_service_health),
}
