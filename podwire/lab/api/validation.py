"""Whether the API server accepts an object, and the fields that it names if not.

`validate` is a pure function; it expects an object with its defaults filled in. Rules cover what
shapes the network: Services, NetworkPolicies, EndpointSlices, pods and their templates, Nodes.
Source: pkg/apis/{core,networking,discovery,apps}/validation of Kubernetes 1.36.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api import fields
from podwire.lab.api.fields import (
    FieldError,
    duplicate,
    forbidden,
    invalid,
    required,
    unsupported,
)
from podwire.lab.api.validation_service import validate_service

_PROTOCOLS = ["SCTP", "TCP", "UDP"]


def validate(kind: str, obj: Json, old: Json | None = None) -> list[FieldError]:
    """Every reason to refuse `obj`, in the order of its fields; empty when it is accepted.

    With `old` it is an update: addresses and CIDRs that `old` has already are not judged again
    by rules younger than them, and immutable fields are compared.
    """
    metadata = tree.mapping(obj, "metadata")
    name = metadata.get("name", "")
    rule = {"Namespace": fields.dns_label, "Service": fields.dns_1035_label}.get(
        kind, fields.subdomain
    )
    out = [invalid("metadata.name", name, problem) for problem in rule(name)]
    out += fields.labels("metadata.labels", metadata.get("labels"))
    for key in tree.mapping(metadata, "annotations"):
        problems = fields.qualified_name(key.lower())
        out += [invalid("metadata.annotations", key, problem) for problem in problems]
    if judge := _KINDS.get(kind):
        out += judge(obj, old)
    return out


# --- NetworkPolicy -------------------------------------------------------------------------------


def _network_policy(policy: Json, old: Json | None) -> list[FieldError]:
    spec = tree.mapping(policy, "spec")
    stored = frozenset(_cidrs_of(old)) if old else frozenset[str]()
    out = fields.label_selector("spec.podSelector", spec.get("podSelector"))
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for i, rule in enumerate(tree.mappings(spec, direction)):
            at = f"spec.{direction}[{i}]"
            for j, port in enumerate(tree.mappings(rule, "ports")):
                out += _policy_port(f"{at}.ports[{j}]", port)
            for j, peer in enumerate(tree.mappings(rule, peers)):
                out += _peer(f"{at}.{peers}[{j}]", peer, stored)
    types = tree.texts(spec, "policyTypes")
    if len(types) > 2:
        out.append(invalid("spec.policyTypes", types, "may not specify more than two policyTypes"))
        return out
    for i, found in enumerate(types):
        if found not in ("Ingress", "Egress"):
            out.append(unsupported(f"spec.policyTypes[{i}]", found, ["Ingress", "Egress"]))
    return out


def _cidrs_of(policy: Json) -> Iterator[str]:
    spec = tree.mapping(policy, "spec")
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for rule in tree.mappings(spec, direction):
            for peer in tree.mappings(rule, peers):
                block = tree.mapping(peer, "ipBlock")
                yield from (block.get("cidr", ""), *tree.texts(block, "except"))


def _policy_port(at: str, port: Json) -> list[FieldError]:
    out: list[FieldError] = []
    protocol, number, end = port.get("protocol", "TCP"), port.get("port"), port.get("endPort")
    if protocol not in _PROTOCOLS:
        out.append(unsupported(f"{at}.protocol", protocol, _PROTOCOLS))
    if number is not None:
        out += [invalid(f"{at}.port", number, problem) for problem in fields.port(number)]
    if end is None:
        return out
    if number is None:
        why = "may not be specified when `port` is not specified"
        out.append(invalid(f"{at}.endPort", end, why))
    elif not isinstance(number, int):
        why = "may not be specified when `port` is non-numeric"
        out.append(invalid(f"{at}.endPort", end, why))
    else:
        if end < number:
            out.append(invalid(f"{at}.endPort", end, "must be greater than or equal to `port`"))
        out += [invalid(f"{at}.endPort", end, problem) for problem in fields.port_number(end)]
    return out


def _peer(at: str, peer: Json, stored: frozenset[str]) -> list[FieldError]:
    out: list[FieldError] = []
    given = [name for name in ("podSelector", "namespaceSelector", "ipBlock") if _has(peer, name)]
    for name in given:
        if name == "ipBlock":
            out += _ip_block(f"{at}.ipBlock", peer["ipBlock"], stored)
        else:
            out += fields.label_selector(f"{at}.{name}", peer[name])
    if not given:
        out.append(required(at, "must specify a peer"))
    elif len(given) > 1 and "ipBlock" in given:
        out.append(forbidden(at, "may not specify both ipBlock and another peer"))
    return out


def _has(obj: Json, name: str) -> bool:
    return obj.get(name) is not None


def _ip_block(at: str, block: Json, stored: frozenset[str]) -> list[FieldError]:
    text = block.get("cidr") or ""
    if not text:
        return [required(f"{at}.cidr")]
    problems = fields.cidr(text, strict=text not in stored)
    out = [invalid(f"{at}.cidr", text, problem) for problem in problems]
    if fields.cidr(text, strict=False):
        return out
    outer = fields.network(text)
    for i, exception in enumerate(tree.texts(block, "except")):
        where = f"{at}.except[{i}]"
        problems = fields.cidr(exception, strict=exception not in stored)
        out += [invalid(where, exception, problem) for problem in problems]
        if not fields.cidr(exception, strict=False) and not _strictly_inside(exception, outer):
            out.append(invalid(where, exception, "must be a strict subset of `cidr`"))
    return out


def _strictly_inside(text: str, outer: Any) -> bool:
    inner = fields.network(text)
    return inner.version == outer.version and inner != outer and inner.subnet_of(outer)


# --- EndpointSlice -------------------------------------------------------------------------------


def _endpoint_slice(piece: Json, old: Json | None) -> list[FieldError]:
    out: list[FieldError] = []
    family = piece.get("addressType") or ""
    if family not in ("IPv4", "IPv6", "FQDN"):
        out.append(unsupported("addressType", family, ["FQDN", "IPv4", "IPv6"]))
    if old and old.get("addressType") != family:
        out.append(invalid("addressType", family, "field is immutable"))
    endpoints = tree.mappings(piece, "endpoints")
    if len(endpoints) > 1000:
        out.append(FieldError("endpoints", "FieldValueTooMany", "Too many: must have at most 1000"))
    for i, endpoint in enumerate(endpoints):
        addresses = tree.texts(endpoint, "addresses")
        if not addresses:
            out.append(required(f"endpoints[{i}].addresses", "must contain at least 1 address"))
        for j, text in enumerate(addresses):
            where = f"endpoints[{i}].addresses[{j}]"
            out += [invalid(where, text, problem) for problem in _slice_address(family, text)]
    seen: set[str] = set()
    for i, port in enumerate(tree.mappings(piece, "ports")):
        name, protocol = port.get("name") or "", port.get("protocol", "TCP")
        if name in seen:
            out.append(duplicate(f"ports[{i}].name", name))
        seen.add(name)
        if protocol not in _PROTOCOLS:
            out.append(unsupported(f"ports[{i}].protocol", protocol, _PROTOCOLS))
    return out


def _slice_address(family: str, text: str) -> list[str]:
    if family == "FQDN":
        return fields.subdomain(text)
    problems = fields.address(text)
    if not problems and fields.is_ipv6(text) != (family == "IPv6"):
        problems = [f"must be an {family} address"]
    return problems


# --- pods and what makes them --------------------------------------------------------------------


def _pod(pod: Json, old: Json | None) -> list[FieldError]:
    return _pod_spec("spec", tree.mapping(pod, "spec"))


def _pod_spec(at: str, spec: Json) -> list[FieldError]:
    out: list[FieldError] = []
    if not spec.get("containers"):
        out.append(required(f"{at}.containers"))
    names: set[str] = set()
    for group in ("initContainers", "containers"):
        for i, container in enumerate(tree.mappings(spec, group)):
            where = f"{at}.{group}[{i}]"
            name = container.get("name") or ""
            if not name:
                out.append(required(f"{where}.name"))
            else:
                problems = fields.dns_label(name)
                out += [invalid(f"{where}.name", name, problem) for problem in problems]
            if name in names:
                out.append(duplicate(f"{where}.name", name))
            names.add(name)
            out += _container_ports(f"{where}.ports", tree.mappings(container, "ports"))
    policy = spec.get("restartPolicy", "Always")
    if policy not in ("Always", "OnFailure", "Never"):
        supported = ["Always", "OnFailure", "Never"]
        out.append(unsupported(f"{at}.restartPolicy", policy, supported))
    return out


def _container_ports(at: str, ports: list[Json]) -> list[FieldError]:
    out: list[FieldError] = []
    names: set[str] = set()
    for i, port in enumerate(ports):
        where, name = f"{at}[{i}]", port.get("name")
        if name:
            out += [invalid(f"{where}.name", name, p) for p in fields.port_name(name)]
            if name in names:
                out.append(duplicate(f"{where}.name", name))
            names.add(name)
        number = port.get("containerPort") or 0
        if not number:
            out.append(required(f"{where}.containerPort"))
        else:
            problems = fields.port_number(number)
            out += [invalid(f"{where}.containerPort", number, p) for p in problems]
        if host := port.get("hostPort"):
            out += [invalid(f"{where}.hostPort", host, p) for p in fields.port_number(host)]
        if port.get("protocol", "TCP") not in _PROTOCOLS:
            out.append(unsupported(f"{where}.protocol", port["protocol"], _PROTOCOLS))
    return out


def _workload(workload: Json, old: Json | None) -> list[FieldError]:
    spec = tree.mapping(workload, "spec")
    selector, template = spec.get("selector"), tree.mapping(spec, "template")
    out: list[FieldError] = []
    if not selector:
        out.append(required("spec.selector"))
    else:
        out += fields.label_selector("spec.selector", selector)
        found = tree.mapping(template, "metadata", "labels")
        wanted: Json = tree.mapping(selector, "matchLabels")
        if any(found.get(key) != value for key, value in wanted.items()):
            why = "`selector` does not match template `labels`"
            out.append(invalid("spec.template.metadata.labels", found, why))
    if old and tree.mapping(old, "spec").get("selector") != selector:
        out.append(invalid("spec.selector", selector, "field is immutable"))
    if (replicas := spec.get("replicas", 0)) < 0:
        out.append(invalid("spec.replicas", replicas, "must be greater than or equal to 0"))
    out += _pod_spec("spec.template.spec", tree.mapping(template, "spec"))
    policy = tree.mapping(template, "spec").get("restartPolicy", "Always")
    if policy in ("OnFailure", "Never"):
        out.append(unsupported("spec.template.spec.restartPolicy", policy, ["Always"]))
    return out


def _job(job: Json, old: Json | None) -> list[FieldError]:
    template = tree.mapping(job, "spec", "template", "spec")
    out = _pod_spec("spec.template.spec", template)
    if template.get("restartPolicy") not in ("OnFailure", "Never"):
        out.append(
            unsupported(
                "spec.template.spec.restartPolicy",
                template.get("restartPolicy"),
                ["Never", "OnFailure"],
            )
        )
    return out


def _node(node: Json, old: Json | None) -> list[FieldError]:
    out: list[FieldError] = []
    for i, text in enumerate(tree.texts(node, "spec", "podCIDRs")):
        out += [invalid(f"spec.podCIDRs[{i}]", text, problem) for problem in fields.cidr(text)]
    return out


_KINDS: dict[str, Callable[[Json, Json | None], list[FieldError]]] = {
    "Service": validate_service,
    "NetworkPolicy": _network_policy,
    "EndpointSlice": _endpoint_slice,
    "Pod": _pod,
    "Node": _node,
    "Deployment": _workload,
    "ReplicaSet": _workload,
    "StatefulSet": _workload,
    "DaemonSet": _workload,
    "Job": _job,
}
