"""EndpointSlices (and the older Endpoints) of Services with a selector.

Source: EndpointSlice API documentation, KEP-0752, KEP-1672 (terminating), KEP-3015
(trafficDistribution); pkg/controller/endpointslice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from podwire.kube.labels import HEADLESS, SERVICE_NAME, ZONE
from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.registry import Registry
from podwire.lab.api.storage import Event, Key, Record
from podwire.lab.controllers.base import (
    Controller,
    controller_of,
    is_done,
    is_going,
    is_ready,
    labels,
    owner_reference,
)
from podwire.lab.controllers.owners import OwnerIndex

MAX_ENDPOINTS = 100
_MANAGER = "endpointslice-controller.k8s.io"
_MANAGED_BY = "endpointslice.kubernetes.io/managed-by"

Ports: TypeAlias = tuple[tuple[str, int | None, str, str], ...]  # name, port, protocol, appProtocol


class Group(NamedTuple):
    """Endpoints of one slice share family and ports."""

    family: str
    ports: Ports


class EndpointSliceController(Controller):
    """Keys are Services. Gathers events shortly: pods come ready in bursts."""

    kinds = ("Service", "Pod", "EndpointSlice", "Node")

    delay_s = 0.01

    def __init__(self, registry: Registry, owners: OwnerIndex) -> None:
        super().__init__(registry)
        self._owners = owners
        self._services = registry.resource("Service")
        self._pods = registry.resource("Pod")
        self._nodes = registry.resource("Node")
        self._slices = registry.resource("EndpointSlice", "discovery.k8s.io/v1")
        self._endpoints = registry.resource("Endpoints")
        self._selecting: dict[str, dict[Key, Json]] = {}  # namespace → Service → selector
        self._members: dict[Key, dict[Key, None]] = {}  # Service → pods
        self._services_of: dict[Key, list[Key]] = {}  # pod → Services

    def wants(self, event: Event) -> Iterable[Key]:
        resource, record = event.resource, event.record
        if resource == self._services:
            self._note(event)
            yield record.key
        elif resource == self._pods:
            yield from self._membership(event)
        elif resource == self._slices:
            owner = controller_of(record.obj)
            if owner.get("kind") == "Service":
                yield (record.key[0], owner["name"])
        elif resource == self._nodes and (
            event.old is None or labels(event.old).get(ZONE) != labels(record).get(ZONE)
        ):
            for services in self._selecting.values():
                yield from services

    def _note(self, event: Event) -> None:
        """A Service with another selector has other pods."""
        key = event.record.key
        home = self._selecting.setdefault(key[0], {})
        selector = tree.mapping(event.record.obj, "spec", "selector")
        if event.type == "DELETED":
            selector = {}
        if home.get(key, {}) == selector:
            return
        home.pop(key, None)
        for pod in self._members.pop(key, ()):
            self._services_of[pod].remove(key)
        if not selector:
            return
        home[key] = selector
        members = self._members[key] = {}
        for pod in self.registry.storage.collection(self._pods).within(key[0]):
            if _selects(selector, labels(pod)):
                members[pod.key] = None
                self._services_of.setdefault(pod.key, []).append(key)

    def _membership(self, event: Event) -> Iterable[Key]:
        """The Services that a pod's event concerns; only other labels need other Services."""
        key, record = event.record.key, event.record
        before = self._services_of.get(key, [])
        if event.type == "DELETED":
            now: list[Key] = []
        elif event.old and labels(event.old) == labels(record):
            return before
        else:
            home = self._selecting.get(key[0], {})
            now = [one for one, selector in home.items() if _selects(selector, labels(record))]
        for service in before:
            if service not in now:
                del self._members[service][key]
        for service in now:
            self._members[service][key] = None
        if now:
            self._services_of[key] = now
        else:
            self._services_of.pop(key, None)
        return dict.fromkeys([*before, *now])

    def reconcile(self, key: Key) -> None:
        service = self.registry.find(self._services, *key)
        if service is None or is_going(service):
            return  # what it owned is collected
        selector = tree.mapping(service.obj, "spec", "selector")
        if not selector or tree.text(service.obj, "spec", "type") == "ExternalName":
            return
        found = (self.registry.find(self._pods, *pod) for pod in sorted(self._members[key]))
        pods = [pod for pod in found if pod and not is_done(pod.obj)]
        wanted = self._wanted(service.obj, pods)
        existing = [
            piece
            for piece in self._owners.controlled(service, "EndpointSlice")
            if labels(piece).get(_MANAGED_BY) == _MANAGER
        ]
        for family in tree.texts(service.obj, "spec", "ipFamilies"):
            if not any(group.family == family for group in wanted):
                wanted[Group(family, ())] = {}  # one empty slice says: known, and nobody there
        for group in {_group_of(piece.obj): None for piece in existing} | wanted:
            mine = [piece for piece in existing if _group_of(piece.obj) == group]
            self._fit(service, group, wanted.get(group), mine)
        self._mirror(service, wanted)

    # --- what there should be ------------------------------------------------------------------

    def _wanted(self, service: Json, pods: Sequence[Record]) -> dict[Group, dict[str, Json]]:
        """Group → address → endpoint."""
        out: dict[Group, dict[str, Json]] = {}
        for pod in pods:
            ports = _ports(service, pod.obj)
            for family in tree.texts(service, "spec", "ipFamilies"):
                if address := _address(pod.obj, family):
                    endpoint = self._endpoint(service, pod, address)
                    out.setdefault(Group(family, ports), {})[address] = endpoint
        return out

    def _endpoint(self, service: Json, pod: Record, address: str) -> Json:
        ready, going = is_ready(pod.obj), is_going(pod)
        unready_too = bool(tree.value(service, "spec", "publishNotReadyAddresses"))
        out: Json = {
            "addresses": [address],
            "conditions": {
                "ready": unready_too or (ready and not going),
                "serving": ready,
                "terminating": going,
            },
            "targetRef": {
                "kind": "Pod",
                "namespace": pod.key[0],
                "name": pod.key[1],
                "uid": pod.obj["metadata"]["uid"],
            },
        }
        spec = tree.mapping(pod.obj, "spec")
        if spec.get("hostname") and spec.get("subdomain") == service["metadata"]["name"]:
            out["hostname"] = spec["hostname"]
        if node := tree.text(spec, "nodeName"):
            out["nodeName"] = node
            found = self.registry.find(self._nodes, "", node)
            if found and (zone := labels(found).get(ZONE)):
                out["zone"] = zone
        if hints := _hints(service, out):
            out["hints"] = hints
        return out

    # --- from what there is to what there should be -----------------------------------------------

    def _fit(
        self,
        service: Record,
        group: Group,
        wanted: dict[str, Json] | None,
        existing: list[Record],
    ) -> None:
        """Change as few slices as possible: endpoints stay where they are."""
        if wanted is None:
            for piece in existing:
                self.delete(self._slices, piece.key)
            return
        missing = dict(wanted)
        kept: list[tuple[Record, list[Json]]] = []
        for piece in existing:
            stay: list[Json] = []
            for endpoint in tree.mappings(piece.obj, "endpoints"):
                if new := missing.pop(tree.texts(endpoint, "addresses")[0], None):
                    stay.append(new)
            kept.append((piece, stay))
        fresh = list(missing.values())
        for piece, endpoints in sorted(kept, key=lambda one: -len(one[1])):
            room = MAX_ENDPOINTS - len(endpoints)
            endpoints += fresh[:room]
            del fresh[:room]
            last = not wanted and piece is existing[0]
            if endpoints or last:
                self._update(service, piece, group, endpoints)
            else:
                self.delete(self._slices, piece.key)
        while fresh or (not existing and not wanted):
            self._create(service, group, fresh[:MAX_ENDPOINTS])
            if not fresh:
                return
            del fresh[:MAX_ENDPOINTS]

    def _update(self, service: Record, piece: Record, group: Group, endpoints: list[Json]) -> None:
        metadata = {**piece.obj["metadata"], "labels": _slice_labels(service.obj)}
        ports = _port_list(group.ports)
        self.registry.amend(
            self._slices, piece.key, metadata=metadata, endpoints=endpoints, ports=ports
        )

    def _create(self, service: Record, group: Group, endpoints: list[Json]) -> None:
        name = service.obj["metadata"]["name"]
        self.registry.create(
            self._slices,
            service.key[0],
            {
                "metadata": {
                    "generateName": f"{name}-",
                    "labels": _slice_labels(service.obj),
                    "ownerReferences": [owner_reference(self._services, service)],
                },
                "addressType": group.family,
                "endpoints": list(endpoints),
                "ports": _port_list(group.ports),
            },
        )

    # --- Endpoints, for those who still read them -----------------------------------------------

    def _mirror(self, service: Record, wanted: dict[Group, dict[str, Json]]) -> None:
        """The first family's endpoints, at most 1,000, in the older form."""
        families = tree.texts(service.obj, "spec", "ipFamilies")
        subsets: list[Json] = []
        for group, endpoints in wanted.items():
            if not endpoints or group.family != families[0]:
                continue
            subset: Json = {"ports": _port_list(group.ports)}
            for name, ready in (("addresses", True), ("notReadyAddresses", False)):
                some = [
                    _endpoint_address(one)
                    for one in endpoints.values()
                    if one["conditions"]["ready"] is ready
                ]
                if some:
                    subset[name] = some[:1000]
            subsets.append(subset)
        if self.registry.find(self._endpoints, *service.key):
            self.registry.amend(self._endpoints, service.key, subsets=subsets)
            return
        metadata = {
            "name": service.key[1],
            "labels": dict(tree.mapping(service.obj, "metadata", "labels")),
            "ownerReferences": [owner_reference(self._services, service)],
        }
        body = {"metadata": metadata, "subsets": subsets}
        self.registry.create(self._endpoints, service.key[0], body)


def _selects(selector: Json, found: Json) -> bool:
    return all(found.get(key) == value for key, value in selector.items())


def _address(pod: Json, family: str) -> str:
    """The pod's address of a family, or ``""``."""
    for one in tree.mappings(pod, "status", "podIPs"):
        if (":" in one.get("ip", "")) == (family == "IPv6") and one.get("ip"):
            return one["ip"]
    return ""


def _ports(service: Json, pod: Json) -> Ports:
    """The Service's ports as this pod serves them; a name that it does not have is left out."""
    out: list[tuple[str, int | None, str, str]] = []
    for port in tree.mappings(service, "spec", "ports"):
        number = _target(port, pod)
        if number:
            protocol = port.get("protocol", "TCP")
            out.append((port.get("name", ""), number, protocol, port.get("appProtocol", "")))
    return tuple(out)


def _target(port: Json, pod: Json) -> int | None:
    target = port.get("targetPort", port.get("port"))
    if isinstance(target, int):
        return target
    sidecars = [
        one
        for one in tree.mappings(pod, "spec", "initContainers")
        if one.get("restartPolicy") == "Always"
    ]
    for container in [*tree.mappings(pod, "spec", "containers"), *sidecars]:
        for found in tree.mappings(container, "ports"):
            same = found.get("protocol", "TCP") == port.get("protocol", "TCP")
            if same and found.get("name") == target:
                return found.get("containerPort")
    return None


def _port_list(ports: Ports) -> list[Json]:
    return [
        {
            "name": name,
            "port": number,
            "protocol": protocol,
            **({"appProtocol": application} if application else {}),
        }
        for name, number, protocol, application in ports
    ]


def _group_of(piece: Json) -> Group:
    ports = tuple(
        (p.get("name", ""), p.get("port"), p.get("protocol", "TCP"), p.get("appProtocol", ""))
        for p in tree.mappings(piece, "ports")
    )
    return Group(tree.text(piece, "addressType"), ports)


def _hints(service: Json, endpoint: Json) -> Json:
    match tree.text(service, "spec", "trafficDistribution"):
        case "PreferClose" | "PreferSameZone":
            wanted = ("zone",)
        case "PreferSameNode":
            wanted = ("zone", "nodeName")
        case _:
            return {}
    out: Json = {}
    if "zone" in wanted and endpoint.get("zone"):
        out["forZones"] = [{"name": endpoint["zone"]}]
    if "nodeName" in wanted and endpoint.get("nodeName"):
        out["forNodes"] = [{"name": endpoint["nodeName"]}]
    return out


def _slice_labels(service: Json) -> Json:
    out = {
        **tree.mapping(service, "metadata", "labels"),
        SERVICE_NAME: service["metadata"]["name"],
        _MANAGED_BY: _MANAGER,
    }
    if tree.text(service, "spec", "clusterIP") == "None":
        out[HEADLESS] = ""
    return out


def _endpoint_address(endpoint: Json) -> Json:
    out: Json = {"ip": endpoint["addresses"][0], "targetRef": endpoint["targetRef"]}
    for name in ("nodeName", "hostname"):
        if name in endpoint:
            out[name] = endpoint[name]
    return out
