"""The service-proxy suite: the evaluator without packets, every data path with real ones."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from podwire.services import ServiceTable
from tests.conformance import CaseResult, service_suites
from tests.conformance.service_cases import (
    PROTOCOLS,
    Cluster,
    Probe,
    Seen,
    expectation,
    load,
    masquerade_mismatch,
    mismatch,
    probe,
    unknown_keys,
)
from tests.conformance.service_model import Model

TRIES = 48
"""Connections per flow: with three endpoints, 1e-8 is the chance to miss one."""
_FIRST_PORT = 20_000

End = tuple[str, int]


class World(Protocol):
    """A node under test; `begin` makes it a fresh one. It keeps connections until `forget`."""

    def begin(self, cluster: Cluster, family: str) -> None: ...

    def end(self) -> list[str]:
        """Take away what `begin` and `apply` made; what of it is left."""
        ...

    def apply(self, table: ServiceTable) -> None: ...
    def wait(self, seconds: float) -> None: ...
    def forget(self) -> None: ...
    def connect(self, probes: list[Probe]) -> list[Seen]: ...
    def open(self, label: str, probe: Probe) -> Seen: ...
    def proceed(self, label: str) -> Seen:
        """One more packet of the same connection."""
        ...

    def reply(self, label: str) -> tuple[End, End]:
        """The endpoint answers: source and destination of what the client gets."""
        ...

    def icmp_error(self, label: str) -> tuple[str, End, End]:
        """The endpoint refuses: who is told, and the quoted source and destination."""
        ...


def open_world(datapath: str) -> AbstractContextManager[World]:
    if datapath == "evaluator":
        return nullcontext(Model())
    from tests.conformance.service_net import Net

    return Net(datapath)


def run(folder: Path, datapath: str) -> Iterator[CaseResult]:
    with open_world(datapath) as world:
        for name, case in load(folder):
            if isinstance(case, str):
                yield CaseResult(name, "failed", case)
            else:
                yield check(name, case, world)


def check(name: str, case: Mapping[str, Any], world: World) -> CaseResult:
    """One case file on a world."""
    try:
        strange = list(unknown_keys(case))
        if strange:
            problems = strange
        elif case["kind"] == "packet-flow":
            problems = [*_flows(case, world), *world.end()]
        elif case["kind"] == "packet-sequence":
            problems = [*_Sequence(case, world).run(), *world.end()]
        elif case["kind"] in service_suites.SUITES:
            problems = list(service_suites.SUITES[case["kind"]](case))
        else:
            problems = [f"unknown kind {case['kind']!r}"]
    except KeyError as error:
        problems = [f"the case has no {error}"]
    except Exception:  # whatever breaks breaks this case only
        problems = [traceback.format_exc()]
    return CaseResult(name, "failed" if problems else "passed", "\n".join(problems))


def _flows(case: Mapping[str, Any], world: World) -> Iterable[str]:
    cluster = Cluster(case)
    world.begin(cluster, case["family"])
    for number, step in enumerate(case["steps"]):
        world.apply(cluster.apply(step.get("apply") or (), step.get("delete") or ()))
        probes: list[Probe] = []
        for index, flow in enumerate(step.get("flows", ())):
            ports = range(_FIRST_PORT + index * TRIES, _FIRST_PORT + (index + 1) * TRIES)
            probes += [probe(flow, case["family"], port) for port in ports]
        seen = world.connect(probes)
        world.forget()
        for index, flow in enumerate(step.get("flows", ())):
            mine = seen[index * TRIES : (index + 1) * TRIES]
            wrong = mismatch(expectation(flow, cluster.config), flow["from"]["ip"], mine)
            if wrong:
                yield f"step {number} {flow['id']} ({flow.get('name', '')}): {wrong}"


class _Sequence:
    def __init__(self, case: Mapping[str, Any], world: World) -> None:
        self._case = case
        self._world = world
        self._cluster = Cluster(case)
        self._remembered: dict[str, dict[str, set[str]]] = {}
        self._clients: dict[str, str] = {}
        self._next_port = _FIRST_PORT

    def run(self) -> Iterable[str]:
        self._world.begin(self._cluster, self._case["family"])
        for number, event in enumerate(self._case["events"]):
            act = getattr(self, f"_{event['op']}", None)
            wrong = act(event) if act else "the runner does not know this"
            if wrong:
                yield f"event {number} {event['op']}: {wrong}"
        self._world.forget()

    def _apply(self, event: Mapping[str, Any]) -> None:
        self._world.apply(self._cluster.apply(event["objects"]))

    def _delete(self, event: Mapping[str, Any]) -> None:
        self._world.apply(self._cluster.apply([], event["objects"]))

    def _wait(self, event: Mapping[str, Any]) -> None:
        self._world.wait(event["seconds"])

    def _connect(self, event: Mapping[str, Any]) -> str:
        probes: list[Probe] = []
        protocol = PROTOCOLS[event["protocol"], self._case["family"]]
        to = event["to"]
        for client in event["clients"]:
            for _ in range(event["connectionsPerClient"]):
                self._next_port += 1
                probes.append(
                    Probe(
                        event["fromKind"],
                        client,
                        self._next_port,
                        to["ip"],
                        to["port"] or 0,
                        protocol,
                    )
                )
        seen = self._world.connect(probes)
        per_client: dict[str, set[str]] = {client: set() for client in event["clients"]}
        for one, result in zip(probes, seen, strict=True):
            per_client[one.source].add(result.endpoint)
            wrong = _one_mismatch(event["expect"], one.source, result)
            if wrong:
                return wrong
        return self._compare_clients(event["expect"], per_client)

    def _compare_clients(self, expect: Mapping[str, Any], got: dict[str, set[str]]) -> str:
        if expect.get("allEndpointsSeen"):
            seen = set[str]().union(*got.values())
            if seen != set(expect["endpoints"]):
                return f"expected all of {expect['endpoints']}, saw {sorted(seen)}"
        if "endpointsPerClient" in expect:
            for client, endpoints in got.items():
                if len(endpoints) != expect["endpointsPerClient"]:
                    return f"{client} saw {sorted(endpoints)}"
        for rule in ("sameAs", "sameAsUnlessGone", "someClientDiffersFrom"):
            if rule not in expect:
                continue
            before = self._remembered[expect[rule]]
            if rule == "someClientDiffersFrom":
                if got == before:
                    return "every client kept its endpoint"
                continue
            for client, endpoints in got.items():
                if rule == "sameAsUnlessGone" and not before[client] <= set(expect["endpoints"]):
                    continue
                if endpoints != before[client]:
                    return f"{client} had {sorted(before[client])}, now {sorted(endpoints)}"
        if "rememberAs" in expect:
            self._remembered[expect["rememberAs"]] = got
        return ""

    def _open(self, event: Mapping[str, Any]) -> str:
        self._clients[event["label"]] = event["from"]["ip"]
        seen = self._world.open(event["label"], probe(event, self._case["family"]))
        return _one_mismatch(event["expect"], event["from"]["ip"], seen)

    def _continue(self, event: Mapping[str, Any]) -> str:
        seen = self._world.proceed(event["label"])
        return _one_mismatch(event["expect"], self._clients[event["label"]], seen)

    def _reply(self, event: Mapping[str, Any]) -> str:
        source, destination = self._world.reply(event["label"])
        wanted = [_end(event["expect"][k]) for k in ("seenByClientFrom", "deliveredTo")]
        return "" if [source, destination] == wanted else f"got {source} → {destination}"

    def _icmpError(self, event: Mapping[str, Any]) -> str:
        delivered, source, destination = self._world.icmp_error(event["label"])
        expect = event["expect"]
        wanted = (
            expect["deliveredTo"],
            _end(expect["quoted"]["src"]),
            _end(expect["quoted"]["dst"]),
        )
        got = (delivered, source, destination)
        return "" if got == wanted else f"got {got}"


def _end(end: Mapping[str, Any]) -> End:
    return (end["ip"], end["port"])


def _one_mismatch(expect: Mapping[str, Any], client: str, seen: Seen) -> str:
    """One connection: `endpoints` are those admissible."""
    if seen.verdict != expect["verdict"]:
        return f"expected {expect['verdict']}, saw {seen.verdict}"
    if seen.verdict != "dnat":
        return ""
    if seen.endpoint not in expect["endpoints"]:
        return f"expected one of {expect['endpoints']}, saw {seen.endpoint}"
    return masquerade_mismatch(expect, client, seen)
