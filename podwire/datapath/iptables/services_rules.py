"""The chains for Services that never change, the sets they ask, and the names of all others.

The way of a first packet:

    mangle RANGES       who may use a load balancer address (before DNAT)
    nat SERVICES        an address of a Service? a node port? then down a tree to the Service
    nat T…, NP-…        the trees: eight ways at every step, by the address's low bits; port ranges
    nat X…              how clients from outside are treated (masquerade, policy Local)
    nat C…, L…          the backends of policy Cluster and Local: one is picked at random
    nat B…              one backend, with session affinity
    filter CHECK        what was not translated: no endpoints, undefined port, unallocated address
    nat POSTROUTING     masquerade

What kube-proxy walks in one list of all Services is four steps here; a Service added or removed
rewrites its own chains and the last step of the tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from podwire.datapath.iptables.ruleset import ChainKey, Names
from podwire.kernel.ipset import IpSet
from podwire.kernel.iptables import Hook, Rules
from podwire.net import Protocol
from podwire.services import Family, ProxyConfig

CHAIN = "PODWIRE-SVC-"
MASQUERADE = "CONNMARK --set-xmark 0x4000/0x4000"
NO_MASQUERADE = "CONNMARK --set-xmark 0x0/0x4000"
PROTOCOLS = {Protocol.TCP: "tcp", Protocol.UDP: "udp", Protocol.SCTP: "sctp"}

TREE = f"{CHAIN}T0"
ROOTS = (TREE, *(f"{CHAIN}NP-{protocol}" for protocol in PROTOCOLS.values()))
"""Chains that are there even when nothing is in them."""

_IP_PORT = "hash:ip,port"
# Of the set types only those with an address know SCTP; two halves are any address.
_ANY_PORT = "hash:net,port"
ANYWHERE: Mapping[Family, tuple[str, str]] = {
    4: ("0.0.0.0/1", "128.0.0.0/1"),
    6: ("::/1", "8000::/1"),
}
# In the order in which elements are added; they are deleted in reverse.
_SETS: Mapping[str, str] = {
    "pods": "hash:net",
    "node-addresses": "hash:net",
    "service-cidrs": "hash:net",
    "ranges": "hash:ip,port,net",
    "ranged": _IP_PORT,
    "rejected": _IP_PORT,
    "dropped": _IP_PORT,
    "np-rejected": _ANY_PORT,
    "np-dropped": _ANY_PORT,
    "hairpin": "hash:ip,port,ip",
    "external-ips": "hash:ip",
    "cluster-ips": "hash:ip",
}
_ORDER = {name: number for number, name in enumerate(_SETS)}


def names(family: Family) -> Names:
    return Names(CHAIN, f"podwire-svc{family}-")


def set_name(family: Family, name: str) -> str:
    return f"podwire-svc{family}-{name}"


def set_order(element: tuple[str, str]) -> tuple[int, str, str]:
    """Sorts (set, element) so that no packet meets half of a change."""
    return _ORDER.get(element[0].split("-", 2)[2], len(_ORDER)), *element


def fixed_sets(family: Family) -> dict[str, IpSet]:
    out: dict[str, IpSet] = {}
    for short, kind in _SETS.items():
        name = set_name(family, short)
        out[name] = IpSet(name, kind, family)
    return out


def hooks() -> dict[str, Sequence[Hook]]:
    def hook(chain: str, ours: str) -> Hook:
        return Hook(chain, f'-m comment --comment "podwire services" -j {CHAIN}{ours}')

    return {  # what is not translated is refused: the refusals come last
        "mangle": [hook("PREROUTING", "GUARD"), hook("OUTPUT", "RANGES")],
        "nat": [
            hook("PREROUTING", "SERVICES"),
            hook("OUTPUT", "SERVICES"),
            hook("POSTROUTING", "POSTROUTING"),
        ],
        "filter": [hook("INPUT", "INPUT"), hook("FORWARD", "FORWARD"), hook("OUTPUT", "FORWARD")],
    }


def fixed_chains(family: Family, config: ProxyConfig) -> dict[ChainKey, Rules]:
    """By table and name."""

    def match(name: str, flags: str = "dst,dst", no: str = "") -> str:
        return f"-m set {no}--match-set {set_name(family, name)} {flags}"

    to_node = f"-m addrtype --dst-type LOCAL {match('node-addresses', 'dst')}"
    if not (config.serves_loopback and family == 4):
        to_node = f"! -d {'127.0.0.0/8' if family == 4 else '::1/128'} {to_node}"
    unreachable = "icmp-port-unreachable" if family == 4 else "icmp6-port-unreachable"
    new = "-m conntrack --ctstate NEW"
    not_ours = "-m conntrack ! --ctstate INVALID,RELATED,ESTABLISHED,UNTRACKED,DNAT"
    masquerade = "-j MASQUERADE --random-fully"
    protocols = PROTOCOLS.values()
    chains: dict[tuple[str, str], Rules] = {
        ("mangle", "RANGES"): [
            f"{new} {match('ranged')} {match('ranges', 'dst,dst,src', '! ')} -j {CHAIN}DISCARD"
        ],
        ("mangle", "GUARD"): [*_loopback_guard(family, config), f"-j {CHAIN}RANGES"],
        ("mangle", "DISCARD"): ["-j DROP"],
        ("nat", "SERVICES"): [
            f"{match('cluster-ips', 'dst')} -g {CHAIN}CLUSTER-IP",
            f"{match('external-ips', 'dst')} -j {TREE}",
            f"{to_node} -g {CHAIN}NODEPORTS",
        ],
        ("nat", "CLUSTER-IP"): [*_cluster_ip(family, config), f"-g {TREE}"],
        ("nat", "NODEPORTS"): [f"-p {p} -g {CHAIN}NP-{p}" for p in protocols],
        ("nat", "POSTROUTING"): [
            f"-m connmark --mark 0x4000/0x4000 {masquerade}",
            f"-m conntrack --ctstate DNAT {match('hairpin', 'src,dst,dst')} {masquerade}",
        ],
        ("filter", "INPUT"): [
            f"{not_ours} -j {CHAIN}CHECK",
            f"{to_node} {not_ours} -j {CHAIN}CHECK-NP",
        ],
        ("filter", "FORWARD"): [
            f"{not_ours} -j {CHAIN}CHECK",
            f"{not_ours} -j {CHAIN}CHECK-IP",
        ],
        ("filter", "CHECK"): [
            f"{match('rejected')} -g {CHAIN}REFUSE",
            f"{match('dropped')} -g {CHAIN}DISCARD",
        ],
        ("filter", "CHECK-IP"): [
            f"{match('cluster-ips', 'dst')} -g {CHAIN}REFUSE",
            f"{match('service-cidrs', 'dst')} -g {CHAIN}DISCARD",
        ],
        ("filter", "CHECK-NP"): [
            f"{match('np-rejected')} -g {CHAIN}REFUSE",
            f"{match('np-dropped')} -g {CHAIN}DISCARD",
        ],
        ("filter", "REFUSE"): [f"-j REJECT --reject-with {unreachable}"],
        ("filter", "DISCARD"): ["-j DROP"],
    }
    return {(table, CHAIN + name): rules for (table, name), rules in chains.items()}


def from_pod(family: Family, config: ProxyConfig, no: str = "") -> str:
    """Matches what comes from a pod, or (with ``! ``) what does not; empty without a detector."""
    detect = config.detect_local
    if detect.interface:
        name = detect.interface
        return f"{no}-i {name[:-1] + '+' if name.endswith('*') else name}"
    if detect.prefixes:
        return f"-m set {no}--match-set {set_name(family, 'pods')} src"
    return ""


def _cluster_ip(family: Family, config: ProxyConfig) -> list[str]:
    """Who is masqueraded on the way to a ClusterIP."""
    if config.masquerade_all:
        return [f"-j {MASQUERADE}"]
    stranger = from_pod(family, config, "! ")
    return [f"{stranger} -j {MASQUERADE}"] if stranger else []


def _loopback_guard(family: Family, config: ProxyConfig) -> list[str]:
    """With route_localnet on, nobody but the node may speak to 127.0.0.0/8 (CVE-2020-8558)."""
    if family != 4 or not config.serves_loopback:
        return []
    return [
        f"-d 127.0.0.0/8 ! -i lo -j {CHAIN}DISCARD",
        f"-s 127.0.0.0/8 ! -i lo -j {CHAIN}DISCARD",
    ]
