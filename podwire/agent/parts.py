"""Which rooms run in this agent, and how they are put together."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from podwire.agent import ebpf, services_api
from podwire.agent import node as own_node
from podwire.agent.admission import Admission
from podwire.agent.conntrack import ConntrackRoom
from podwire.agent.control import ControlServer
from podwire.agent.datapaths import BRIDGE, DataPath, Removable, leftovers
from podwire.agent.ebpf_metrics import MapWatch
from podwire.agent.health import ServiceHealth
from podwire.agent.loop import Loop
from podwire.agent.options import Options
from podwire.agent.pods import Gate, Pods
from podwire.agent.policies import KINDS as POLICY_KINDS
from podwire.agent.policies import PolicyRoom
from podwire.agent.reaping import ReapingPart
from podwire.agent.refusals import Refusals
from podwire.agent.sync import Sync
from podwire.agent.sysctls import Sysctls
from podwire.agent.watch import Watcher
from podwire.cni.plan import NodeConfig
from podwire.conntrack.ebpf import EbpfSource
from podwire.datapath import Requirement
from podwire.datapath.counts import CountsServices
from podwire.datapath.ebpf.overlay import OverlayPart
from podwire.datapath.ebpf.services import ServicesPart as EbpfServicesPart
from podwire.datapath.ebpf.uplinks import Uplinks
from podwire.datapath.nftables.services import ServicesPart as NftablesServicesPart
from podwire.datapath.nftables.spoof import SpoofGuard
from podwire.datapath.nftables.spoof_routed import RoutedSpoofGuard
from podwire.datapath.nftables.vpc import VpcPart
from podwire.datapath.policy import BRIDGE_REQUIREMENTS
from podwire.errors import Unsupported
from podwire.ipam.vpc.settings import read_settings
from podwire.kernel import geneve, sysctl
from podwire.kube.objects import (
    EndpointSlice,
    ENIConfig,
    Node,
    Service,
    ServiceCIDR,
)
from podwire.kube.store import ChangeSet, Kind, Store
from podwire.net import parse_prefix
from podwire.nodes import RouteCompiler
from podwire.services import ServiceCompiler, ServiceTable
from podwire.wiring.hostports import HostPortRules
from podwire.wiring.masquerade import MasqueradeRules
from podwire.wiring.routes import NodeRoutes

if TYPE_CHECKING:
    from podwire.agent.vpc import VpcMode

SERVICE_KINDS: tuple[Kind, ...] = (Node, Service, EndpointSlice, ServiceCIDR)

FORWARDING = (
    Requirement("net.ipv4.ip_forward", "1", "the node routes for its pods"),
    Requirement("net.ipv6.conf.all.forwarding", "1", "the node routes for its pods"),
)


@dataclass
class Built:
    """One agent's rooms. `cni` makes the CNI server once the main loop is there."""

    datapath: DataPath
    syncs: list[Sync[Any]] = field(default_factory=list[Sync[Any]])
    requirements: list[Requirement] = field(default_factory=list[Requirement])
    cni: Callable[[Loop, Store, Callable[[], bool], Callable[[], bool]], Pods] | None = None
    serving: list[Callable[[ControlServer, Store, Loop], None]] = field(
        default_factory=list[Callable[[ControlServer, Store, Loop], None]]
    )
    watchers: list[Callable[[Loop], Watcher]] = field(
        default_factory=list[Callable[[Loop], Watcher]]
    )
    preparing: list[Callable[[], Coroutine[Any, Any, None]]] = field(
        default_factory=list[Callable[[], Coroutine[Any, Any, None]]]
    )  # awaited before pods are served
    tasks: list[Callable[[Any], Coroutine[Any, Any, None]]] = field(
        default_factory=list[Callable[[Any], Coroutine[Any, Any, None]]]
    )
    reasons: list[Callable[[], list[str]]] = field(default_factory=list[Callable[[], list[str]]])
    """What is wrong, for the status."""

    def serve(self, control: ControlServer, store: Store, loop: Loop) -> None:
        """Register what the rooms answer on the control socket."""
        for register in self.serving:
            register(control, store, loop)


def kinds(options: Options) -> tuple[Kind, ...]:
    """The kinds that the parts read."""
    found: dict[Kind, None] = {Node: None}
    if "services" in options.parts:
        found |= dict.fromkeys(SERVICE_KINDS)
    if "policy" in options.parts:
        found |= dict.fromkeys(POLICY_KINDS)
    if options.wiring == "vpc" and read_settings(os.environ).custom_networking:
        found[ENIConfig] = None
    return tuple(found)


def missing(options: Options, node: Node | None) -> str:
    """What the own Node object still lacks, or ""."""
    if node is None:
        return "no Node object of this name"
    if "services" in options.parts and not own_node.internal_ips(node):
        return "the Node has no InternalIP"
    if options.wiring == "vpc":
        return ""
    if "cni" in options.parts and not own_node.pod_cidrs(node):
        return "the Node has no podCIDR (does the controller manager allocate node CIDRs?)"
    return ""


def must_restart(options: Options, old: Node | None, new: Node | None) -> bool:
    """Whether the rules were built for pod CIDRs that the node no longer has (as kube-proxy)."""
    if old is None or new is None or "services" not in options.parts or options.wiring == "vpc":
        return False
    by_node_cidr = options.detect_local_mode in ("NodeCIDR", "") and not options.cluster_cidrs
    return by_node_cidr and own_node.pod_cidrs(old) != own_node.pod_cidrs(new)


def build(options: Options, node: Node, datapath: DataPath) -> Built:
    """The rooms for these options. Raises Unsupported, ConfigError."""
    built = Built(datapath)
    room = _add_conntrack(built, options)
    if "nodes" in options.parts and options.wiring != "vpc":  # the VPC routes between nodes
        _add_nodes(built, options)
    if "services" in options.parts:
        _add_services(built, options, node, room)
    refusals = _add_ebpf(built)
    policy = _add_policy(built, options, refusals) if "policy" in options.parts else None
    if "cni" in options.parts:
        _add_cni(built, options, node, policy)
    elif built.datapath.programs is None and _bridges():
        built.requirements += BRIDGE_REQUIREMENTS  # somebody else's plugin may use a bridge
    return built


def _bridges() -> bool:
    """Whether bridged packets can meet netfilter here at all (br_netfilter)."""
    return Path(sysctl.path(BRIDGE_REQUIREMENTS[0].sysctl)).exists()


def _add_nodes(built: Built, options: Options) -> None:
    compiler = RouteCompiler(
        options.node_name,
        "vxlan" if options.routing == "vxlan" else "direct",
        no_masquerade=[parse_prefix(text) for text in options.non_masquerade_cidrs],
        protocol="geneve" if options.tunnel_protocol == "geneve" else "vxlan",
    )
    if options.tunnel_protocol == "geneve" and not geneve.is_supported():
        raise Unsupported("--tunnel-protocol geneve: this kernel has no Geneve devices")
    programs = built.datapath.programs
    if programs is not None and options.routing == "vxlan":
        tunnels = OverlayPart(programs=programs)
        built.syncs.append(Sync("overlay", (Node,), compiler.update, tunnels))
    built.syncs.append(Sync("masquerade", (Node,), compiler.update, built.datapath.nodes()))
    # the device comes last: who may send by it is known when it goes up
    routes = NodeRoutes(guard=programs.sync_links) if programs is not None else NodeRoutes()
    sync = Sync("routes", (Node,), compiler.update, routes)
    built.syncs.append(sync)
    built.watchers.append(
        lambda loop: Watcher("routes", routes.concerns, lambda: loop.verify(sync))
    )
    built.requirements += FORWARDING


def _add_conntrack(built: Built, options: Options) -> ConntrackRoom:
    def services() -> ServiceTable | None:
        return next((sync.table for sync in built.syncs if sync.name == "services"), None)

    programs = built.datapath.programs
    own = EbpfSource(programs) if programs is not None else None
    room = ConntrackRoom(options, services, own)
    built.preparing.append(room.prepare)
    built.serving.append(room.serve)
    built.reasons.append(room.reasons)

    async def run(agent: Any) -> None:
        agent.metrics.registry.register(room.collector)
        await room.run(agent.client)

    built.tasks.append(run)
    return room


def _add_services(built: Built, options: Options, node: Node, room: ConntrackRoom) -> None:
    config = own_node.proxy_config(options, node)
    compiler = ServiceCompiler(own_node.facts(node), config)
    path = built.datapath.services(config)
    if isinstance(path, NftablesServicesPart):
        built.reasons.append(path.warnings)
    counts = path.counts if isinstance(path, CountsServices) else None
    balancing = path.balancing.of if isinstance(path, EbpfServicesPart) else None
    if built.datapath.programs is None:  # with it, they end the flows in their own table
        path = ReapingPart(path, room.collector.removed)

    health = ServiceHealth()
    uplinks = _follow_uplinks(built, options, node)

    def compile(changes: ChangeSet) -> ServiceTable:
        own = changes.of(Node).get(("", options.node_name))
        facts = own_node.facts(own.new) if own is not None and own.new is not None else None
        table = compiler.update(changes, facts)
        if facts is not None and uplinks is not None:
            uplinks.follow(facts.addresses)
        health.follow(table)
        return table

    async def serve_health(agent: Any) -> None:
        await health.run(lambda: agent.health.healthy(time.time()))

    built.tasks.append(serve_health)
    built.reasons.append(health.reasons)

    built.syncs.append(Sync("services", SERVICE_KINDS, compile, path))
    built.requirements += path.requirements

    def serve(control: ControlServer, store: Store, _: Loop) -> None:
        control.route("/v1/services", lambda query: services_api.listing(compiler.table, query))
        control.route(
            "/v1/services/show",
            lambda query: services_api.show(compiler.table, query, counts, balancing),
        )
        control.route(
            "/v1/services/resolve",
            lambda query: services_api.resolve(store, compiler.table, query),
        )

    built.serving.append(serve)


def _add_ebpf(built: Built) -> Refusals | None:
    programs = built.datapath.programs
    if programs is None:
        return None
    refusals = Refusals(programs)
    built.serving.append(refusals.serve)
    built.tasks.append(refusals.run)
    maps = MapWatch(programs)
    built.reasons.append(maps.reasons)
    built.tasks.append(maps.run)
    return refusals


def _follow_uplinks(built: Built, options: Options, node: Node) -> Uplinks | None:
    """Services at the driver of the links that carry the node's addresses, with eBPF."""
    if built.datapath.programs is None:
        return None
    uplinks = ebpf.make_uplinks(built.datapath.programs, options, own_node.internal_ips(node))
    built.reasons.append(lambda: uplinks.problems)

    async def follow() -> list[str]:
        return await asyncio.to_thread(uplinks.sync)

    built.watchers.append(lambda loop: Watcher("uplinks", uplinks.concerns, follow))
    return uplinks


def _add_policy(built: Built, options: Options, refusals: Refusals | None) -> PolicyRoom:
    path = built.datapath.policy()
    built.requirements += path.requirements
    room = PolicyRoom(options, path, refusals)
    built.syncs.append(room.sync)
    built.serving.append(room.serve)
    built.tasks.append(room.run)
    return room


def _add_cni(
    built: Built,
    options: Options,
    node: Node,
    policy: PolicyRoom | None,
) -> None:
    routes = next((s.path for s in built.syncs if isinstance(s.path, NodeRoutes)), None)
    vpc = _vpc_mode(options) if options.wiring == "vpc" else None

    def make(
        loop: Loop, store: Store, synced: Callable[[], bool], ending: Callable[[], bool]
    ) -> Pods:
        def config() -> NodeConfig:
            own = store.get(Node, ("", options.node_name)) or node
            return NodeConfig(
                bridge=BRIDGE,
                pod_cidrs=own_node.pod_cidrs(own) or own_node.pod_cidrs(node),
                mtu=options.mtu or _mtu(vpc, routes),
                hairpin=True,
                default_gateway=True,
                wiring="bridge" if options.wiring == "bridge" else "routed",
                pool=vpc.pool_name if vpc is not None else "",
            )

        gate: Gate | None = None
        if policy is not None:
            gate = Admission(loop, store, synced, ending, policy.compiler, policy.sync)
        if built.datapath.programs is not None:
            gate = ebpf.EbpfGate(built.datapath.programs, gate)
        pods = Pods(options, config, gate, vpc)
        if vpc is not None:
            built.preparing.append(partial(vpc.start, store))
        return pods

    built.cni = make
    if vpc is not None:
        built.requirements += FORWARDING
        built.serving.append(lambda control, store, loop: vpc.serve(control))
        built.watchers.append(lambda loop: vpc.watcher())
        built.tasks.append(lambda agent: vpc.run())
    if options.wiring == "bridge":
        built.requirements += BRIDGE_REQUIREMENTS


def _vpc_mode(options: Options) -> VpcMode:
    """Imported only where it runs: it is a tenth of an agent's start."""
    from podwire.agent.vpc import VpcMode

    return VpcMode(options)


def _mtu(vpc: VpcMode | None, routes: NodeRoutes | None) -> int:
    if vpc is not None:
        return vpc.mtu
    return routes.pod_mtu() if routes is not None else 0


def all_paths(options: Options) -> Iterator[tuple[str, Removable]]:
    """Everything that this or another data path may have left in the kernel, for `--cleanup`."""
    yield "routes", NodeRoutes()
    for path, name, part in leftovers(options):
        yield f"{path} {name}", part
    yield "vpc", VpcPart()
    yield "spoof guard", SpoofGuard()
    yield "spoof guard, routed", RoutedSpoofGuard()
    yield "host ports", HostPortRules()
    yield "ipMasq", MasqueradeRules()
    yield "sysctls", Sysctls(options.state_dir)
