"""Service addresses and node ports: what is taken, and what a Service gets.

`fill` completes a Service without marking anything taken; `record` does that once the Service is
stored. Source: pkg/registry/core/service/{storage,ipallocator,portallocator} of Kubernetes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from podwire.errors import InvalidObject
from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.fields import FieldError, invalid
from podwire.lab.api.status import StatusError
from podwire.net import Address, format_address, parse_address, parse_prefix

_OWN_ADDRESS = ("ClusterIP", "NodePort", "LoadBalancer")


class AddressRange:
    """The addresses of one service CIDR. New ones come from above the part kept for choosers."""

    def __init__(self, cidr: str) -> None:
        self.prefix = parse_prefix(cidr)
        self.family = "IPv6" if len(self.prefix.address) == 16 else "IPv4"
        self._base = int.from_bytes(self.prefix.address, "big")
        # IPv4 keeps its broadcast address out, as the API server's allocator does
        spare = 1 if self.family == "IPv4" else 0
        size = (1 << (self.prefix.bits - self.prefix.length)) - spare
        self._size = min(size, 1 << 24)
        self._first = min(max(self._size // 16, 1), 256)
        self._next = self._first
        self.taken: dict[Address, str] = {}

    def __contains__(self, address: Address) -> bool:
        return address in self.prefix and address != self.prefix.address

    def _at(self, offset: int) -> Address:
        return (self._base + offset).to_bytes(len(self.prefix.address), "big")

    def free(self) -> Address:
        """The next free address. Raises StatusError (500) when there is none."""
        for offset in chain(range(self._next, self._size), range(1, self._next)):
            if (address := self._at(offset)) not in self.taken:
                self._next = offset + 1
                return address
        raise StatusError(500, "InternalError", "failed to allocate a serviceIP: range is full")


class ServiceAddresses:
    """All service addresses and node ports of the cluster. The first CIDR's family is primary."""

    def __init__(self, cidrs: Sequence[str], node_ports: tuple[int, int] = (30000, 32767)) -> None:
        self.ranges = {(found := AddressRange(cidr)).family: found for cidr in cidrs}
        self._node_ports = node_ports
        self._ports: dict[int, str] = {}
        # the lowest ports are left to those who choose theirs (KEP-3668)
        size = node_ports[1] - node_ports[0] + 1
        spare = 0 if size < 16 else min(max(16, size // 32), 128)
        self._next_port = node_ports[0] + spare

    @property
    def families(self) -> list[str]:
        return list(self.ranges)

    # --- filling ---------------------------------------------------------------------------------

    def fill(self, service: Json, old: Json | None) -> list[FieldError]:
        """Complete families, addresses and ports; returns what cannot be had."""
        spec = service["spec"]
        before = tree.mapping(old or {}, "spec")
        if spec.get("type") == "ExternalName":
            return []
        self._keep(spec, before)
        problems = self._fill_families(spec)
        if not problems and spec.get("clusterIPs") != ["None"]:
            problems = self._fill_addresses(spec, before)
        if spec.get("clusterIPs"):
            spec["clusterIP"] = spec["clusterIPs"][0]
        return problems + self._fill_ports(spec, before)

    def _keep(self, spec: Json, before: Json) -> None:
        """What an update leaves out stays as it was."""
        first, ips = spec.get("clusterIP"), spec.get("clusterIPs")
        if before.get("type") in _OWN_ADDRESS:
            if not first and not ips:
                ips = before.get("clusterIPs")
            for name in ("ipFamilyPolicy", "ipFamilies"):
                if not spec.get(name) and before.get(name):
                    spec[name] = before[name]
        spec["clusterIPs"] = list(ips or ([first] if first else []))
        if spec["type"] == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local":
            if not spec.get("healthCheckNodePort") and before.get("healthCheckNodePort"):
                spec["healthCheckNodePort"] = before["healthCheckNodePort"]
        elif spec.get("healthCheckNodePort") == before.get("healthCheckNodePort"):
            spec.pop("healthCheckNodePort", None)

    def _fill_families(self, spec: Json) -> list[FieldError]:
        families: list[str] = list(tree.texts(spec, "ipFamilies"))
        for text in spec["clusterIPs"][len(families) :]:
            if text != "None":
                families.append("IPv6" if ":" in text else "IPv4")
        headless = spec["clusterIPs"] == ["None"]
        anywhere = headless and not spec.get("selector")
        policy = spec.setdefault(
            "ipFamilyPolicy", "RequireDualStack" if anywhere else "SingleStack"
        )
        for i, family in enumerate(families):
            if family not in self.ranges and not anywhere:
                why = "not configured on this cluster"
                return [invalid(f"spec.ipFamilies[{i}]", family, why)]
        known = [*self.ranges, *({"IPv4", "IPv6"} - set(self.ranges) if anywhere else ())]
        if policy == "RequireDualStack" and len(known) < 2:
            why = "this cluster is not configured for dual-stack services"
            return [invalid("spec.ipFamilyPolicy", policy, why)]
        wanted = 1 if policy == "SingleStack" else 2
        families += [family for family in known if family not in families]
        # more than the policy allows stays as it was given: validation names it
        spec["ipFamilies"] = families[: max(wanted, len(tree.texts(spec, "ipFamilies")))]
        return []

    def _fill_addresses(self, spec: Json, before: Json) -> list[FieldError]:
        ips: list[str] = spec["clusterIPs"]
        had: list[str] = tree.texts(before, "clusterIPs")
        for i, text in enumerate(ips[: len(spec["ipFamilies"])]):
            if i < len(had) and had[i] == text:
                continue
            if had and i == 0:
                return [invalid("spec.clusterIPs[0]", ips, "may not change once set")]
            where = f"spec.clusterIPs[{i}]"
            try:
                address = parse_address(text)
            except InvalidObject:
                return []  # validation names it
            pool = self.ranges["IPv6" if ":" in text else "IPv4"]
            if address not in pool:
                why = "provided IP is not in the valid range. The range of valid IPs is "
                return [invalid(where, ips, f"{why}{pool.prefix}")]
            if address in pool.taken:
                return [invalid(where, ips, "provided IP is already allocated")]
        for family in spec["ipFamilies"][len(ips) :]:
            ips.append(format_address(self.ranges[family].free()))
        return []

    def _fill_ports(self, spec: Json, before: Json) -> list[FieldError]:
        mine = {port.get("nodePort"): port for port in tree.mappings(before, "ports")}
        problems: list[FieldError] = []
        if spec["type"] == "ClusterIP":
            return problems
        chosen: set[int] = set()
        by_number: dict[int, int] = {}
        for i, port in enumerate(tree.mappings(spec, "ports")):
            wanted = port.get("nodePort")
            if wanted and wanted not in mine:
                problems += self._refuse_port(f"spec.ports[{i}].nodePort", wanted)
            if not wanted and (kept := _same_port(port, before)):
                port["nodePort"] = wanted = kept
            if wanted:
                chosen.add(wanted)
                by_number.setdefault(port.get("port", 0), wanted)
        if spec.get("allocateLoadBalancerNodePorts", True):
            for port in tree.mappings(spec, "ports"):
                if not port.get("nodePort"):  # the same port over TCP and UDP gets the same one
                    twin = by_number.get(port.get("port", 0))
                    port["nodePort"] = twin or self._free_port(chosen)
                    chosen.add(port["nodePort"])
                    by_number[port.get("port", 0)] = port["nodePort"]
        if spec["type"] == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local":
            wanted = spec.get("healthCheckNodePort")
            if wanted and wanted != before.get("healthCheckNodePort"):
                problems += self._refuse_port("spec.healthCheckNodePort", wanted)
            elif not wanted:
                spec["healthCheckNodePort"] = self._free_port(chosen)
        return problems

    def _refuse_port(self, where: str, port: int) -> list[FieldError]:
        first, last = self._node_ports
        if not first <= port <= last:
            why = "provided port is not in the valid range. The range of valid ports is "
            return [invalid(where, port, f"{why}{first}-{last}")]
        if port in self._ports:
            return [invalid(where, port, "provided port is already allocated")]
        return []

    def _free_port(self, chosen: set[int]) -> int:
        first, last = self._node_ports
        for port in chain(range(self._next_port, last + 1), range(first, self._next_port)):
            if port not in self._ports and port not in chosen:
                self._next_port = port + 1
                return port
        raise StatusError(500, "InternalError", "failed to allocate a nodePort: range is full")

    # --- recording -------------------------------------------------------------------------------

    def record(self, service: Json | None, old: Json | None) -> None:
        """Mark what a stored Service has, free what it had before; None for no Service."""
        for address in _addresses(old):
            if pool := self._pool(address):
                pool.taken.pop(address, None)
        for port in _node_ports(old):
            self._ports.pop(port, None)
        if service is None:
            return
        metadata = service["metadata"]
        owner = f"{metadata.get('namespace', '')}/{metadata['name']}"
        for address in _addresses(service):
            if pool := self._pool(address):
                pool.taken[address] = owner
        for port in _node_ports(service):
            self._ports[port] = owner

    def _pool(self, address: Address) -> AddressRange | None:
        return self.ranges.get("IPv6" if len(address) == 16 else "IPv4")


def drop_what_the_update_lost(spec: Json, before: Json) -> None:
    """Fields that an update kept, but that its new type or family policy has no use for, go.

    What the update set itself stays, to be judged. Source: dropTypeDependentFields.
    """
    if spec.get("ipFamilyPolicy") == "SingleStack" != before.get("ipFamilyPolicy"):
        for name in ("clusterIPs", "ipFamilies"):
            if spec.get(name) == before.get(name):
                spec[name] = tree.texts(before, name)[:1]
    kind = spec.get("type", "ClusterIP")
    names: list[str] = []
    if kind == "ExternalName":
        names += ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"]
        names += ["internalTrafficPolicy"]
    if kind != "LoadBalancer":
        names += ["healthCheckNodePort", "allocateLoadBalancerNodePorts", "loadBalancerClass"]
    if kind not in ("NodePort", "LoadBalancer"):
        if not spec.get("externalIPs"):
            names.append("externalTrafficPolicy")
        had = {port.get("nodePort") for port in tree.mappings(before, "ports")}
        for port in tree.mappings(spec, "ports"):
            if port.get("nodePort") in had:
                port.pop("nodePort", None)
    for name in names:
        if name in spec and spec[name] == before.get(name):
            del spec[name]


def _same_port(port: Json, before: Json) -> int | None:
    """The node port that this port had, found by protocol and number."""
    for old in tree.mappings(before, "ports"):
        if (old.get("protocol"), old.get("port")) == (port.get("protocol"), port.get("port")):
            return old.get("nodePort")
    return None


def _addresses(service: Json | None) -> Iterator[Address]:
    for text in tree.texts(service or {}, "spec", "clusterIPs"):
        if text != "None":
            yield parse_address(text)


def _node_ports(service: Json | None) -> Iterator[int]:
    spec = tree.mapping(service or {}, "spec")
    for port in tree.mappings(spec, "ports"):
        if port.get("nodePort"):
            yield port["nodePort"]
    if spec.get("healthCheckNodePort"):
        yield spec["healthCheckNodePort"]
