"""Random tables of Services and policies for `World`, and packets that meet them."""

import os

import msgspec

from podwire.kube import objects as kube
from podwire.kube.objects import ClusterNetworkPolicy, Namespace, NetworkPolicy, Node
from podwire.kube.store import Store
from podwire.net import Protocol, format_address, parse_address, parse_prefix
from podwire.policy import Attachment
from podwire.services import (
    DetectLocal,
    Frontend,
    FrontendKind,
    NodeFacts,
    NodePortScope,
    Packet,
    ProxyConfig,
    ServicePort,
    ServicePortName,
    backend,
)
from tests.kernel.ebpf_world import NODE, OUTSIDE, POD, REMOTE
from tests.service_objects import service_table

FIRST, ROUNDS = int(os.environ.get("SEED", "1")), int(os.environ.get("ROUNDS", "40"))
SEEDS = range(FIRST, FIRST + ROUNDS)
"""By hand for longer: ROUNDS=1000 SEED=41. A seed is a test of its own and can be run again."""
PROTOCOLS = [Protocol.TCP, Protocol.UDP, Protocol.SCTP]
VIPS = {4: ["10.96.0.1", "10.96.0.2"], 6: ["fd96::1", "fd96::2"]}
EXTERNAL = {4: ["192.0.2.7", "192.0.2.8"], 6: ["fd00:7::7", "fd00:7::8"]}
SECOND = {4: "192.168.9.11", 6: "fd09::11"}
BACKENDS = {f: [POD[1][f], POD[2][f], REMOTE[f], NODE[f], OUTSIDE[f]] for f in (4, 6)}
CLIENTS = {
    4: [POD[1][4], POD[2][4], REMOTE[4], OUTSIDE[4], NODE[4], SECOND[4], "198.51.100.9"],
    6: [POD[1][6], POD[2][6], REMOTE[6], OUTSIDE[6], NODE[6], SECOND[6], "fd51::9"],
}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
CIDRS = {
    4: ["10.244.0.0/24", "10.244.0.0/16", "192.168.9.0/24", "192.168.9.10/32", "0.0.0.0/0"],
    6: ["fd44::/64", "fd09::/64", "fd09::10/128", "::/0"],
}
NUMBERS = [80, 81, 82]
LABELS = [{}, {"app": "web"}, {"app": "db"}, {"app": "web", "tier": "a"}]
BLOCKS = [
    *("0.0.0.0/0", "10.244.0.0/16", "10.244.0.2/31", "192.168.9.0/24", "198.51.100.0/25"),
    *("::/0", "fd44::/16", "fd09::/64", "fd09::1/128", "fd51::/16"),
]
PEERS = {
    "one": ("node", POD[1]),
    "two": ("node", POD[2]),
    "far": ("other", REMOTE),
}


def some(draw, choices, most=None):
    return draw.sample(choices, draw.randint(0, most or len(choices)))


def draw_ports(draw):
    taken, ports = set(), []
    for n in range(draw.randint(1, 6)):
        family = draw.choice((4, 6))
        protocol = draw.choice(PROTOCOLS)
        frontends = []
        for kind, addresses in (
            (FrontendKind.CLUSTER_IP, VIPS[family]),
            (FrontendKind.LOAD_BALANCER, EXTERNAL[family]),
            (FrontendKind.EXTERNAL_IP, [*EXTERNAL[family], SECOND[family]]),
            (FrontendKind.NODE_PORT, [""]),
        ):
            if kind != FrontendKind.CLUSTER_IP and draw.random() < 0.4:
                continue
            address = draw.choice(addresses)
            number = draw.choice(NUMBERS) + (30000 if kind == FrontendKind.NODE_PORT else 0)
            if (family, protocol, address, number) not in taken:
                taken.add((family, protocol, address, number))
                packed = parse_address(address) if address else b""
                frontends.append(Frontend(kind, packed, number))
        cluster = some(draw, BACKENDS[family])
        own = [POD[1][family], POD[2][family], NODE[family]]
        local = [a for a in some(draw, BACKENDS[family]) if a in own]
        lists = [
            tuple(sorted(backend(parse_address(a), draw.choice((80, 8080))) for a in each))
            for each in (cluster, local)
        ]
        everything = set(lists[0] + lists[1])
        ranges = None
        if draw.random() < 0.3:
            ranges = tuple(parse_prefix(c) for c in some(draw, CIDRS[4] + CIDRS[6], 3))
        ports.append(
            ServicePort(
                name=ServicePortName("default", f"s{n}", "", protocol, family),
                frontends=tuple(frontends),
                cluster=lists[0],
                local=lists[1],
                on_node=tuple(sorted(b for b in everything if format_address(b[:-2]) in own)),
                has_endpoints=bool(everything),
                internal_local=draw.random() < 0.3,
                external_local=draw.random() < 0.4,
                affinity_timeout_s=draw.choice((0, 0, 0, 100)),
                source_ranges=ranges,
            )
        )
    return ports


def draw_table(draw, ports):
    detect = draw.choice(
        [
            DetectLocal(),
            DetectLocal(prefixes=(parse_prefix("10.244.0.0/24"), parse_prefix("fd44::/64"))),
            DetectLocal(prefixes=(parse_prefix("10.244.0.0/16"), parse_prefix("fd44::/16"))),
            DetectLocal(interface="pod*"),
            DetectLocal(interface="pod1"),
            DetectLocal(prefixes=(parse_prefix("::/0"),)),
        ]
    )
    config = ProxyConfig(
        detect_local=detect,
        masquerade_all=draw.random() < 0.2,
        service_cidrs=(parse_prefix("10.96.0.0/16"), parse_prefix("fd96::/112")),
    )
    node = NodeFacts("node", tuple(parse_address(a) for a in (*NODE.values(), *SECOND.values())))
    scopes = {}
    for family in (4, 6):
        prefixes = None
        if draw.random() < 0.5:
            prefixes = tuple(
                parse_prefix(c)
                for c in some(draw, [*CIDRS[family][2:], *{4: ["127.0.0.0/8"], 6: []}[family]])
            )
        scopes[family] = NodePortScope(prefixes, loopback=draw.random() < 0.5)
    return service_table(ports, node, config, scopes)


def draw_packet(draw, table, family):
    link = draw.choice(("pod1", "pod2", "up0", ""))
    source = draw.choice(CLIENTS[family])
    if not link:
        source = draw.choice([NODE[family], SECOND[family], LOOPBACK[family]])
    elif draw.random() < 0.05:
        source = LOOPBACK[family]
    target = draw.choice(
        [
            *VIPS[family],
            *EXTERNAL[family],
            NODE[family],
            SECOND[family],
            LOOPBACK[family],
            {4: "10.96.0.99", 6: "fd96::99"}[family],
            *BACKENDS[family],
        ]
    )
    protocol = draw.choice([*PROTOCOLS, "icmp"])
    if protocol == "icmp":
        protocol = Protocol.ICMP if family == 4 else Protocol.ICMPV6
    number = draw.choice(NUMBERS) + (30000 if draw.random() < 0.5 else 0)
    if protocol in (Protocol.ICMP, Protocol.ICMPV6):
        number = 0
    return link, Packet(parse_address(source), parse_address(target), protocol, number, link)


def draw_pod(draw, name):
    node, addresses = PEERS[name]
    ports = [
        {"name": draw.choice(("web", "dns")), "containerPort": draw.choice(NUMBERS)}
        | draw.choice(({}, {"protocol": "UDP"}))
        for _ in range(draw.randint(0, 2))
    ]
    return msgspec.convert(
        {
            "metadata": {"name": name, "namespace": "x", "labels": draw.choice(LABELS)},
            "spec": {"nodeName": node, "containers": [{"name": "c", "ports": ports}]},
            "status": {"phase": "Running", "podIPs": [{"ip": a} for a in addresses.values()]},
        },
        kube.Pod,
    )


def draw_selector(draw):
    labels = draw.choice(LABELS)
    return {"matchLabels": labels} if labels else {}


def draw_rule(draw, peers):
    rule = {}
    if draw.random() < 0.8:
        rule[peers] = [
            draw.choice(
                (
                    {"podSelector": draw_selector(draw)},
                    {"namespaceSelector": {}},
                    {"ipBlock": draw_block(draw)},
                )
            )
            for _ in range(draw.randint(1, 2))
        ]
    if draw.random() < 0.7:
        rule["ports"] = [
            draw.choice(
                (
                    {"protocol": draw.choice(("TCP", "UDP", "SCTP"))},
                    {"port": draw.choice(NUMBERS), "protocol": draw.choice(("TCP", "UDP", "SCTP"))},
                    {"port": draw.choice(("web", "dns"))},
                    {"port": draw.choice((1, 80)), "endPort": draw.choice((81, 30081, 65535))},
                )
            )
            for _ in range(draw.randint(1, 2))
        ]
    return rule


def draw_block(draw):
    block = draw.choice(BLOCKS)
    inside = [b for b in BLOCKS if b != block and parse_prefix(block).covers(parse_prefix(b))]
    inside = [b for b in inside if (":" in b) == (":" in block)]
    return {"cidr": block, "except": draw.sample(inside, draw.randint(0, len(inside)))}


def draw_policy(draw, name):
    audit = {"podwire.dev/audit": "true"} if draw.random() < 0.2 else {}
    if draw.random() < 0.3:
        return draw_cluster_policy(draw, name, audit)
    types = draw.choice((["Ingress"], ["Egress"], ["Ingress", "Egress"]))
    spec = {"podSelector": draw_selector(draw), "policyTypes": types}
    spec["ingress"] = [draw_rule(draw, "from") for _ in range(draw.randint(0, 2))]
    spec["egress"] = [draw_rule(draw, "to") for _ in range(draw.randint(0, 2))]
    metadata = {"name": name, "namespace": "x", "annotations": audit}
    return msgspec.convert({"metadata": metadata, "spec": spec}, NetworkPolicy)


def draw_cluster_policy(draw, name, audit):
    def rule(peers):
        peer = draw.choice(
            (
                {"namespaces": {}},
                {"pods": {"namespaceSelector": {}, "podSelector": draw_selector(draw)}},
                *({"networks": [draw.choice(BLOCKS)]}, {"nodes": {}})[: 2 * (peers == "to")],
            )
        )
        out = {"action": draw.choice(("Accept", "Deny", "Pass")), peers: [peer]}
        if draw.random() < 0.5:
            ports = {"destinationPort": {"number": draw.choice(NUMBERS)}}
            out["protocols"] = [{draw.choice(("tcp", "udp", "sctp")): ports}]
        return out

    spec = {
        "tier": draw.choice(("Admin", "Baseline")),
        "priority": draw.randint(0, 3),
        "subject": {"namespaces": {}},
        "ingress": [rule("from") for _ in range(draw.randint(0, 2))],
        "egress": [rule("to") for _ in range(draw.randint(0, 2))],
    }
    metadata = {"name": name, "annotations": audit}
    return msgspec.convert({"metadata": metadata, "spec": spec}, ClusterNetworkPolicy)


def draw_cluster(draw, compiler):
    store = Store()
    for name, addresses in (("node", NODE), ("other", OUTSIDE)):
        status = {"addresses": [{"type": "InternalIP", "address": a} for a in addresses.values()]}
        store.put(msgspec.convert({"metadata": {"name": name}, "status": status}, Node))
    store.put(msgspec.convert({"metadata": {"name": "x"}}, Namespace))
    for name in PEERS:
        store.put(draw_pod(draw, name))
    for n in range(draw.randint(1, 4)):
        store.put(draw_policy(draw, f"p{n}"))
    for number, name in ((1, "one"), (2, "two")):
        addresses = tuple(parse_address(text) for text in POD[number].values())
        compiler.attach(Attachment(("x", name), f"pod{number}", addresses))
    return compiler.update(store.take())
