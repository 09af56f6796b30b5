"""What a policy says, whatever its kind: the one form that evaluator, compiler and lint read.

NetworkPolicy, ClusterNetworkPolicy and CiliumNetworkPolicy are translated into it; nothing after
the translation knows the kinds apart but by `tier`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple, TypeAlias

from podwire.net import Address, Prefix
from podwire.policy.selectors import EVERYTHING, NAMESPACE_NAME, NO_LABELS, Labels, Selector

Key: TypeAlias = tuple[str, str]
"""``(namespace, name)``."""

AUDIT_ANNOTATION = "podwire.dev/audit"
"""A policy with this annotation at ``"true"`` is counted and logged, not enforced."""


class Direction(StrEnum):
    INGRESS = "ingress"
    EGRESS = "egress"

    @property
    def peers_field(self) -> str:
        return "from" if self is Direction.INGRESS else "to"


class Action(StrEnum):
    ACCEPT = "Accept"
    DENY = "Deny"
    PASS = "Pass"


class Tier(IntEnum):
    """In the order of evaluation."""

    ADMIN = 0
    NAMESPACED = 1
    BASELINE = 2


class Verdict(StrEnum):
    """AUDIT passes, but would be a DENY if the policies in audit mode were enforced."""

    ALLOW = "allow"
    DENY = "deny"
    AUDIT = "audit"


class PolicyRef(NamedTuple):
    """`str()` is ``NetworkPolicy x/name``."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        home = f"{self.namespace}/" if self.namespace else ""
        return f"{self.kind} {home}{self.name}"


class PodPeer(NamedTuple):
    """Pods by labels: of one namespace, or of those that `namespaces` selects."""

    pods: Selector = EVERYTHING
    namespace: str | None = None
    namespaces: Selector = EVERYTHING

    def matches(self, namespace: str, labels: Labels, namespace_labels: Labels) -> bool:
        if self.namespace is not None:
            return self.namespace == namespace and self.pods.matches(labels)
        return self.namespaces.matches(namespace_labels) and self.pods.matches(labels)

    def homes(self) -> tuple[tuple[str, ...], ...]:
        """Where an index keeps the peer; the pods that match have one of them in `pod_homes`."""
        name = self.namespace
        if name is None:
            name = dict(self.namespaces.equals).get(NAMESPACE_NAME)
        head = () if name is None else (name,)
        if self.pods.equals:
            return ((*head, *self.pods.equals[0]),)
        for key, operator, values in self.pods.requirements:
            if operator == "In":
                return tuple((*head, key, value) for value in values)
        return (head,)


def pod_homes(namespace: str, labels: Labels) -> list[tuple[str, ...]]:
    """The index entries under which every `PodPeer` that may match such a pod is kept."""
    homes: list[tuple[str, ...]] = [(), (namespace,)]
    for item in labels.items():
        homes.append(item)
        homes.append((namespace, *item))
    return homes


class BlockPeer(NamedTuple):
    """Addresses of a CIDR without those of `excepts`; of one family, as CIDRs are."""

    cidr: Prefix
    excepts: tuple[Prefix, ...] = ()

    def __contains__(self, address: object) -> bool:
        return address in self.cidr and not any(address in gap for gap in self.excepts)


class NodePeer(NamedTuple):
    """The addresses in `status.addresses` of nodes by labels."""

    nodes: Selector


class NamedPortPeer(NamedTuple):
    """Pods that have a container port of this name: what "any peer" means for a named port."""

    name: str


Peer: TypeAlias = PodPeer | BlockPeer | NodePeer | NamedPortPeer


class ContainerPort(NamedTuple):
    name: str
    protocol: int
    number: int


class PortRange(NamedTuple):
    """Destination ports, inclusive, of one protocol."""

    protocol: int
    first: int = 0
    last: int = 65535

    def matches(self, protocol: int, port: int, ports: tuple[ContainerPort, ...]) -> bool:
        return protocol == self.protocol and self.first <= port <= self.last

    def __str__(self) -> str:
        name = _PROTOCOL_NAMES.get(self.protocol, str(self.protocol))
        if (self.first, self.last) == (0, 65535):
            return name
        ports = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return f"{name}/{ports}"


class NamedPort(NamedTuple):
    """A container port of the destination pod by name; `protocol` None: of any protocol."""

    name: str
    protocol: int | None

    def resolve(self, ports: tuple[ContainerPort, ...]) -> list[PortRange]:
        """Its numbers on a destination with these ports."""
        return [
            PortRange(protocol, number, number)
            for name, protocol, number in ports
            if name == self.name and self.protocol in (None, protocol)
        ]

    def matches(self, protocol: int, port: int, ports: tuple[ContainerPort, ...]) -> bool:
        return (self.name, protocol, port) in ports and self.protocol in (None, protocol)

    def __str__(self) -> str:
        if self.protocol is None:
            return self.name
        return f"{_PROTOCOL_NAMES.get(self.protocol, str(self.protocol))}/{self.name}"


_PROTOCOL_NAMES = {6: "TCP", 17: "UDP", 132: "SCTP"}

PortMatch: TypeAlias = PortRange | NamedPort


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """One rule of one direction. `peers` and `ports` None mean any; an empty tuple means none.

    `fields` of peers and ports are their paths in the object, in the same order.
    """

    action: Action
    number: int
    field: str
    peers: tuple[Peer, ...] | None = None
    ports: tuple[PortMatch, ...] | None = None
    peer_fields: tuple[str, ...] = ()
    port_fields: tuple[str, ...] = ()
    name: str = ""

    @property
    def has_named_ports(self) -> bool:
        return any(isinstance(port, NamedPort) for port in self.ports or ())


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """One policy object, translated. `isolates`: directions in which what no rule allows is denied.

    `problems` are pairs of field and sentence: what of the object could not be enforced as written.
    `version` is the object's resourceVersion.
    """

    ref: PolicyRef
    tier: Tier
    subject: PodPeer
    priority: int = 0
    isolates: frozenset[Direction] = frozenset()
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()
    audit: bool = False
    problems: tuple[tuple[str, str], ...] = ()
    version: str = ""

    def rules(self, direction: Direction) -> tuple[Rule, ...]:
        return self.ingress if direction is Direction.INGRESS else self.egress

    def applies(self, direction: Direction) -> bool:
        """Whether the policy has anything to say in this direction."""
        return direction in self.isolates or bool(self.rules(direction))

    @property
    def order(self) -> tuple[int, int, PolicyRef]:
        """Evaluation order; equal priorities, which the API leaves open, go by name."""
        return (self.tier, self.priority, self.ref)


class Host(NamedTuple):
    """Who an address belongs to, as policies see it: a pod, a node, or nobody of the cluster.

    `labels` are the pod's or the node's.
    """

    kind: str = "world"
    namespace: str = ""
    name: str = ""
    labels: Labels = NO_LABELS
    namespace_labels: Labels = NO_LABELS
    ports: tuple[ContainerPort, ...] = ()

    def __str__(self) -> str:
        """``namespace/pod``, ``node:NAME`` or ``outside``."""
        if self.kind == "pod":
            return f"{self.namespace}/{self.name}"
        return f"node:{self.name}" if self.kind == "node" else "outside"


WORLD = Host()


def peer_matches(peer: Peer, host: Host, address: Address) -> bool:
    """Whether `address`, which belongs to `host`, is one of the peer's."""
    if isinstance(peer, PodPeer):
        return host.kind == "pod" and peer.matches(
            host.namespace, host.labels, host.namespace_labels
        )
    if isinstance(peer, BlockPeer):
        return address in peer
    if isinstance(peer, NodePeer):
        return host.kind == "node" and peer.nodes.matches(host.labels)
    return any(port.name == peer.name for port in host.ports)
