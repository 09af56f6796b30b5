"""Service and EndpointSlice objects into the next ServiceTable.

The compiler keeps what it needs to recompile one Service when something of it changes: the
object, its slices, and who claims which address. The cost of `update` follows the change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from podwire.kube.labels import HEADLESS, SERVICE_NAME, ZONE
from podwire.kube.objects import EndpointSlice, Node, Service, ServiceCIDR
from podwire.kube.store import ChangeSet
from podwire.net import Address, Prefix, Protocol, disjoint, format_address
from podwire.services import endpoints, spec
from podwire.services.endpoints import SliceEndpoints
from podwire.services.model import (
    Family,
    Frontend,
    FrontendKind,
    HealthCheck,
    NodeFacts,
    ProxyConfig,
    ServicePort,
    ServicePortName,
    Settings,
)
from podwire.services.nodeports import nodeport_scopes
from podwire.services.shared_map import SharedMap
from podwire.services.spec import PortSpec
from podwire.services.table import ServiceTable

Key: TypeAlias = tuple[str, str]
Claim: TypeAlias = tuple[Family, Address, Protocol, int]


class _Rank(NamedTuple):
    """Who wins when two claim one address and port: the smallest. Does not depend on time."""

    kind: FrontendKind
    created: str
    name: ServicePortName


class ServiceCompiler:
    """Feed it change sets; it answers with tables. Not thread-safe; the tables are."""

    def __init__(self, node: NodeFacts, config: ProxyConfig) -> None:
        self._config = config
        self._services: dict[Key, Service] = {}
        self._slices: dict[Key, tuple[EndpointSlice, ...]] = {}
        self._said: dict[Key, tuple[EndpointSlice, SliceEndpoints | None]] = {}
        self._specs: dict[Key, tuple[PortSpec, ...]] = {}
        self._names: dict[Key, tuple[ServicePortName, ...]] = {}
        self._claims: dict[Claim, _Rank | list[_Rank]] = {}
        self._lost: dict[ServicePortName, dict[Claim, ServicePortName]] = {}
        self._cidrs: dict[Key, tuple[Prefix, ...]] = {}
        self._problems: dict[str, str] = {}
        self._health: dict[Key, HealthCheck] = {}
        self._without_local: dict[tuple[Family, str], int] = {}
        self._settings = self._make_settings(node)
        self.table = ServiceTable(self._settings, SharedMap(), self._health)

    def update(self, changes: ChangeSet, node: NodeFacts | None = None) -> ServiceTable:
        """The table after `changes`; `node` if the node's own addresses are others now.

        The same table again when nothing that a proxy looks at has changed.
        """
        dirty: dict[Key, None] = {}  # in the order of the objects: they lie in memory like that
        for key, change in changes.of(Service).items():
            dirty[key] = None
            if change.new is None:
                self._services.pop(key, None)
            else:
                self._services[key] = change.new
        for change in changes.of(EndpointSlice).values():
            dirty |= dict.fromkeys(self._move_slice(change.old, change.new))
        if self._update_settings(changes, node):
            dirty |= dict.fromkeys(self._services)
        ports: dict[ServicePortName, ServicePort | None] = {}
        for key in self._update_specs(dirty):
            self._compile(key, ports)
        unchanged = [name for name, port in ports.items() if port == self.table.ports.get(name)]
        for name in unchanged:
            del ports[name]
        self.table = self._next_table(ports)
        return self.table

    # --- what does not belong to one Service ------------------------------------------------------

    def _update_settings(self, changes: ChangeSet, node: NodeFacts | None) -> bool:
        """Take over node and ServiceCIDR changes; whether Services must be looked at again."""
        facts = node or self._settings.node
        for (_, name), change in changes.of(Node).items():
            if name == facts.name and change.new is not None:
                zone = change.new.metadata.labels.get(ZONE, "")
                facts = NodeFacts(facts.name, facts.addresses, zone)
        for key, change in changes.of(ServiceCIDR).items():
            name = f"ServiceCIDR {key[1]}"
            self._problems.pop(name, None)
            if change.new is None:
                self._cidrs.pop(key, None)
                continue
            prefixes, bad = spec.parse_prefixes(change.new.spec.cidrs)
            self._cidrs[key] = tuple(prefixes)
            if bad:
                self._note(name, f"not CIDRs: {bad}")
        if facts == self._settings.node and not changes.of(ServiceCIDR):
            return False
        before, self._settings = self._settings, self._make_settings(facts)
        return before.node != facts

    def _make_settings(self, node: NodeFacts) -> Settings:
        config = self._config
        cidrs = [*config.service_cidrs, *(p for some in self._cidrs.values() for p in some)]
        scopes = nodeport_scopes(config, node)
        return Settings(node, config, disjoint(cidrs), scopes)

    # --- slices -----------------------------------------------------------------------------------

    def _move_slice(self, old: EndpointSlice | None, new: EndpointSlice | None) -> Iterable[Key]:
        """Take a slice from its Service's list and put it into that of the new one."""
        before, after = _owner(old), _owner(new)
        if before is not None and old is not None:
            name = old.metadata.name
            rest = tuple(s for s in self._slices.get(before, ()) if s.metadata.name != name)
            if rest:
                self._slices[before] = rest
            else:
                self._slices.pop(before, None)
            self._problems.pop(f"EndpointSlice {old.metadata.namespace}/{name}", None)
            self._said.pop(old.key, None)
            yield before
        if after is not None and new is not None:
            self._slices[after] = (*self._slices.get(after, ()), new)
            yield after

    def _read_slices(self, key: Key) -> list[SliceEndpoints]:
        """What the slices of a served Service say."""
        served, slices = key in self._specs, self._slices.get(key, ())
        read: list[SliceEndpoints] = []
        for slice_ in slices:
            name = f"EndpointSlice {slice_.metadata.namespace}/{slice_.metadata.name}"
            self._problems.pop(name, None)
            said = self._read_slice(slice_, keep=len(slices) > 1) if served else None
            if said is None:
                continue
            read.append(said)
            if said.problem:
                self._note(name, said.problem)
        return read

    def _read_slice(self, slice_: EndpointSlice, *, keep: bool) -> SliceEndpoints | None:
        """What a slice says; kept where the Service has others that may change without it."""
        key = slice_.key
        kept = self._said.get(key)
        if kept is not None and kept[0] is slice_:
            return kept[1]
        said = endpoints.read_slice(slice_, self._settings.node.name)
        if keep:
            self._said[key] = (slice_, said)
        return said

    # --- claims -----------------------------------------------------------------------------------

    def _update_specs(self, dirty: dict[Key, None]) -> dict[Key, None]:
        """Read the dirty Services' specs; those whose ports must be compiled, losers included."""
        compile_too: dict[Key, None] = {}
        contested: set[Claim] = set()
        for key in dirty:
            service = self._services.get(key)
            old = self._specs.get(key, ())
            self._problems.pop(f"Service {key[0]}/{key[1]}", None)
            new, problem = spec.read(service, self._settings) if service else ((), "")
            if problem:
                self._note(f"Service {key[0]}/{key[1]}", problem)
            if [(p.name, p.created, p.frontends) for p in old] != [
                (p.name, p.created, p.frontends) for p in new
            ]:
                for port in old:
                    contested.update(self._withdraw(port))
                for port in new:
                    contested.update(self._claim(port))
            if new:
                self._specs[key] = new
            else:
                self._specs.pop(key, None)
        for claim in contested:
            compile_too |= dict.fromkeys(self._settle(claim))
        return dirty | compile_too

    def _claim(self, port: PortSpec) -> Iterable[Claim]:
        """Enter a port's claims; those that others make too."""
        for frontend in port.frontends:
            claim = _claim_of(port.name, frontend)
            rank = _Rank(frontend.kind, port.created, port.name)
            others = self._claims.get(claim)
            if others is None:
                self._claims[claim] = rank
                continue
            self._claims[claim] = [*(others if isinstance(others, list) else [others]), rank]
            yield claim

    def _withdraw(self, port: PortSpec) -> Iterable[Claim]:
        """Take a port's claims back; those that others made too."""
        self._lost.pop(port.name, None)
        for frontend in port.frontends:
            claim = _claim_of(port.name, frontend)
            claims = self._claims.pop(claim)
            if isinstance(claims, list):
                rest = [rank for rank in claims if rank.name != port.name]
                self._claims[claim] = rest[0] if len(rest) == 1 else rest
                yield claim

    def _settle(self, claim: Claim) -> Iterable[Key]:
        """Decide a contested claim; the Services concerned."""
        claims = self._claims.get(claim)
        if claims is None:
            return
        ranks = sorted(claims) if isinstance(claims, list) else [claims]
        winner = ranks[0].name
        for rank in ranks:
            lost = self._lost.setdefault(rank.name, {})
            lost.pop(claim, None)
            if rank.name != winner:
                lost[claim] = winner
            elif not lost:
                del self._lost[rank.name]
            yield (rank.name.namespace, rank.name.name)

    # --- ports ------------------------------------------------------------------------------------

    def _compile(self, key: Key, out: dict[ServicePortName, ServicePort | None]) -> None:
        """Put the Service's ports as they are now into `out`, None for those that are gone."""
        slices = self._read_slices(key)
        health = 0
        specs = self._specs.get(key, ())
        for port in specs:
            out[port.name] = self._port(port, slices)
            health = health or port.health_check_node_port
        for name in self._names.get(key, ()):
            out.setdefault(name, None)
        if specs:
            self._names[key] = tuple(port.name for port in specs)
        else:
            self._names.pop(key, None)
        self._update_health(key, health, slices)
        self._note_losses(key)

    def _port(self, port: PortSpec, slices: list[SliceEndpoints]) -> ServicePort:
        name = port.name
        frontends = port.frontends
        lost = self._lost.get(name)
        if lost:
            frontends = tuple(f for f in frontends if _claim_of(name, f) not in lost)
        external = any(f.kind != FrontendKind.CLUSTER_IP for f in port.frontends)
        found = endpoints.gather(slices, name.family, name.port_name, name.protocol)
        node = self._settings.node
        chosen = endpoints.select(
            found,
            uses_cluster=external or not port.internal_local,
            uses_local=port.internal_local or (port.external_local and external),
            node_name=node.name,
            zone=node.zone,
        )
        serving: tuple[bytes, ...] = ()
        if name.protocol == Protocol.UDP:
            serving = tuple(sorted(b for b, s in found.items() if s.bits & endpoints.SERVING))
            serving = chosen.cluster if serving == chosen.cluster else serving
        hosted: tuple[bytes, ...] = ()
        if external and not port.external_local:
            hosted = tuple(sorted(b for b, s in found.items() if endpoints.serves_here(s)))
        return ServicePort(
            name=name,
            frontends=frontends,
            cluster=chosen.cluster,
            local=chosen.cluster if chosen.local == chosen.cluster else chosen.local,
            on_node=chosen.on_node,
            hosted=chosen.on_node if hosted == chosen.on_node else hosted,
            serving=serving,
            has_endpoints=chosen.has_endpoints,
            internal_local=port.internal_local,
            external_local=port.external_local,
            affinity_timeout_s=port.affinity_timeout_s,
            source_ranges=port.source_ranges,
            algorithm=port.algorithm,
        )

    def _update_health(self, key: Key, port: int, slices: list[SliceEndpoints]) -> None:
        if not port:
            if key in self._health:
                self._health = {k: v for k, v in self._health.items() if k != key}
            return
        wanted = endpoints.READY | endpoints.LOCAL
        local = {
            address
            for said in slices
            for address, state in said.endpoints
            if state.bits & wanted == wanted
        }
        check = HealthCheck(port, len(local))
        if self._health.get(key) != check:
            self._health = {**self._health, key: check}

    # --- problems and the next table --------------------------------------------------------------

    def _note(self, name: str, problem: str) -> None:
        self._problems[name] = problem

    def _note_losses(self, key: Key) -> None:
        losses = [
            f"{_format_claim(claim)} belongs to {winner.namespace}/{winner.name}"
            for port in self._specs.get(key, ())
            for claim, winner in self._lost.get(port.name, {}).items()
        ]
        name = f"Service {key[0]}/{key[1]} claims"
        self._problems.pop(name, None)
        if losses:
            self._note(name, "; ".join(sorted(losses)))

    def _next_table(self, ports: Mapping[ServicePortName, ServicePort | None]) -> ServiceTable:
        before = self.table
        problems = before.problems if before.problems == self._problems else dict(self._problems)
        if (
            not ports
            and self._settings is before.settings
            and self._health is before.health_checks
            and problems is before.problems
        ):
            return before
        counts = dict(self._without_local)
        for name, port in ports.items():
            for old_or_new, step in ((before.ports.get(name), -1), (port, 1)):
                for policy in _without_local(old_or_new):
                    where = (name.family, policy)
                    counts[where] = counts.get(where, 0) + step
        self._without_local = counts
        return ServiceTable(
            self._settings,
            before.ports.changed(ports.items()) if ports else before.ports,
            self._health,
            problems,
            counts,
        )


def _owner(slice_: EndpointSlice | None) -> Key | None:
    """The Service that a slice belongs to, if it is one that a proxy looks at."""
    if slice_ is None or HEADLESS in slice_.metadata.labels:
        return None
    name = slice_.metadata.labels.get(SERVICE_NAME)
    return (slice_.metadata.namespace, name) if name else None


def _claim_of(name: ServicePortName, frontend: Frontend) -> Claim:
    return (name.family, frontend.address, name.protocol, frontend.port)


def _format_claim(claim: Claim) -> str:
    family, address, protocol, port = claim
    where = format_address(address) if address else f"IPv{family} node"
    return f"{where} port {port}/{protocol.name}"


def _without_local(port: ServicePort | None) -> list[str]:
    """The Local policies under which the port has endpoints elsewhere but none here."""
    if port is None or port.local or not port.has_endpoints:
        return []
    policies = ["internal"] if port.internal_local else []
    if port.external_local and port.externally_accessible:
        policies.append("external")
    return policies
