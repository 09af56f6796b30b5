"""A ServicePort as chains, links and set elements. Pure.

A link is a rule in a chain that several ports share (the trees); it stays while anybody needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from podwire.datapath.iptables.ruleset import tag
from podwire.datapath.iptables.services_rules import (
    ANYWHERE,
    CHAIN,
    MASQUERADE,
    NO_MASQUERADE,
    PROTOCOLS,
    TREE,
    from_pod,
    set_name,
)
from podwire.kernel.ipset import IpSet, net_elements
from podwire.kernel.iptables import Rules
from podwire.net import Address, Prefix, format_address
from podwire.services import (
    Backend,
    Family,
    Frontend,
    FrontendKind,
    ProxyConfig,
    ServicePort,
    Settings,
)
from podwire.services.model import format_backend

# Eight ways at each of four steps: up to 16 Services per leaf when there are 65,000.
_STEP_BITS = 3
_STEPS = 4
_LONGEST_TIMEOUT_S = 86400


@dataclass
class Spelling:
    """All that one port needs in the kernel."""

    chains: dict[str, Rules] = field(default_factory=dict[str, Rules])
    """Of table nat, its own."""
    links: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Chain of table nat, and rule."""
    elements: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Set and element."""
    counted: dict[Frontend, tuple[str, str]] = field(
        default_factory=dict[Frontend, tuple[str, str]]
    )
    """The link that its first packets take; none for a ClusterIP that is refused."""
    sets: dict[str, IpSet] = field(default_factory=dict[str, IpSet])
    """One for each backend with session affinity: its clients."""


def spell(port: ServicePort, config: ProxyConfig) -> Spelling:
    writer = _Writer(port, config)
    for frontend in port.frontends:
        writer.frontend(frontend)
    writer.hairpin()
    return writer.out


class _Writer:
    def __init__(self, port: ServicePort, config: ProxyConfig) -> None:
        self.out = Spelling()
        self._port = port
        self._config = config
        self._family: Family = port.name.family
        self._protocol = PROTOCOLS[port.name.protocol]
        self._tag = tag(str(port.name))

    def frontend(self, frontend: Frontend) -> None:
        port = self._port
        if frontend.kind == FrontendKind.CLUSTER_IP:
            self._put("cluster-ips", format_address(frontend.address))
        elif frontend.address:
            self._put("external-ips", format_address(frontend.address))
        if frontend.kind == FrontendKind.LOAD_BALANCER and port.source_ranges is not None:
            self._put("ranged", self._key(frontend))
            for prefix in port.source_ranges:
                for part in net_elements(prefix):
                    self._put("ranges", f"{self._key(frontend)},{part}")
        chain = ""
        if not port.has_endpoints:
            self._refuse("rejected", frontend)
        else:
            if not (port.local if port.is_local(frontend.kind) else port.cluster):
                self._refuse("dropped", frontend)
            chain = self._treatment(frontend.kind)
        if not chain and frontend.address and frontend.kind != FrontendKind.CLUSTER_IP:
            # The address may be the node's own: somebody's node port must not get what is refused.
            chain = "ACCEPT"
        if chain:
            self.out.links += self._path(frontend, chain)
            self.out.counted[frontend] = self.out.links[-1]

    def hairpin(self) -> None:
        for backend in self._port.on_node:
            address, number = format_address(backend[:-2]), int.from_bytes(backend[-2:], "big")
            self._put("hairpin", f"{address},{self._protocol}:{number},{address}")

    def _refuse(self, how: str, frontend: Frontend) -> None:
        if frontend.address:
            self._put(how, self._key(frontend))
        else:
            for half in ANYWHERE[self._family]:
                self._put(f"np-{how}", f"{half},{self._protocol}:{frontend.port}")

    def _treatment(self, kind: FrontendKind) -> str:
        """The chain that this kind of frontend leads to; empty: none."""
        port, name = self._port, f"{CHAIN}X{self._tag}"
        if kind == FrontendKind.CLUSTER_IP:
            return self._local() if port.internal_local else self._cluster()
        if name in self.out.chains:
            return name
        cluster = self._cluster()
        if not port.external_local:
            rules = [f"-j {MASQUERADE}", f"-g {cluster}"] if cluster else []
        else:
            rules = [*self._short_cuts(cluster)] if cluster else []
            local = self._local()
            # A ClusterIP's mark, where the address is one too
            rules += [f"-j {NO_MASQUERADE}", f"-g {local}"] if local else []
        if not rules:
            return ""
        self.out.chains[name] = rules
        return name

    def _short_cuts(self, cluster: str) -> Iterator[str]:
        """Policy Local does not bind pods and the node itself."""
        pod = from_pod(self._family, self._config)
        if pod:
            yield f"{pod} -g {cluster}"
        itself = "-m addrtype --src-type LOCAL"
        yield f"{itself} -j {MASQUERADE}"
        yield f"{itself} -g {cluster}"

    def _cluster(self) -> str:
        return self._backends("C", self._port.cluster)

    def _local(self) -> str:
        return self._backends("L", self._port.local)

    def _backends(self, kind: str, backends: Sequence[Backend]) -> str:
        """The chain that picks one of `backends`; empty if there are none."""
        name = f"{CHAIN}{kind}{self._tag}"
        if not backends:
            return ""
        if name not in self.out.chains:
            rules: list[str] = []
            if self._port.affinity_timeout_s:
                ways = [f"-g {self._with_affinity(backend)}" for backend in backends]
                for backend, way in zip(backends, ways, strict=True):
                    rules.append(f"-m set --match-set {self._clients(backend)} src {way}")
                rules += map(_by_chance, ways, _chances(len(ways)))
            else:
                for backend, chance in zip(backends, _chances(len(backends)), strict=True):
                    rules.append(f"-p {self._protocol} {_by_chance(_dnat(backend), chance)}")
            self.out.chains[name] = rules
        return name

    def _with_affinity(self, backend: Backend) -> str:
        name, clients = f"{CHAIN}B{self._backend_tag(backend)}", self._clients(backend)
        timeout_s = self._port.affinity_timeout_s
        self.out.sets[clients] = IpSet(clients, "hash:ip", self._family, _LONGEST_TIMEOUT_S)
        self.out.chains[name] = [
            f"-j SET --add-set {clients} src --exist --timeout {timeout_s}",
            f"-p {self._protocol} {_dnat(backend)}",
        ]
        return name

    def _clients(self, backend: Backend) -> str:
        return set_name(self._family, f"a-{self._backend_tag(backend)}")

    def _backend_tag(self, backend: Backend) -> str:
        return tag(f"{self._port.name} {format_backend(backend)}")

    def _path(self, frontend: Frontend, chain: str) -> Iterator[tuple[str, str]]:
        """The way through the tree from its root to `chain`."""
        port = f"-p {self._protocol} -m {self._protocol} --dport"
        if frontend.address:
            yield from _address_path(self._family, frontend.address[-2:])
            leaf = f"{CHAIN}T{_STEPS}-{_low_bits(frontend.address, _STEPS):x}"
            length = len(frontend.address) * 8
            to = f"-d {format_address(frontend.address)}/{length}"
            yield leaf, f"{to} {port} {frontend.port} -j {chain}"
            return
        at = f"{CHAIN}NP-{self._protocol}"
        for bits in (8, 4):
            block = frontend.port >> bits
            down = f"{CHAIN}NP-{self._protocol}-{bits}-{block:x}"
            yield at, f"{port} {block << bits}:{((block + 1) << bits) - 1} -j {down}"
            at = down
        yield at, f"{port} {frontend.port} -j {chain}"

    def _key(self, frontend: Frontend) -> str:
        return f"{format_address(frontend.address)},{self._protocol}:{frontend.port}"

    def _put(self, name: str, element: str) -> None:
        self.out.elements.append((set_name(self._family, name), element))


def backend_rules(spelling: Spelling, port: ServicePort) -> Iterator[tuple[Backend, str, int]]:
    """The rules that choose a backend, each by its chain and place there."""
    ends = {_dnat(backend): backend for backend in (*port.cluster, *port.local)}
    for chain, rules in spelling.chains.items():
        for place, rule in enumerate(rules):
            backend = ends.get(rule[rule.rfind("-j DNAT") :])
            if backend is not None:
                yield backend, chain, place


def settings_elements(settings: Settings, family: Family) -> Iterator[tuple[str, str]]:
    """Set and element of what holds for all Services alike."""
    size = 4 if family == 4 else 16
    scope = settings.nodeports[family].prefixes
    for name, prefixes in (
        ("pods", settings.config.detect_local.prefixes),
        ("service-cidrs", settings.service_cidrs),
        ("node-addresses", (Prefix(bytes(size), 0),) if scope is None else scope),
    ):
        for prefix in prefixes:
            if len(prefix.address) == size:
                for element in net_elements(prefix):
                    yield set_name(family, name), element


def _dnat(backend: Backend) -> str:
    return f"-j DNAT --to-destination {format_backend(backend)}"


def _by_chance(rule: str, chance: str) -> str:
    return f"{chance} {rule}".lstrip()


@lru_cache(maxsize=1024)
def _chances(count: int) -> tuple[str, ...]:
    """For each of `count` rules, one of which must match: equal chances for all."""
    out: list[str] = []
    for left in range(count, 1, -1):
        # as the kernel rounds it, and iptables-save prints it
        chance = round((1 << 31) / left) / (1 << 31)
        out.append(f"-m statistic --mode random --probability {chance:.11f}")
    return (*out, "")


@lru_cache(maxsize=1 << 16)
def _address_path(family: Family, low: bytes) -> tuple[tuple[str, str], ...]:
    """Chains and rules from the root to the leaf for an address that ends with `low`."""
    out: list[tuple[str, str]] = []
    at = TREE
    for step in range(1, _STEPS + 1):
        value = _low_bits(low, step)
        mask = (1 << _STEP_BITS * step) - 1
        down = f"{CHAIN}T{step}-{value:x}"
        size = 4 if family == 4 else 16
        match = "/".join(format_address(n.to_bytes(size, "big")) for n in (value, mask))
        out.append((at, f"-d {match} -j {down}"))
        at = down
    return tuple(out)


def _low_bits(address: Address, step: int) -> int:
    return int.from_bytes(address[-2:], "big") & ((1 << _STEP_BITS * step) - 1)
