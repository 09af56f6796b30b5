"""Cases asked with packets: every node of the case has a data path of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from podwire.datapath import Part
from podwire.datapath.ebpf.policy import PolicyPart as EbpfPolicyPart
from podwire.datapath.ebpf.services import ServicesPart as EbpfServicesPart
from podwire.datapath.nftables.services import ServicesPart
from podwire.kernel.iptables import Flavour
from podwire.kube.store import ChangeSet, Store
from podwire.policy import PolicyCompiler, PolicyTable
from podwire.services import NodeFacts, ProxyConfig, ServiceCompiler, ServiceTable
from tests.conformance.netpol_fabric import BRIDGE, Fabric
from tests.conformance.netpol_overlay import NodeObjects, Tunnels
from tests.conformance.netpol_probes import Attempt, Prober
from tests.conformance.netpol_world import Probe, World


def _nftables(netns_fd: int, bridge: str | None) -> Part[PolicyTable]:
    from podwire.datapath.nftables.policy import PolicyPart

    return PolicyPart(netns_fd, bridge)


def _ebpf(netns_fd: int, bridge: str | None) -> Part[PolicyTable]:
    return EbpfPolicyPart(netns_fd)


def _iptables(flavour: Flavour | None) -> Callable[[int, str | None], Part[PolicyTable]]:
    from podwire.datapath.iptables.policy import PolicyPart

    return lambda netns_fd, bridge: PolicyPart(netns_fd, bridge, flavour)


DATAPATHS: dict[str, Callable[[int, str | None], Part[PolicyTable]]] = {
    "nftables": _nftables,
    "ebpf": _ebpf,
    "iptables": _iptables(None),
    "iptables-nft": _iptables("nft"),
    "iptables-legacy": _iptables("legacy"),
}


_PROXY = ProxyConfig()


class Lab:
    """Namespaces, data paths and servers; kept from case to case, for building them takes long."""

    def __init__(self, datapath: str, routing: str, *, masquerade: bool = False) -> None:
        """`masquerade`: with the overlay, pods leave the cluster with their node's address."""
        self.prober = Prober()
        self.overlay = routing == "vxlan"
        self._masquerade = masquerade
        self.fabric = Fabric(self._leaving, overlay=self.overlay)
        self._tunnels: dict[int, Tunnels] = {}
        self._make = DATAPATHS[datapath]
        self.parts: dict[int, Part[PolicyTable]] = {}

    def _leaving(self, fd: int) -> None:
        self.prober.forget(fd)
        if fd in self._tunnels:
            self._tunnels.pop(fd).close()
        part = self.parts.pop(fd, None)
        if part is not None:
            part.cleanup()

    def part(self, node: str) -> Part[PolicyTable]:
        """The node's data path."""
        place = self.fabric.nodes[node]
        if place.fd not in self.parts:
            part = self.parts[place.fd] = self._make(place.fd, BRIDGE)
            part.start()
        return self.parts[place.fd]

    def tunnels(self, node: str) -> Tunnels:
        """The node's end of the overlay."""
        fd = self.fabric.nodes[node].fd
        if fd not in self._tunnels:
            self._tunnels[fd] = Tunnels(fd, self.part(node), masquerade=self._masquerade)
        return self._tunnels[fd]

    def services(self, node: str) -> Part[ServiceTable]:
        """On nftables, the same for every data path of policies that netfilter has; or on eBPF."""
        part = self.part(node)
        if isinstance(part, EbpfPolicyPart):
            return EbpfServicesPart(_PROXY, programs=part._programs)
        return ServicesPart(_PROXY, self.fabric.nodes[node].fd)

    def close(self) -> None:
        for fd in list(self.parts):
            self._leaving(fd)
        self.fabric.close()
        self.prober.close()


class PacketBackend:
    """One case's world on a lab."""

    def __init__(self, world: World, lab: Lab) -> None:
        self._world, self._lab = world, lab
        self._compilers = {node: PolicyCompiler(node, overlay=lab.overlay) for node in world.nodes}
        self._objects = NodeObjects(world) if lab.overlay else None
        self._attached: dict[str, dict[tuple[str, str], Any]] = {node: {} for node in world.nodes}
        self._services: dict[str, tuple[ServiceCompiler, Part[ServiceTable]]] = {}

    def update(self) -> None:
        """Bring namespaces and data paths to where the world is."""
        self._lab.fabric.sync(self._world)
        if self._objects is not None:
            self._objects.update({node: self._lab.tunnels(node) for node in self._world.nodes})
        self._world.slices()
        changes = self._world.store.take()
        for node, compiler in self._compilers.items():
            wanted = {a.pod: a for a in self._lab.fabric.attachments(node)}
            attached = self._attached[node]
            for pod in attached.keys() - wanted.keys():
                compiler.detach(pod)
            for pod, attachment in wanted.items():
                if attached.get(pod) != attachment:
                    compiler.attach(attachment)
            self._attached[node] = wanted
            part = self._lab.part(node)
            part.apply(compiler.update(changes))
            part.flush()
            if self._world.services or node in self._services:
                self._balance(node, changes)

    def _balance(self, node: str, changes: ChangeSet) -> None:
        place = self._lab.fabric.nodes[node]
        if node not in self._services:
            part = self._lab.services(node)
            part.start()
            compiler = ServiceCompiler(NodeFacts(node, place.addresses), _PROXY)
            self._services[node] = (compiler, part)
        compiler, part = self._services[node]
        part.apply(compiler.update(changes))
        part.flush()

    def connects(self, probes: Sequence[Probe]) -> list[dict[tuple[str, str], bool]]:
        attempts = [self._attempts(probe) for probe in probes]
        controls = [control for probe in probes for control in self._controls(probe)]
        got = self._lab.prober.probe([one for some in attempts for one in some], controls)
        return [{one.cell: one in got for one in some} for some in attempts]

    def _attempts(self, probe: Probe) -> list[Attempt]:
        world, place, real = self._world, self._lab.fabric.place, self._real
        sources = {
            source: (place(real(source)).fd, address)
            for source in probe.sources
            if (address := world.address(source, probe.bits)) is not None
        }
        targets = {
            end: (address, tuple((place(real(e)).fd, p) for e, p in self._targets(probe, end)))
            for end in probe.destinations
            if (address := world.address(end, probe.bits, of_service=probe.via_service)) is not None
        }
        out: list[Attempt] = []
        for source, destination, expected in probe.cells():
            if source in sources and destination in targets:
                fd, from_ = sources[source]
                to, arrivals = targets[destination]
                cell = (source, destination)
                out.append(
                    Attempt(cell, probe.protocol, fd, from_, to, probe.port, arrivals, expected)
                )
        return out

    def _targets(self, probe: Probe, destination: str) -> list[tuple[str, int]]:
        if probe.via_service:
            return self._world.backends(destination, probe.port, probe.protocol)
        return [(destination, probe.port)]

    def _controls(self, probe: Probe) -> Iterator[Attempt]:
        """Servers are opened, and reached from their own nodes, which no policy stops."""
        targets = {
            (self._real(end), port): None
            for destination in probe.destinations
            for end, port in self._targets(probe, destination)
        }
        for name, port in targets:
            place = self._lab.fabric.place(name)
            to = self._world.address(name, probe.bits)
            if to is None:
                continue
            self._lab.prober.serve(place.fd, probe.protocol, port, len(to))
            own = self._world.address(f"node:{place.node}", probe.bits) if place.node else None
            if own is not None:
                fd = self._lab.fabric.nodes[place.node].fd
                cell = (f"node:{place.node}", name)
                arrivals = ((place.fd, port),)
                yield Attempt(cell, probe.protocol, fd, own, to, port, arrivals, True)

    def _real(self, endpoint: str) -> str:
        """A hostNetwork pod is in its node's namespace."""
        pod = self._world.pods.get(endpoint)
        return f"node:{pod['node']}" if pod and pod.get("hostNetwork") else endpoint

    def close(self) -> None:
        nothing = Store().take()
        for node, (_, part) in self._services.items():
            if isinstance(part, EbpfServicesPart):  # policies have the same programs
                part.apply(ServiceCompiler(NodeFacts(node), _PROXY).update(nothing))
            else:
                part.cleanup()
