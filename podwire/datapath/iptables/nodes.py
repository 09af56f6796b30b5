"""Masquerading of what leaves the cluster, and the guard of the overlay. Chains `PODWIRE-NODES-…`.

One meaning with `podwire.datapath.nftables.nodes`; nodes that come and go are elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from podwire.datapath import Requirement
from podwire.datapath.iptables.families import FAMILIES, Rulesets
from podwire.datapath.iptables.ruleset import ChainKey, Member, Names, Update, Wanted
from podwire.datapath.nodes import host, kept_addresses, needs
from podwire.kernel.ipset import IpSet, net_elements
from podwire.kernel.iptables import Flavour, Hook, Rules
from podwire.net import Prefix
from podwire.nodes import OVERLAY_DEVICES, OVERLAY_PORTS, RouteTable
from podwire.services import Family

_CHAIN = "PODWIRE-NODES-"
_HOOKS = {
    "nat": [Hook("POSTROUTING", f'-m comment --comment "podwire nodes" -j {_CHAIN}OUT')],
    "mangle": [
        Hook(hook, f'-m comment --comment "podwire tunnels" -j {_CHAIN}{chain}')
        for hook, chain in (("PREROUTING", "INNER"), ("FORWARD", "BEYOND"), ("INPUT", "END"))
    ],
}
# Multicast and broadcast never leave by routing; bridged, they must keep their source.
_NOT_OUT: dict[Family, tuple[str, ...]] = {
    4: ("224.0.0.0/4", "255.255.255.255/32"),
    6: ("fe80::/10", "ff00::/8"),
}


class NodesPart:
    """A RouteTable but for its routes, which are `wiring.routes`.

    Without `masquerade`, pods reach everything with their own address.
    """

    requirements: Sequence[Requirement] = needs(None)

    def __init__(
        self,
        netns_fd: int | None = None,
        flavour: Flavour | None = None,
        *,
        masquerade: bool = True,
    ) -> None:
        self._masquerade = masquerade
        self._kernel = Rulesets(netns_fd, flavour, _names, _HOOKS)
        self._held: dict[Family, Wanted] = {}  # empty: not known
        self._table: RouteTable | None = None

    def close(self) -> None:
        """Nothing is held open."""

    def start(self) -> None:
        """What an earlier process left stays in force until the first table is applied."""
        self._kernel.require_programs()
        self._held, self._table = {}, None

    def apply(self, table: RouteTable) -> None:
        """Make the sets hold `table`'s prefixes."""
        if table is self._table and self._held:
            return
        wanted: dict[Family, Wanted] = {
            family: _wanted(table, self._masquerade, family) for family in FAMILIES
        }
        held = self._held
        self._held = {}  # until all is written, it is not known
        for family in FAMILIES:
            kernel = self._kernel[family]
            if held:
                kernel.write(_update(held[family], wanted[family]))
            else:
                kernel.replace(wanted[family])
        self._held, self._table = wanted, table
        self.requirements = needs(table)

    def flush(self) -> None:
        """Nothing waits: nodes leave rarely."""

    def verify(self) -> list[str]:
        """Repair what somebody changed, and say so."""
        repairs: list[str] = []
        for family, wanted in self._held.items():
            repairs += self._kernel[family].replace(wanted)
        return repairs

    def cleanup(self) -> None:
        """Remove all of ours."""
        self._kernel.remove()
        self._held, self._table = {}, None

    def status(self) -> dict[str, object]:
        return {name: size for held in self._held.values() for name, size in held.sizes().items()}


def _names(family: Family) -> Names:
    return Names(_CHAIN, f"podwire-nodes{family}-")


def _wanted(table: RouteTable, masquerade: bool, family: Family) -> Wanted:
    pods, cluster, nodes = (_names(family).sets + name for name in ("pods", "cluster", "nodes"))
    masquerading: Rules = (
        *(f"-d {prefix} -j RETURN" for prefix in _NOT_OUT[family]),
        f"-m set --match-set {pods} src -m set ! --match-set {cluster} dst "
        "-j MASQUERADE --random-fully",
    )
    addresses = {
        cluster: kept_addresses(table, masquerade),
        pods: table.pod_prefixes,
        nodes: [host(each) for each in table.node_addresses],
    }
    return Wanted(
        {("nat", f"{_CHAIN}OUT"): masquerading, **_guard(table, pods, nodes)},
        {name: IpSet(name, "hash:net", family) for name in addresses},
        {name: _elements(prefixes, family) for name, prefixes in addresses.items()},
    )


def _guard(table: RouteTable, pods: str, nodes: str) -> dict[ChainKey, Rules]:
    """Without an overlay, empty chains."""
    to_tunnel = f"-p udp -m udp --dport {OVERLAY_PORTS[table.protocol]}"
    stranger = f"-m set ! --match-set {nodes} src -j DROP"
    chains: dict[str, Rules] = {
        "INNER": (f"-i {OVERLAY_DEVICES[table.protocol]} -m set --match-set {pods} src -j DROP",),
        "BEYOND": (f"{to_tunnel} -m set --match-set {nodes} dst {stranger}",),
        "END": (f"{to_tunnel} {stranger}",),
    }
    return {
        ("mangle", _CHAIN + name): rules if table.tunnel_mac else ()
        for name, rules in chains.items()
    }


def _elements(prefixes: Iterable[Prefix], family: Family) -> set[str]:
    bits = 32 if family == 4 else 128
    return {text for p in prefixes if p.bits == bits for text in net_elements(p)}


def _update(old: Wanted, new: Wanted) -> Update:
    """What joins the cluster is known before pods send to it, what leaves it is forgotten last."""

    def beyond(these: Wanted, those: Wanted) -> list[Member]:
        return [
            (name, element)
            for name, elements in these.elements.items()
            for element in sorted(set(elements) - set(those.elements[name]))
        ]

    chains = {key: rules for key, rules in new.chains.items() if old.chains[key] != rules}
    return Update(adds=beyond(new, old), chains=chains, deletes=beyond(old, new)[::-1])
