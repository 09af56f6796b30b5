"""Services in the words of the field: who is addressed, who answers, and what holds for all.

Everything here is an immutable value. A backend is packed bytes (address, then port): 250,000 of
them sort, hash and reach the kernel without being taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from podwire.net import Address, Prefix, Protocol, format_endpoint

Family: TypeAlias = Literal[4, 6]
Algorithm: TypeAlias = Literal["random", "maglev"]
Backend: TypeAlias = bytes
"""An endpoint's address (4 or 16 bytes) and port (2 bytes), both in network order."""


def backend(address: Address, port: int) -> Backend:
    return address + port.to_bytes(2, "big")


def backend_address(packed: Backend) -> Address:
    return packed[:-2]


def backend_port(packed: Backend) -> int:
    return packed[-2] << 8 | packed[-1]


def format_backend(packed: Backend) -> str:
    """``10.0.0.1:80`` or ``[fd00::1]:80``."""
    return format_endpoint(packed[:-2], backend_port(packed))


class FrontendKind(IntEnum):
    """How a client addresses a Service; of two claims on one address the lower kind wins."""

    CLUSTER_IP = 0
    LOAD_BALANCER = 1
    EXTERNAL_IP = 2
    NODE_PORT = 3


class Frontend(NamedTuple):
    """An address (empty for node ports: any node address in scope) and port that is served."""

    kind: FrontendKind
    address: Address
    port: int

    def __str__(self) -> str:
        return format_endpoint(self.address, self.port) if self.address else f"*:{self.port}"


class ServicePortName(NamedTuple):
    """A port of a Service in one IP family."""

    namespace: str
    name: str
    port_name: str
    protocol: Protocol
    family: Family

    def __str__(self) -> str:
        port = f":{self.port_name}" if self.port_name else ""
        return f"{self.namespace}/{self.name}{port}/{self.protocol.name} IPv{self.family}"


class ServicePort(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One port of a Service: where it is addressed, and who answers.

    `cluster` and `local` are sorted; each is empty where no traffic policy of the port uses it.
    """

    name: ServicePortName
    frontends: tuple[Frontend, ...]
    cluster: tuple[Backend, ...] = ()
    """Backends under policy Cluster: topology applied, terminating ones only as a last resort."""
    local: tuple[Backend, ...] = ()
    """Backends on this node, under policy Local."""
    on_node: tuple[Backend, ...] = ()
    """Those of both lists that run on this node: a client among them may reach itself."""
    hosted: tuple[Backend, ...] = ()
    """With external policy Cluster: all on this node that another node may choose."""
    serving: tuple[Backend, ...] = ()
    """UDP only: all that serve, whatever policy and topology say; their flows are not stale."""
    has_endpoints: bool = False
    """Whether usable endpoints exist anywhere: without them a client is refused, not left alone."""
    internal_local: bool = False
    external_local: bool = False
    affinity_timeout_s: int = 0
    """0: none."""
    source_ranges: tuple[Prefix, ...] | None = None
    """Disjoint; who may use the load balancer addresses. None: everybody."""
    algorithm: Algorithm | Literal[""] = ""
    """How external traffic is balanced, where a data path has a choice; "": as for all."""

    def is_local(self, kind: FrontendKind) -> bool:
        """Whether the traffic policy for this kind of frontend is Local."""
        return self.internal_local if kind == FrontendKind.CLUSTER_IP else self.external_local

    @property
    def externally_accessible(self) -> bool:
        return any(frontend.kind != FrontendKind.CLUSTER_IP for frontend in self.frontends)


@dataclass(frozen=True)
class DetectLocal:
    """How the traffic of this node's pods is told: by its source, or by where it comes in.

    With neither prefixes nor an interface there is no detector: everything counts as a pod for
    ClusterIPs and nothing does where policy Local is short-circuited.
    """

    prefixes: tuple[Prefix, ...] = ()
    interface: str = ""
    """A name; with `*` at its end, a prefix of names."""

    @property
    def exists(self) -> bool:
        return bool(self.prefixes or self.interface)


@dataclass(frozen=True)
class ProxyConfig:
    """What the proxy is told. `nodeport_addresses` takes CIDRs, primary, localhost and all."""

    detect_local: DetectLocal = DetectLocal()
    masquerade_all: bool = False
    nodeport_addresses: tuple[str, ...] = ("primary",)
    localhost_nodeports: bool = False
    service_cidrs: tuple[Prefix, ...] = ()
    """Known beforehand; ServiceCIDR objects add to them."""
    external_ips: tuple[Prefix, ...] | None = None
    """The ranges in which externalIPs are served; None: everywhere (see CVE-2020-8554)."""

    @property
    def serves_loopback(self) -> bool:
        """Whether node ports are served on 127.0.0.1, which needs route_localnet."""
        return self.localhost_nodeports or "localhost" in self.nodeport_addresses


@dataclass(frozen=True)
class NodeFacts:
    """The node that the proxy runs on. The first address of each family is its InternalIP."""

    name: str
    addresses: tuple[Address, ...] = ()
    zone: str = ""

    def internal_ip(self, family: Family) -> Address | None:
        length = 4 if family == 4 else 16
        return next((a for a in self.addresses if len(a) == length), None)


@dataclass(frozen=True)
class NodePortScope:
    """Which of the node's addresses serve node ports in one family.

    `prefixes` None: all of them. IPv4 loopback addresses are served only if `loopback` says so,
    and must be inside `prefixes` too; IPv6 has no routable loopback.
    """

    prefixes: tuple[Prefix, ...] | None = None
    loopback: bool = False

    def serves(self, address: Address) -> bool:
        """Whether `address`, one of the node's own, is in scope."""
        if is_loopback(address) and not (self.loopback and len(address) == 4):
            return False
        return self.prefixes is None or any(address in prefix for prefix in self.prefixes)


def is_loopback(address: Address) -> bool:
    return address[0] == 127 if len(address) == 4 else address == _LOOPBACK6


_LOOPBACK6 = bytes(15) + b"\1"


class HealthCheck(NamedTuple):
    """What a Service's healthCheckNodePort answers."""

    port: int
    local_endpoints: int
    """Distinct addresses of ready endpoints on this node."""


@dataclass(frozen=True)
class Settings:
    """What holds for all Services alike."""

    node: NodeFacts
    config: ProxyConfig
    service_cidrs: tuple[Prefix, ...]
    """Disjoint ranges that ClusterIPs are allocated from."""
    nodeports: Mapping[Family, NodePortScope]
