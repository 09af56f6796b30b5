"""Who owns which address: pods that are alive, attachments of this node, nodes.

An address follows the live pod whatever the order of the events: of several pods that claim it,
the one attached on this node wins, then one that is not terminating, then the youngest. Pods of
the host's network own nothing: their address is the node's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from podwire.errors import InvalidObject
from podwire.kube.objects import Node, Pod
from podwire.net import Address, parse_addresses, parse_prefix
from podwire.policy.model import WORLD, ContainerPort, Host, Key
from podwire.policy.networkpolicy import PROTOCOLS
from podwire.policy.selectors import NAMESPACE_NAME, Labels

_FINISHED = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What policies need to know about a pod. A finished one owns no address and is no pod."""

    key: Key
    uid: str
    node: str
    labels: Labels
    ports: tuple[ContainerPort, ...]
    addresses: tuple[Address, ...]
    host_network: bool
    terminating: bool
    finished: bool
    created: str

    @property
    def precedence(self) -> tuple[bool, bool, str, str]:
        return (not self.finished, not self.terminating, self.created, self.uid)


class Attachment(NamedTuple):
    """A pod's link on this node: host-side interface, its addresses.

    `uid` and `link` are empty where they are not known.
    """

    pod: Key
    link: str
    addresses: tuple[Address, ...]
    uid: str = ""


def pod_facts(pod: Pod) -> PodFacts:
    """The facts in the object. The address of a finished pod is no longer its own."""
    status, metadata = pod.status, pod.metadata
    finished = status.phase in _FINISHED
    texts = [ip.ip for ip in status.pod_ips] or [status.pod_ip]
    return PodFacts(
        pod.key,
        metadata.uid,
        pod.spec.node_name,
        metadata.labels,
        container_ports(pod),
        () if finished else parse_addresses(texts),
        pod.spec.host_network,
        metadata.deletion_timestamp is not None,
        finished,
        metadata.creation_timestamp or "",
    )


def container_ports(pod: Pod) -> tuple[ContainerPort, ...]:
    """Named ports of the containers and of native sidecars (init containers that stay)."""
    spec = pod.spec
    sidecars = [c for c in spec.init_containers if c.restart_policy == "Always"]
    found = {
        ContainerPort(port.name, PROTOCOLS[port.protocol], port.container_port)
        for container in (*spec.containers, *sidecars)
        for port in container.ports
        if port.name and port.protocol in PROTOCOLS
    }
    return tuple(sorted(found))


class Owner(NamedTuple):
    """`kind` is "pod" or "node"; a node's key has no namespace."""

    kind: str
    key: Key


class Hosts:
    """The objects behind addresses, as they are now. `dirty` collects addresses to look at again.

    The mappings are replaced, never changed, once `share` handed them out. With `overlay` a node is
    also who has the network address of one of its pod CIDRs: that is its own inside the tunnel, and
    a way around policies about nodes if it were nobody's.
    """

    def __init__(self, *, overlay: bool = False) -> None:
        self._overlay = overlay
        self._inside: dict[str, set[Address]] = {}
        self.namespaces: dict[str, Labels] = {}
        self.pods: dict[Key, PodFacts] = {}
        self.nodes: dict[str, tuple[Labels, tuple[Address, ...]]] = {}
        self.attachments: dict[Key, Attachment] = {}
        self.owners: dict[Address, Owner] = {}
        self.dirty: set[Address] = set()
        self._claims: dict[Address, set[Owner]] = {}
        self._shared: set[str] = set()

    def share(self) -> tuple[dict[str, Labels], dict[Key, PodFacts], dict[Address, Owner]]:
        """Namespaces, pods and owners for a snapshot."""
        self._shared = {"namespaces", "pods", "owners"}
        return self.namespaces, self.pods, self.owners

    def _own(self, name: str) -> None:
        if name in self._shared:
            self._shared.discard(name)
            setattr(self, name, dict(getattr(self, name)))

    def set_namespace(self, name: str, labels: Labels | None) -> None:
        self._own("namespaces")
        if labels is None:
            self.namespaces.pop(name, None)
        else:
            self.namespaces[name] = {**labels, NAMESPACE_NAME: name}

    def set_pod(self, key: Key, facts: PodFacts | None) -> None:
        self._own("pods")
        old = self.pods.pop(key, None)
        if facts is not None:
            self.pods[key] = facts
        owner = Owner("pod", key)
        before = set(old.addresses) if old and not old.host_network else set[Address]()
        after = set(facts.addresses) if facts and not facts.host_network else set[Address]()
        attached = self.attachments.get(key)
        kept = set(attached.addresses) if attached else set[Address]()
        self._claim(owner, after - before)
        self._release(owner, before - after - kept)
        self.dirty |= before | after | kept

    def set_node(self, name: str, node: Node | None) -> bool:
        """True if anything of it counts: a node's object changes with every heartbeat."""
        old = self.nodes.get(name)
        new = None
        if node is not None:
            new = (node.metadata.labels, parse_addresses(a.address for a in node.status.addresses))
        inside = _inside(node) if node is not None and self._overlay else set[Address]()
        known = self._inside.get(name, set())
        if (new, inside) == (old, known):
            return False
        self._inside[name] = inside
        before, after = {*(old[1] if old else ()), *known}, {*(new[1] if new else ()), *inside}
        if new is None:
            del self._inside[name]
            del self.nodes[name]
        else:
            self.nodes[name] = new
        owner = Owner("node", ("", name))
        self._claim(owner, after - before)
        self._release(owner, before - after)
        self.dirty |= before | after
        return True

    def attach(self, attachment: Attachment) -> None:
        self.detach(attachment.pod)
        self.attachments[attachment.pod] = attachment
        self._claim(Owner("pod", attachment.pod), set(attachment.addresses))
        self.dirty |= set(attachment.addresses)

    def detach(self, pod: Key) -> Attachment | None:
        old = self.attachments.pop(pod, None)
        if old is not None:
            facts = self.pods.get(pod)
            kept = set(facts.addresses) if facts and not facts.host_network else set[Address]()
            self._release(Owner("pod", pod), set(old.addresses) - kept)
            self.dirty |= set(old.addresses)
        return old

    def _claim(self, owner: Owner, some: set[Address]) -> None:
        for address in some:
            self._claims.setdefault(address, set()).add(owner)

    def _release(self, owner: Owner, some: set[Address]) -> None:
        for address in some:
            claims = self._claims.get(address, set())
            claims.discard(owner)
            if not claims:
                self._claims.pop(address, None)

    def settle(self) -> set[Address]:
        """Decide who owns the dirty addresses; returns them."""
        self._own("owners")
        dirty, self.dirty = self.dirty, set()
        for address in dirty:
            claims = self._claims.get(address)
            if not claims:
                self.owners.pop(address, None)
            elif len(claims) == 1:
                (self.owners[address],) = claims
            else:
                self.owners[address] = max(
                    claims, key=lambda owner: self._precedence(owner, address)
                )
        return dirty

    def _precedence(self, owner: Owner, address: Address) -> tuple[object, ...]:
        attached = self.attachments.get(owner.key)
        here = owner.kind == "pod" and attached is not None and address in attached.addresses
        facts = self.pods.get(owner.key) if owner.kind == "pod" else None
        return (here, owner.kind == "pod", *(facts.precedence if facts else (False, False, "", "")))

    def facts(self, pod: Key) -> PodFacts | None:
        """The pod object of an attachment, unless that is another pod of the same name."""
        return attached_facts(self.pods, self.attachments.get(pod), pod)

    def host(self, address: Address) -> Host:
        """Who has the address, with labels."""
        owner = self.owners.get(address)
        if owner is None:
            return WORLD
        if owner.kind == "node":
            return Host("node", "", owner.key[1], self.nodes[owner.key[1]][0])
        facts = self.facts(owner.key)
        return pod_host(facts, self.namespaces) if facts else WORLD


def _inside(node: Node) -> set[Address]:
    """As `nodes` gives tunnel addresses; a CIDR that does not parse is told there."""
    found: set[Address] = set()
    for text in node.spec.pod_cidrs or filter(None, [node.spec.pod_cidr]):
        with contextlib.suppress(InvalidObject):
            found.add(parse_prefix(text).address)
    return found


def attached_facts(
    pods: Mapping[Key, PodFacts], attachment: Attachment | None, pod: Key
) -> PodFacts | None:
    facts = pods.get(pod)
    if facts and attachment and attachment.uid and facts.uid and attachment.uid != facts.uid:
        return None
    return facts


def namespace_labels(namespaces: Mapping[str, Labels], name: str) -> Labels:
    """Labels of a namespace; of one that is not known yet, the one that it has in any case."""
    return namespaces.get(name) or {NAMESPACE_NAME: name}


def pod_host(facts: PodFacts, namespaces: Mapping[str, Labels]) -> Host:
    """The pod as policies see it; a finished one is nobody of the cluster."""
    if facts.finished:
        return WORLD
    namespace, name = facts.key
    return Host(
        "pod", namespace, name, facts.labels, namespace_labels(namespaces, namespace), facts.ports
    )
