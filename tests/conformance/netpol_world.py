"""The cluster of a netpol case: its objects, changed step by step, and its endpoints.

Endpoint names are those of the cases: ``ns/pod``, ``node:NAME``, ``ext:NAME``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from podwire.kube.objects import (
    ClusterNetworkPolicy,
    EndpointSlice,
    Namespace,
    NetworkPolicy,
    Node,
    Pod,
    Resource,
    Service,
)
from podwire.kube.store import ChangeSet, Store
from podwire.net import Protocol, parse_address
from podwire.policy import Attachment, PolicyCompiler, PolicyTable

KINDS: dict[str, type[Resource]] = {
    "NetworkPolicy": NetworkPolicy,
    "ClusterNetworkPolicy": ClusterNetworkPolicy,
}


_PROBE_KEYS = {
    "port", "protocol", "family", "via", "loopback", "from", "to", "expect", "note",
}  # fmt: skip


class Malformed(Exception):
    """A case that does not keep to its format, or to what the runner knows of it."""


def _check_probe(probe: dict[str, Any]) -> None:
    """Raises Malformed where something would silently not be looked at."""
    strange = probe.keys() - _PROBE_KEYS
    if strange:
        raise Malformed(f"the runner does not know {sorted(strange)} of a probe")
    for key, known in (
        ("family", ("IPv4", "IPv6")),
        ("via", ("pod-ip", "service")),
        ("loopback", ("check", "ignore")),
    ):
        if probe.get(key) not in (None, *known):
            raise Malformed(f"the runner does not know {key}: {probe[key]!r}")
    sources, destinations = probe["from"], probe["to"]
    if set(probe["expect"]) != set(sources):
        raise Malformed(f"expect speaks of {sorted(probe['expect'])}, not of {sources}")
    for source, row in probe["expect"].items():
        if len(row) != len(destinations) or set(row) - set(".X?- "):
            raise Malformed(f"the row of {source} is {row!r}, for {len(destinations)} destinations")


@dataclass(frozen=True)
class Probe:
    """A matrix of connections: `expect` has one character per source and destination."""

    port: int
    protocol: Protocol
    bits: int
    via_service: bool
    check_loopback: bool
    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    expect: dict[str, str]

    def cells(self) -> Iterator[tuple[str, str, bool]]:
        """Source, destination, and whether it must connect; cells that say nothing left out."""
        for source in self.sources:
            for destination, cell in zip(self.destinations, self.expect[source], strict=True):
                itself = source == destination and not self.via_service
                if cell in ".X" and (self.check_loopback or not itself):
                    yield source, destination, cell == "."


@dataclass
class World:
    """Objects of the case. `addresses` of every endpoint ever seen, also of deleted pods."""

    store: Store = field(default_factory=Store)
    nodes: dict[str, list[str]] = field(default_factory=dict)
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    external: dict[str, list[str]] = field(default_factory=dict)
    services: dict[str, dict[str, Any]] = field(default_factory=dict)
    counter: int = 0

    @classmethod
    def of(cls, topology: dict[str, Any]) -> World:
        world = cls()
        for namespace in topology.get("namespaces", ()):
            world._namespace(namespace["name"], namespace.get("labels") or {})
        for node in topology.get("nodes", ()):
            world.nodes[node["name"]] = [str(ip) for ip in node.get("ips", ())]
            world._put(
                Node,
                {
                    "metadata": {"name": node["name"], "labels": node.get("labels") or {}},
                    "status": {
                        "addresses": [
                            {"type": "InternalIP", "address": str(ip)} for ip in node.get("ips", ())
                        ]
                    },
                },
            )
        for pod in topology.get("pods", ()):
            world._pod(pod)
        for external in topology.get("external") or ():
            world.external[external["name"]] = [str(ip) for ip in external.get("ips", ())]
        for service in topology.get("services") or ():
            world._service(service)
        return world

    def apply(self, action: dict[str, Any]) -> None:
        """One action of a step."""
        match action["op"]:
            case "apply-policy":
                policy = action["policy"]
                self._put(KINDS[policy["kind"]], policy)
            case "delete-policy":
                kind = KINDS[action.get("kind", "NetworkPolicy")]
                self.store.remove(kind, (action.get("namespace", ""), action["name"]))
            case "create-namespace":
                self._namespace(action["name"], action.get("labels") or {})
            case "delete-namespace":
                name = action["name"]
                for pod in [pod for pod in self.pods if pod.startswith(f"{name}/")]:
                    self._delete_pod(pod)
                for key in [key for key in self.store.all(NetworkPolicy) if key[0] == name]:
                    self.store.remove(NetworkPolicy, key)
                self.store.remove(Namespace, ("", name))
            case "set-namespace-labels":
                self._namespace(action.get("name") or action["namespace"], action["labels"] or {})
            case "create-pod":
                self._pod(action["pod"])
            case "delete-pod":
                self._delete_pod(f"{action['namespace']}/{action['name']}")
            case "set-pod-labels":
                pod = self.pods[f"{action['namespace']}/{action['name']}"]
                self._pod({**pod, "labels": action["labels"] or {}})
            case "set-pod-phase":
                pod = self.pods[f"{action['namespace']}/{action['name']}"]
                self._pod({**pod, "phase": action["phase"]})
            case other:
                raise Malformed(f"unknown action {other!r}")

    def addresses(self, endpoint: str) -> list[str]:
        """Text addresses of a pod, a node or an outside client."""
        if endpoint.startswith("node:"):
            return self.nodes[endpoint[5:]]
        if endpoint.startswith("ext:"):
            return self.external[endpoint[4:]]
        pod = self.pods[endpoint]
        if pod.get("hostNetwork"):
            return self.nodes[pod["node"]]
        return [str(ip) for ip in pod.get("ips", ())]

    def address(self, endpoint: str, bits: int, of_service: bool = False) -> bytes | None:
        """The address of a family (32 or 128 bits). A Service may be called like a pod."""
        texts = self.services[endpoint]["clusterIPs"] if of_service else self.addresses(endpoint)
        packed = (parse_address(text) for text in texts)
        return next((one for one in packed if len(one) * 8 == bits), None)

    def present(self) -> dict[str, dict[str, Any]]:
        """Pods with a link of their own. One that has finished gives way where another pod has
        its address now.
        """
        found = {
            name: pod
            for name, pod in self.pods.items()
            if not pod.get("hostNetwork") and pod.get("ips")
        }
        live = {str(ip) for pod in found.values() if not _finished(pod) for ip in pod["ips"]}
        return {
            name: pod
            for name, pod in found.items()
            if not _finished(pod) or not live.intersection(map(str, pod["ips"]))
        }

    def attachments(self, node: str) -> list[Attachment]:
        """The pods of a node that have a link of their own and run."""
        return [
            Attachment(
                (pod["namespace"], pod["name"]),
                f"pod{index}",
                tuple(parse_address(str(ip)) for ip in pod.get("ips", ())),
            )
            for index, pod in enumerate(self.present().values())
            if pod["node"] == node
        ]

    def backends(self, service: str, port: int, protocol: Protocol) -> list[tuple[str, int]]:
        """Pods behind a Service's port, and the target port on each."""
        source = self.services[service]
        out: list[tuple[str, int]] = []
        for wanted in source["ports"]:
            if wanted["port"] != port or wanted.get("protocol", "TCP") != protocol.name:
                continue
            target = wanted.get("targetPort", wanted["port"])
            for name, pod in self.pods.items():
                labels = pod.get("labels") or {}
                selector = source.get("selector") or {}
                if pod["namespace"] != source["namespace"] or selector.items() - labels.items():
                    continue
                if pod.get("phase", "Running") != "Running":
                    continue
                for one in pod.get("ports", ()):
                    if one.get("protocol", "TCP") == protocol.name and target in (
                        one["port"],
                        one["name"],
                    ):
                        out.append((name, one["port"]))
                        break
        return out

    def probes(self, step: dict[str, Any], all_families: bool) -> list[Probe]:
        """The step's matrices; those that name no family over each that the endpoints share."""
        out: list[Probe] = []
        for probe in step.get("probes") or ():
            _check_probe(probe)
            families = {"IPv4": [32], "IPv6": [128]}.get(probe.get("family"))
            if families is None:
                families = [32, 128] if all_families else [32]
            for bits in families:
                if all(self.address(source, bits) is None for source in probe["from"]):
                    continue
                out.append(
                    Probe(
                        probe["port"],
                        Protocol[probe["protocol"]],
                        bits,
                        probe.get("via") == "service",
                        probe.get("loopback") == "check",
                        tuple(probe["from"]),
                        tuple(probe["to"]),
                        probe["expect"],
                    )
                )
        return out

    def _put(self, kind: type[Resource], source: dict[str, Any]) -> None:
        self.store.put(msgspec.convert(source, kind))

    def _namespace(self, name: str, labels: dict[str, str]) -> None:
        self._put(
            Namespace,
            {"metadata": {"name": name, "labels": {**labels, "kubernetes.io/metadata.name": name}}},
        )

    def _pod(self, pod: dict[str, Any]) -> None:
        self.counter += 1
        name = f"{pod['namespace']}/{pod['name']}"
        self.pods[name] = pod
        host_network = bool(pod.get("hostNetwork"))
        ips = self.nodes[pod["node"]] if host_network else [str(ip) for ip in pod.get("ips", ())]
        ports = [
            {
                "name": port.get("name", ""),
                "containerPort": port["port"],
                "protocol": port.get("protocol", "TCP"),
            }
            for port in pod.get("ports") or ()
        ]
        self._put(
            Pod,
            {
                "metadata": {
                    "namespace": pod["namespace"],
                    "name": pod["name"],
                    "labels": pod.get("labels") or {},
                    "uid": pod.get("uid", ""),
                    "creationTimestamp": f"2026-01-01T00:00:{self.counter:02}Z",
                },
                "spec": {
                    "nodeName": pod["node"],
                    "hostNetwork": host_network,
                    "containers": [{"name": "c", "ports": ports}],
                },
                "status": {
                    "phase": pod.get("phase", "Running"),
                    "podIP": ips[0] if ips else "",
                    "podIPs": [{"ip": ip} for ip in ips],
                },
            },
        )

    def _service(self, source: dict[str, Any]) -> None:
        """Cluster IPs are given where the case names none: one of each family."""
        given = source.get("clusterIPs") or source.get("ips") or source.get("clusterIP")
        ips = [given] if isinstance(given, str) else [str(ip) for ip in given or ()]
        number = len(self.services) + 10
        ips = ips or [f"10.96.0.{number}", f"fd00:10:96::{number:x}"]
        name = f"{source['namespace']}/{source['name']}"
        self.services[name] = {**source, "clusterIPs": ips}
        ports = [
            {
                "name": port.get("name", f"p{port['port']}"),
                "port": port["port"],
                "protocol": port.get("protocol", "TCP"),
            }
            for port in source.get("ports", ())
        ]
        self._put(
            Service,
            {
                "metadata": {"namespace": source["namespace"], "name": source["name"]},
                "spec": {"clusterIP": ips[0], "clusterIPs": ips, "ports": ports},
            },
        )

    def slices(self) -> None:
        """Bring the endpoints of all Services up to date, one slice per port, pod and family."""
        wanted: dict[tuple[str, str], dict[str, Any]] = {}
        for name, service in self.services.items():
            for port in service["ports"]:
                protocol = port.get("protocol", "TCP")
                backends = self.backends(name, port["port"], Protocol[protocol])
                for index, (pod, target) in enumerate(backends):
                    for text in self.addresses(pod):
                        family = "IPv6" if ":" in text else "IPv4"
                        short = f"{service['name']}-{protocol}-{port['port']}-{index}-{family}"
                        wanted[service["namespace"], short.lower()] = {
                            "metadata": {
                                "namespace": service["namespace"],
                                "name": short.lower(),
                                "labels": {"kubernetes.io/service-name": service["name"]},
                            },
                            "addressType": family,
                            "endpoints": [
                                {"addresses": [text], "nodeName": self.pods[pod]["node"]}
                            ],
                            "ports": [
                                {
                                    "name": port.get("name", f"p{port['port']}"),
                                    "port": target,
                                    "protocol": protocol,
                                }
                            ],
                        }
        for key in [key for key in self.store.all(EndpointSlice) if key not in wanted]:
            self.store.remove(EndpointSlice, key)
        for source in wanted.values():
            self._put(EndpointSlice, source)

    def _delete_pod(self, name: str) -> None:
        namespace, _, short = name.partition("/")
        self.pods.pop(name, None)
        self.store.remove(Pod, (namespace, short))


def _finished(pod: dict[str, Any]) -> bool:
    return pod.get("phase") in ("Succeeded", "Failed")


class Compilers:
    """One compiler per node of the case, fed with the same objects."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._compilers = {node: PolicyCompiler(node) for node in world.nodes}
        self._attached: dict[str, dict[tuple[str, str], Attachment]] = {n: {} for n in world.nodes}

    def update(self) -> dict[str, PolicyTable]:
        """The nodes' tables."""
        changes: ChangeSet = self._world.store.take()
        tables: dict[str, PolicyTable] = {}
        for node, compiler in self._compilers.items():
            wanted = {a.pod: a for a in self._world.attachments(node)}
            attached = self._attached[node]
            for pod in attached.keys() - wanted.keys():
                compiler.detach(pod)
            for pod, attachment in wanted.items():
                if attached.get(pod) != attachment:
                    compiler.attach(attachment)
            self._attached[node] = wanted
            tables[node] = compiler.update(changes)
        return tables
