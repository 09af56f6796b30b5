"""Who reaches whom, tried with real connections: pods, nodes and the outside world to pods and
Services.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from podwire.kernel import netns
from podwire.lab import connect
from podwire.lab.cluster import Lab
from podwire.terminal import live, pad, paint, width

Json: TypeAlias = dict[str, Any]

MOST_PODS = 48  # of more, one of each workload and node stands for the others
_MARKS: Mapping[str, tuple[str, str, str]] = {  # plain, in a terminal, colour
    "ok": (".", "✓", "green"),
    "refused": ("r", "r", "yellow"),
    "unreachable": ("u", "u", "yellow"),
    "timeout": ("X", "✗", "red"),
    "broken": ("?", "?", "red"),
    "": ("-", "·", "dim"),
}
_WORDS = {
    "ok": "reached",
    "refused": "refused",
    "unreachable": "unreachable",
    "timeout": "no answer",
    "broken": "broken",
}


@dataclass(frozen=True)
class Source:
    """Where requests come from."""

    name: str
    where: str  # the node, for pods
    netns: str


@dataclass(frozen=True)
class Target:
    """What is asked. `inside` and `outside` are address and port for the cluster and the world."""

    name: str
    protocol: str
    inside: tuple[str, int]
    outside: tuple[str, int] | None = None


@dataclass(frozen=True)
class Matrix:
    """Outcomes by source and target; "" where nothing was tried (a pod and itself)."""

    sources: Sequence[Source]
    targets: Sequence[Target]
    outcomes: Mapping[tuple[str, str], str]

    def as_json(self) -> Json:
        """``{source: {target: outcome}}``, untried pairs left out."""
        found: Json = {source.name: {} for source in self.sources}
        for (source, target), outcome in self.outcomes.items():
            if outcome:
                found[source][target] = outcome
        return found

    def counts(self) -> dict[str, int]:
        """How many pairs came to each outcome."""
        counts: dict[str, int] = {}
        for outcome in self.outcomes.values():
            if outcome:
                counts[outcome] = counts.get(outcome, 0) + 1
        return counts

    def render(self) -> list[str]:
        """Lines for people: rows are sources, columns targets, numbered as the list below says."""
        letters = [str(number) for number in range(1, len(self.targets) + 1)]
        columns = max(map(len, letters), default=1)
        names = max((width(s.name) for s in self.sources), default=0)
        where = max((width(s.where) for s in self.sources), default=0)
        indent = " " * (names + where + 4)
        lines = [indent + " ".join(paint("dim", n.rjust(columns)) for n in letters)]
        for source in self.sources:
            cells = (
                _mark(self.outcomes[source.name, target.name], columns) for target in self.targets
            )
            name = pad(source.name, names)
            place = paint("dim", pad(source.where, where))
            lines.append(f"{name}  {place}  {' '.join(cells)}")
        lines.append("")
        for number, target in zip(letters, self.targets, strict=True):
            address = paint("dim", _endpoint(target))
            lines.append(f"  {paint('dim', number.rjust(columns))}  {target.name}  {address}")
        legend = (
            f"{_mark(outcome)} {_WORDS[outcome]} {count}"
            for outcome, count in sorted(self.counts().items())
        )
        return [*lines, "", "   ".join(legend)]


def _mark(outcome: str, columns: int = 1) -> str:
    plain, fine, colour = _MARKS[outcome]
    mark = fine if live() else plain
    return " " * (columns - 1) + paint(colour, mark)


def _endpoint(target: Target) -> str:
    address, port = target.inside
    host = f"[{address}]" if ":" in address else address
    return f"{host}:{port}/{target.protocol}"


def measure(lab: Lab, namespace: str = "", timeout_s: float = 1.0) -> Matrix:
    """Try every pair. `namespace` limits the pods and Services; the system's own are left out."""
    path = f"/api/v1/namespaces/{namespace}" if namespace else "/api/v1"
    services = [s for s in lab.items(f"{path}/services") if _shown(s, namespace)]
    pods = [p for p in lab.items(f"{path}/pods") if _shown(p, namespace)]
    pods = _chosen([p for p in pods if p["status"].get("phase") == "Running"])
    sources = [_pod_source(lab, pod) for pod in pods]
    sources += [Source(n, "node", str(lab.dir.netns(f"node-{n}"))) for n in lab.record.nodes]
    sources.append(Source("outside", "world", str(lab.dir.netns("outside"))))
    targets = [t for pod in pods if (t := _pod_target(pod, services)) is not None]
    targets += [t for s in services if (t := _service_target(s, lab.record.nodes)) is not None]
    outcomes: dict[tuple[str, str], str] = {}
    with contextlib.ExitStack() as stack:
        asks: list[connect.Ask] = []
        for source in sources:
            fd = netns.open_path(source.netns)
            stack.callback(os.close, fd)
            for target in targets:
                outcomes[source.name, target.name] = ""
                address = target.outside if source.where == "world" else target.inside
                if address is not None and source.name != target.name:
                    label = (source.name, target.name)
                    asks.append(
                        connect.Ask(fd, *address, target.protocol, timeout_s=timeout_s, label=label)
                    )
        for answer in connect.ask_all(asks):
            outcomes[answer.ask.label] = answer.outcome
    return Matrix(sources, targets, outcomes)


def _shown(obj: Json, namespace: str) -> bool:
    return bool(namespace) or obj["metadata"]["namespace"] != "kube-system"


def _chosen(pods: list[Json]) -> list[Json]:
    """All pods, or of too many one for each workload and node."""
    if len(pods) <= MOST_PODS:
        return pods
    groups: dict[tuple[str, str, str], Json] = {}
    for pod in pods:
        owners: list[Json] = pod["metadata"].get("ownerReferences") or [pod["metadata"]]
        owner = str(owners[0]["name"])
        groups.setdefault((pod["metadata"]["namespace"], owner, pod["spec"]["nodeName"]), pod)
    return list(groups.values())[:MOST_PODS]


def _name(obj: Json) -> str:
    return f"{obj['metadata']['namespace']}/{obj['metadata']['name']}"


def _pod_source(lab: Lab, pod: Json) -> Source:
    node = pod["spec"]["nodeName"]
    what = f"node-{node}" if pod["spec"].get("hostNetwork") else f"pod-{pod['metadata']['uid']}"
    return Source(_name(pod), node, str(lab.dir.netns(what)))


def _pod_target(pod: Json, services: Sequence[Json]) -> Target | None:
    """The first port that the pod declares, else the first that a Service sends to it."""
    ports = [
        (port.get("protocol", "TCP"), port["containerPort"])
        for container in pod["spec"]["containers"]
        for port in container.get("ports", ())
    ]
    labels: dict[str, str] = pod["metadata"].get("labels") or {}
    for service in services:
        selector: dict[str, str] = service["spec"].get("selector") or {}
        same = service["metadata"]["namespace"] == pod["metadata"]["namespace"]
        if same and selector and selector.items() <= labels.items():
            ports += [
                (port.get("protocol", "TCP"), port.get("targetPort") or port["port"])
                for port in service["spec"]["ports"]
            ]
    address = pod["status"].get("podIP")
    usable = [p for p in ports if isinstance(p[1], int) and p[0] != "SCTP"]
    if not address or not usable:
        return None
    protocol, port = usable[0]
    return Target(_name(pod), protocol, (address, port), (address, port))


def _service_target(service: Json, nodes: Mapping[str, Any]) -> Target | None:
    """The first port of a Service; the outside world takes its balancer or node port, if any."""
    spec = service["spec"]
    address = spec.get("clusterIP")
    ports = [p for p in spec.get("ports", ()) if p.get("protocol", "TCP") != "SCTP"]
    if not address or address == "None" or not ports or not spec.get("selector"):
        return None
    port = ports[0]
    outside: tuple[str, int] | None = None
    status: Json = service.get("status") or {}
    balancers: list[Json] = status.get("loadBalancer", {}).get("ingress") or []
    if balancers and balancers[0].get("ip"):
        outside = (balancers[0]["ip"], port["port"])
    elif port.get("nodePort"):
        outside = (next(iter(nodes.values())).addresses[0], port["nodePort"])
    name = f"svc {_name(service)}"
    return Target(name, port.get("protocol", "TCP"), (address, port["port"]), outside)
