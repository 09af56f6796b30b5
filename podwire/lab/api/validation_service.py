"""The Service part of `validation`. Source: ValidateService of Kubernetes 1.36."""

from __future__ import annotations

import ipaddress

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

_PROTOCOLS = ["SCTP", "TCP", "UDP"]
_TYPES = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]
_POLICIES = ["Cluster", "Local"]


def validate_service(service: Json, old: Json | None) -> list[FieldError]:
    """All reasons to refuse a Service; `old` is the stored one on update."""
    spec = tree.mapping(service, "spec")
    before = tree.mapping(old or {}, "spec")
    kind = spec.get("type", "ClusterIP")
    out = _ports(spec, kind)
    out += fields.labels("spec.selector", spec.get("selector"))
    out += _affinity(spec)
    if kind not in _TYPES:
        out.append(unsupported("spec.type", kind, _TYPES))
    out += _addresses(spec, before, kind)
    out += _families(spec, kind)
    out += _load_balancer(spec, before, kind)
    out += _traffic(spec, before, kind)
    return out


def _is_headless(spec: Json) -> bool:
    return spec.get("clusterIP") == "None"


def _ports(spec: Json, kind: str) -> list[FieldError]:
    ports = tree.mappings(spec, "ports")
    out: list[FieldError] = []
    if not ports and not _is_headless(spec) and kind != "ExternalName":
        out.append(required("spec.ports"))
    names: set[str] = set()
    numbers: set[tuple[str, int]] = set()
    node_ports: set[tuple[str, int]] = set()
    for i, port in enumerate(ports):
        at = f"spec.ports[{i}]"
        out += _port(at, port, needs_name=len(ports) > 1, kind=kind)
        name, protocol = port.get("name") or "", port.get("protocol", "TCP")
        if name and name in names:
            out.append(duplicate(f"{at}.name", name))
        names.add(name)
        number = (protocol, port.get("port", 0))
        if number in numbers:
            out.append(duplicate(at, {"port": number[1], "protocol": protocol}))
        numbers.add(number)
        if port.get("nodePort"):
            taken = (protocol, port["nodePort"])
            if taken in node_ports:
                out.append(duplicate(f"{at}.nodePort", port["nodePort"]))
            node_ports.add(taken)
    return out


def _port(at: str, port: Json, *, needs_name: bool, kind: str) -> list[FieldError]:
    out: list[FieldError] = []
    name, number, protocol = port.get("name"), port.get("port", 0), port.get("protocol", "TCP")
    if not name:
        if needs_name:
            out.append(required(f"{at}.name"))
    else:
        out += [invalid(f"{at}.name", name, problem) for problem in fields.dns_label(name)]
    out += [invalid(f"{at}.port", number, problem) for problem in fields.port_number(number)]
    if protocol not in _PROTOCOLS:
        out.append(unsupported(f"{at}.protocol", protocol, _PROTOCOLS))
    target = port.get("targetPort", number)
    out += [invalid(f"{at}.targetPort", target, problem) for problem in fields.port(target)]
    if port.get("nodePort") and kind in ("ClusterIP", "ExternalName"):
        why = f"may not be used when `type` is '{kind}'"
        out.append(forbidden(f"{at}.nodePort", why))
    return out


def _affinity(spec: Json) -> list[FieldError]:
    affinity = spec.get("sessionAffinity", "None")
    if affinity not in ("ClientIP", "None"):
        return [unsupported("spec.sessionAffinity", affinity, ["ClientIP", "None"])]
    client = tree.mapping(spec, "sessionAffinityConfig", "clientIP")
    timeout = client.get("timeoutSeconds", 10800)
    if affinity == "ClientIP" and not 0 < timeout <= 86400:
        at = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        return [invalid(at, timeout, "must be greater than 0 and less than 86400")]
    return []


def _addresses(spec: Json, before: Json, kind: str) -> list[FieldError]:
    out: list[FieldError] = []
    if kind in ("NodePort", "LoadBalancer") and _is_headless(spec):
        why = f"may not be set to 'None' for {kind} services"
        out.append(invalid("spec.clusterIPs[0]", "None", why))
    if kind == "ExternalName":
        if spec.get("clusterIP") or spec.get("clusterIPs"):
            out.append(forbidden("spec.clusterIPs[0]", "may not be set for ExternalName services"))
        name = spec.get("externalName") or ""
        if not name:
            out.append(required("spec.externalName"))
        else:
            problems = fields.subdomain(name.removesuffix("."))
            out += [invalid("spec.externalName", name, problem) for problem in problems]
    stored = set(tree.texts(before, "externalIPs"))
    for i, text in enumerate(tree.texts(spec, "externalIPs")):
        where = f"spec.externalIPs[{i}]"
        problems = fields.address(text, strict=text not in stored) or _endpoint_address(text)
        out += [invalid(where, text, problem) for problem in problems]
    return out


def _endpoint_address(text: str) -> list[str]:
    """Addresses that must not be reached through a Service from outside."""
    found = ipaddress.ip_address(text)
    for holds, what in (
        (found.is_unspecified, "unspecified"),
        (found.is_loopback, "in the loopback range (127.0.0.0/8, ::1/128)"),
        (found.is_link_local, "in the link-local range (169.254.0.0/16, fe80::/10)"),
        (found.is_multicast, "in the link-local multicast range (224.0.0.0/24, ff02::/10)"),
    ):
        if holds:
            return [f"may not be {what}"]
    return []


def _families(spec: Json, kind: str) -> list[FieldError]:
    if kind == "ExternalName":
        named = ("ipFamilyPolicy", "ipFamilies")
        return [
            forbidden(f"spec.{name}", "may not be set for ExternalName services")
            for name in named
            if spec.get(name)
        ]
    out: list[FieldError] = []
    families, policy = tree.texts(spec, "ipFamilies"), spec.get("ipFamilyPolicy")
    policies = ["PreferDualStack", "RequireDualStack", "SingleStack"]
    if policy and policy not in policies:
        out.append(unsupported("spec.ipFamilyPolicy", policy, policies))
    for i, family in enumerate(families):
        if family not in ("IPv4", "IPv6"):
            out.append(unsupported(f"spec.ipFamilies[{i}]", family, ["IPv4", "IPv6"]))
        if family in families[:i]:
            out.append(duplicate(f"spec.ipFamilies[{i}]", family))
    return out + _cluster_ips(spec, families, policy)


def _cluster_ips(spec: Json, families: list[str], policy: str | None) -> list[FieldError]:
    out: list[FieldError] = []
    first, ips = spec.get("clusterIP") or "", tree.texts(spec, "clusterIPs")
    if ips and first and ips[0] != first:
        out.append(invalid("spec.clusterIPs", ips, "first value must match `clusterIP`"))
    if len(ips) > 2:
        out.append(invalid("spec.clusterIPs", ips, "may only hold up to 2 values"))
    if policy == "SingleStack" and max(len(ips), len(families)) > 1:
        why = "must be RequireDualStack or PreferDualStack when multiple IP families are specified"
        out.append(invalid("spec.ipFamilyPolicy", policy, why))
    for i, text in enumerate(ips):
        if text == "None":
            if len(ips) > 1:
                why = "'None' must be the first and only value"
                out.append(invalid(f"spec.clusterIPs[{i}]", text, why))
            continue
        problems = fields.address(text)
        out += [invalid(f"spec.clusterIPs[{i}]", text, problem) for problem in problems]
        if not problems and i < len(families):
            family = "IPv6" if fields.is_ipv6(text) else "IPv4"
            if family != families[i]:
                why = f"expected an {families[i]} value as indicated by `ipFamilies[{i}]`"
                out.append(invalid(f"spec.clusterIPs[{i}]", text, why))
    if len(ips) == 2 and len({fields.is_ipv6(ip) for ip in ips}) == 1:
        out.append(invalid("spec.clusterIPs", ips, "may specify no more than one IP per IP family"))
    return out


def _load_balancer(spec: Json, before: Json, kind: str) -> list[FieldError]:
    out: list[FieldError] = []
    ranges = tree.texts(spec, "loadBalancerSourceRanges")
    if ranges and kind != "LoadBalancer":
        why = "may only be used when `type` is 'LoadBalancer'"
        out.append(forbidden("spec.loadBalancerSourceRanges", why))
    stored = set(tree.texts(before, "loadBalancerSourceRanges"))
    for i, text in enumerate(ranges):
        problems = fields.cidr(text.strip(), strict=text not in stored)
        where = f"spec.loadBalancerSourceRanges[{i}]"
        out += [invalid(where, text, problem) for problem in problems]
    for name in ("allocateLoadBalancerNodePorts", "loadBalancerClass"):
        if kind != "LoadBalancer" and spec.get(name) is not None:
            why = "may only be used when `type` is 'LoadBalancer'"
            out.append(forbidden(f"spec.{name}", why))
    was = before.get("loadBalancerClass")
    if before.get("type") == kind == "LoadBalancer" and spec.get("loadBalancerClass") != was:
        out.append(invalid("spec.loadBalancerClass", spec.get("loadBalancerClass"), _FIXED))
    return out


_FIXED = "field is immutable"


def _traffic(spec: Json, before: Json, kind: str) -> list[FieldError]:
    out: list[FieldError] = []
    external, internal = spec.get("externalTrafficPolicy"), spec.get("internalTrafficPolicy")
    reachable = kind in ("NodePort", "LoadBalancer") or bool(spec.get("externalIPs"))
    if external and not reachable:
        why = "may only be set for externally-accessible services"
        out.append(invalid("spec.externalTrafficPolicy", external, why))
    elif external and external not in _POLICIES:
        out.append(unsupported("spec.externalTrafficPolicy", external, _POLICIES))
    if internal and internal not in _POLICIES:
        out.append(unsupported("spec.internalTrafficPolicy", internal, _POLICIES))
    health = spec.get("healthCheckNodePort") or 0
    needed = kind == "LoadBalancer" and external == "Local"
    if health and not needed:
        why = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
        out.append(invalid("spec.healthCheckNodePort", health, why))
    elif needed and before.get("healthCheckNodePort") and health != before["healthCheckNodePort"]:
        out.append(forbidden("spec.healthCheckNodePort", _FIXED))
    distribution = spec.get("trafficDistribution")
    supported = ["PreferClose", "PreferSameNode", "PreferSameZone"]
    if distribution is not None and distribution not in supported:
        out.append(unsupported("spec.trafficDistribution", distribution, supported))
    return out
