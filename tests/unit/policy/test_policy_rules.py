"""What NetworkPolicy and ClusterNetworkPolicy mean, point by point."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from podwire.kube.objects import ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, Pod
from podwire.kube.store import Store
from podwire.net import parse_address, parse_prefix
from podwire.policy import Attachment, Packet, PolicyCompiler, PolicyTable, Verdict, Why
from podwire.policy.identities import block_regions
from podwire.policy.model import BlockPeer

PODS = {
    "x/a": ("10.0.1.1", "fd00::1:1", "n1", {"app": "a"}),
    "x/b": ("10.0.1.2", "fd00::1:2", "n1", {"app": "b", "empty": ""}),
    "y/a": ("10.0.2.1", "fd00::2:1", "n2", {"app": "a"}),
    "y/b": ("10.0.2.2", "fd00::2:2", "n2", {"app": "b"}),
}
NODES = {"n1": "192.0.2.1", "n2": "192.0.2.2"}


def pod(name: str, **fields: Any) -> Pod:
    namespace, _, short = name.partition("/")
    v4, v6, node, labels = PODS[name]
    source = {
        "metadata": {"namespace": namespace, "name": short, "labels": labels},
        "spec": {
            "nodeName": node,
            "containers": [
                {
                    "ports": [
                        {"name": "web", "containerPort": 80 if short == "a" else 8080},
                        {"name": "dns", "containerPort": 53, "protocol": "UDP"},
                    ]
                }
            ],
            "initContainers": [
                {"restartPolicy": "Always", "ports": [{"name": "mesh", "containerPort": 15001}]},
                {"ports": [{"name": "setup", "containerPort": 15002}]},
            ],
        },
        "status": {"podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}], "phase": "Running"},
    }
    for part, values in fields.items():
        source[part] = {**source[part], **values}
    return msgspec.convert(source, Pod)


def cluster(*policies: dict[str, Any]) -> Store:
    store = Store()
    for name, ip in NODES.items():
        source = {
            "metadata": {"name": name, "labels": {"node": name}},
            "status": {"addresses": [{"type": "InternalIP", "address": ip}]},
        }
        store.put(msgspec.convert(source, Node))
    for name in "xy":
        labels = {"ns": name, "kubernetes.io/metadata.name": name}
        store.put(msgspec.convert({"metadata": {"name": name, "labels": labels}}, Namespace))
    for name in PODS:
        store.put(pod(name))
    for policy in policies:
        kind = ClusterNetworkPolicy if "tier" in policy["spec"] else NetworkPolicy
        store.put(msgspec.convert(policy, kind))
    return store


def network_policy(spec: dict[str, Any], name: str = "p", **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "x", "name": name, **metadata}, "spec": spec}


def cluster_policy(spec: dict[str, Any], name: str = "c") -> dict[str, Any]:
    head = {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}}
    return {"metadata": {"name": name}, "spec": {**head, **spec}}


def compiled(store: Store, node: str = "n1") -> PolicyTable:
    compiler = PolicyCompiler(node)
    for name, (v4, v6, at, _) in PODS.items():
        if at == node:
            namespace, _, short = name.partition("/")
            compiler.attach(
                Attachment((namespace, short), f"veth-{namespace}{short}", (p(v4), p(v6)))
            )
    return compiler.update(store.take())


def p(text: str) -> bytes:
    return parse_address(text)


def packet(source: str, destination: str, port: int, protocol: int = 6, **more: Any) -> Packet:
    def address(name: str) -> bytes:
        if name in PODS:
            return p(PODS[name][more.pop("family", 0)])
        return p(NODES.get(name, name))

    if "family" in more:
        family = more.pop("family")
        return Packet(p(PODS[source][family]), p(PODS[destination][family]), protocol, port)
    return Packet(address(source), address(destination), protocol, port, **more)


def allowed(table: PolicyTable, source: str, destination: str, port: int = 80, **more: Any) -> bool:
    return table.judge(packet(source, destination, port, **more)).allowed


INGRESS_A = {"podSelector": {"matchLabels": {"app": "a"}}}


def ingress(*rules: Any) -> dict[str, Any]:
    return network_policy({**INGRESS_A, "ingress": list(rules)})


@pytest.mark.parametrize(
    ("rules", "who"),
    [
        pytest.param([], "", id="no rules: nobody"),
        pytest.param([{}], "x/b y/a y/b n2 8.8.8.8", id="empty rule: everybody"),
        pytest.param([{"from": []}], "x/b y/a y/b n2 8.8.8.8", id="empty from: everybody"),
        pytest.param([{"from": [{"podSelector": {}}]}], "x/b", id="pods of the own namespace"),
        pytest.param([{"from": [{"namespaceSelector": {}}]}], "x/b y/a y/b", id="all pods"),
        pytest.param(
            [{"from": [{"namespaceSelector": {"matchLabels": {"ns": "y"}},
                        "podSelector": {"matchLabels": {"app": "b"}}}]}],
            "y/b", id="one element: and",
        ),
        pytest.param(
            [{"from": [{"namespaceSelector": {"matchLabels": {"ns": "y"}}},
                       {"podSelector": {"matchLabels": {"app": "b"}}}]}],
            "x/b y/a y/b", id="two elements: or",
        ),
        pytest.param([{"from": [{}]}], "", id="empty peer: refused, nobody"),
        pytest.param(
            [{"from": [{"podSelector": {"matchExpressions": [
                {"key": "gone", "operator": "NotIn", "values": ["1"]}]}}]}],
            "x/b", id="NotIn matches a missing key",
        ),
        pytest.param(
            [{"from": [{"podSelector": {"matchLabels": {"empty": ""}}}]}],
            "x/b", id="an empty value",
        ),
        pytest.param(
            [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"gone": ""}}}]}],
            "", id="an empty value is not a missing key",
        ),
        pytest.param(
            [{"from": [{"namespaceSelector":
                        {"matchLabels": {"kubernetes.io/metadata.name": "y"}}}]}],
            "y/a y/b", id="the namespace's own label",
        ),
        pytest.param(
            [{"from": [{"ipBlock": {"cidr": "10.0.2.7/24", "except": ["10.0.2.2/32"]}}]}],
            "y/a", id="host bits, except, and pods in an ipBlock",
        ),
        pytest.param(
            [{"from": [{"ipBlock": {"cidr": "010.000.002.001/32"}}]}], "y/a", id="leading zeros"
        ),
        pytest.param(
            [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}},
                       {"ipBlock": {"cidr": "10.0.2.2/32"}}]}],
            "y/b n2 8.8.8.8", id="except is no deny",
        ),
        pytest.param(
            [{"from": [{"ipBlock": {"cidr": "10.0.2.0/24", "except": ["nonsense"]}}]}],
            "", id="an unreadable except closes its block",
        ),
        pytest.param([{"from": [{"ipBlock": {"cidr": "::/0"}}]}], "", id="IPv6 opens no IPv4"),
        pytest.param(
            [{"from": [{"ipBlock": {"cidr": "10.0.2.1"}}]}], "", id="an address is no CIDR"
        ),
    ],
)  # fmt: skip
def test_who_may_come_in(rules: list[Any], who: str) -> None:
    table = compiled(cluster(ingress(*rules)))
    sources = ["x/b", "y/a", "y/b", "n2", "8.8.8.8"]
    assert [s for s in sources if allowed(table, s, "x/a")] == who.split()


@pytest.mark.parametrize(
    ("ports", "open_ports"),
    [
        pytest.param(None, "6/80 6/81 17/80 132/80 1/0", id="missing: all"),
        pytest.param([], "6/80 6/81 17/80 132/80 1/0", id="empty: all"),
        pytest.param([{}], "6/80 6/81", id="one empty port: all of TCP"),
        pytest.param([{"protocol": "UDP"}], "17/80", id="all of UDP"),
        pytest.param([{"port": 80}], "6/80", id="number"),
        pytest.param([{"port": 80, "endPort": 81}], "6/80 6/81", id="range"),
        pytest.param([{"port": "web"}], "6/80", id="name"),
        pytest.param([{"port": "web", "protocol": "UDP"}], "", id="name of another protocol"),
        pytest.param([{"port": "web", "endPort": 81}], "", id="a range needs a number"),
        pytest.param([{"port": 81, "endPort": 80}], "", id="backward range"),
        pytest.param([{"port": "80"}], "", id="a number in quotes is no name"),
        pytest.param([{"protocol": "ICMP"}], "", id="unknown protocol"),
        pytest.param([{"protocol": "ICMP"}, {"port": 81}], "6/81", id="the rest holds"),
    ],
)
def test_which_ports(ports: list[Any] | None, open_ports: str) -> None:
    rule = {} if ports is None else {"ports": ports}
    table = compiled(cluster(ingress(rule)))
    found = [
        f"{protocol}/{port}"
        for protocol, port in [(6, 80), (6, 81), (17, 80), (132, 80), (1, 0)]
        if allowed(table, "y/b", "x/a", port, protocol=protocol)
    ]
    assert found == open_ports.split()


def test_named_ports_are_the_destination_pods_also_without_to() -> None:
    store = cluster(
        network_policy({"podSelector": {}, "policyTypes": ["Egress"],
                        "egress": [{"ports": [{"port": "web"}, {"port": "mesh"}]}]})
    )  # fmt: skip
    table = compiled(store)
    assert allowed(table, "x/a", "y/a", 80)
    assert not allowed(table, "x/a", "y/b", 80)
    assert allowed(table, "x/a", "y/b", 8080)
    assert not allowed(table, "x/a", "8.8.8.8", 80), "addresses outside have no names"
    assert allowed(table, "x/a", "y/b", 15001), "a native sidecar stays"
    assert table.problems == {}
    table = compiled(cluster(ingress({"ports": [{"port": "setup"}]})))
    assert not allowed(table, "y/a", "x/a", 15002), "an init container does not"
    assert list(table.problems) == ["NetworkPolicy x/p spec.ingress[0].ports[0].port"]


def test_policy_types_default_as_the_api_server_does() -> None:
    for spec, isolates in [
        ({}, "ingress"),
        ({"egress": []}, "ingress"),
        ({"egress": [{}]}, "egress ingress"),
        ({"policyTypes": ["Egress"], "ingress": [{}]}, "egress"),
        ({"policyTypes": ["Nonsense"], "egress": [{}]}, "egress ingress"),
    ]:
        table = compiled(cluster(network_policy(spec)))
        (policy,) = table.policies.values()
        assert sorted(policy.isolates) == isolates.split(), spec


def test_the_families_are_apart() -> None:
    table = compiled(cluster(ingress({"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]})))
    assert table.judge(packet("y/a", "x/a", 80, family=0)).allowed
    assert not table.judge(packet("y/a", "x/a", 80, family=1)).allowed


def test_the_own_node_reaches_its_pods_and_a_pod_itself() -> None:
    table = compiled(cluster(ingress()))
    judged = table.judge(packet("n1", "x/a", 80))
    assert (judged.verdict, judged.ingress.why) == (Verdict.ALLOW, Why.OWN_NODE)
    assert not allowed(table, "n2", "x/a")
    assert allowed(table, "10.0.1.254", "x/a", source_node="n1"), "by whatever address"
    assert table.judge(packet("x/a", "x/a", 80)).ingress.why is Why.SELF
    assert not allowed(table, "x/a", "x/a", via_service=True)


def test_errors_and_neighbour_discovery_pass_and_echo_is_judged() -> None:
    table = compiled(cluster(ingress()))
    assert allowed(table, "y/a", "x/a", protocol=1, icmp_type=3)
    assert not allowed(table, "y/a", "x/a", protocol=1, icmp_type=8)
    v6 = packet("y/a", "x/a", 0, family=1)
    for icmp_type, passes in [(2, True), (135, True), (128, False)]:
        one = Packet(v6.source, v6.destination, 58, icmp_type=icmp_type)
        assert table.judge(one).allowed is passes


def test_host_network_pods_are_their_node() -> None:
    store = cluster(
        ingress({"from": [{"namespaceSelector": {}}]}),
    )
    host = pod("y/b", spec={"hostNetwork": True}, status={"podIP": "192.0.2.2", "podIPs": []})
    store.put(host)
    table = compiled(store)
    assert not allowed(table, "n2", "x/a"), "no peer"
    assert table.judge(packet("y/a", "n2", 80)).ingress.why is Why.NOT_A_POD


def test_finished_pods_own_nothing_and_terminating_ones_do() -> None:
    rule = {"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}
    for change, passes in [
        ({"status": {"phase": "Succeeded"}}, False),
        ({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, True),
    ]:
        store = cluster(ingress(rule))
        store.put(pod("x/b", **change))
        assert allowed(compiled(store), "x/b", "x/a") is passes


def test_an_address_follows_the_live_pod_in_both_orders_of_events() -> None:
    """flow-10: y/b takes the address of x/b, which the policy lets in."""
    rule = {"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}
    taker = pod("y/b", status={"podIP": "10.0.1.2", "podIPs": []},
                metadata={"creationTimestamp": "2026-01-01T00:00:09Z"})  # fmt: skip
    for delete_first in (True, False):
        store = cluster(ingress(rule))
        compiler = PolicyCompiler("n1")
        compiler.attach(Attachment(("x", "a"), "veth1", (p("10.0.1.1"),)))
        before = compiler.update(store.take())
        assert allowed(before, "10.0.1.2", "x/a")
        for delete in (delete_first, not delete_first):
            if delete:
                store.remove(Pod, ("x", "b"))
            else:
                store.put(taker)
            table = compiler.update(store.take())
        assert not allowed(table, "10.0.1.2", "x/a")
        assert table.outcome(table.endpoints["x", "a"].ingress, p("10.0.1.2"), 6, 80).verdict is (
            Verdict.DENY
        )


def test_an_attached_pod_that_the_api_does_not_know_is_closed() -> None:
    store = cluster()
    compiler = PolicyCompiler("n1")
    compiler.attach(Attachment(("x", "new"), "veth9", (p("10.0.1.9"),)))
    compiler.attach(Attachment(("x", "a"), "veth1", (p("10.0.1.1"),), uid="another"))
    store.put(pod("x/a", metadata={"uid": "this"}))
    table = compiler.update(store.take())
    assert table.judge(packet("10.0.1.9", "y/a", 80)).egress.why is Why.UNKNOWN_POD
    for key in [("x", "new"), ("x", "a")]:
        number = table.endpoints[key].egress
        assert table.outcome(number, p("10.0.2.1"), 6, 80).verdict is Verdict.DENY


def test_pods_that_somebody_else_wires_are_taken_from_their_objects() -> None:
    store = cluster(ingress())
    compiler = PolicyCompiler("n1", attach_own_pods=True)
    table = compiler.update(store.take())
    assert set(table.endpoints) == {("x", "a"), ("x", "b")}
    number = table.endpoints["x", "a"].ingress
    assert table.outcome(number, p("10.0.2.1"), 6, 80).verdict is Verdict.DENY
    store.remove(Pod, ("x", "a"))
    assert set(compiler.update(store.take()).endpoints) == {("x", "b")}


def test_a_bad_subject_isolates_and_allows_nothing() -> None:
    bad = {"key": "app", "operator": "Equals", "values": ["a"]}
    spec = {"podSelector": {"matchExpressions": [bad]}, "ingress": [{}]}
    table = compiled(cluster(network_policy(spec)))
    assert not allowed(table, "y/a", "x/a")
    (where,) = table.problems
    assert where == "NetworkPolicy x/p spec.podSelector.matchExpressions[0].operator"


def test_the_reason_names_policy_rule_and_field() -> None:
    table = compiled(
        cluster(ingress({"from": [{"podSelector": {}}]},
                        {"from": [{"ipBlock": {"cidr": "8.8.8.8/32"}}, {"namespaceSelector": {}}],
                         "ports": [{"port": 81}, {"port": 80}]}))
    )  # fmt: skip
    decision = table.judge(packet("y/a", "x/a", 80)).deciding
    assert (str(decision.policy), decision.rule) == ("NetworkPolicy x/p", 1)
    assert decision.field == "spec.ingress[1].from[1] spec.ingress[1].ports[1]"
    decision = table.judge(packet("y/a", "x/a", 82)).deciding
    assert decision.why is Why.ISOLATED
    assert [str(ref) for ref in decision.isolating] == ["NetworkPolicy x/p"]


def test_audit_mode_only_tells() -> None:
    table = compiled(cluster(network_policy(INGRESS_A, annotations={"podwire.dev/audit": "true"})))
    judged = table.judge(packet("y/a", "x/a", 80))
    assert judged.allowed
    assert judged.verdict is Verdict.AUDIT
    assert judged.deciding.why is Why.ISOLATED


# --- ClusterNetworkPolicy ---

FROM_Y = {"from": [{"namespaces": {"matchLabels": {"ns": "y"}}}]}
TO_Y = {"to": [{"namespaces": {"matchLabels": {"ns": "y"}}}]}


def test_tiers_and_priorities() -> None:
    deny = cluster_policy({"ingress": [{"action": "Deny", **FROM_Y}]})
    accept = cluster_policy({"priority": 0, "ingress": [{"action": "Accept", **FROM_Y}]}, "first")
    baseline = cluster_policy({"tier": "Baseline", "ingress": [{"action": "Deny", **FROM_Y}]}, "b")
    pass_ = cluster_policy({"priority": 0, "ingress": [{"action": "Pass", **FROM_Y}]}, "first")
    for policies, expected in [
        ([deny], False),
        ([deny, ingress({})], False),
        ([deny, accept], True),
        ([deny, pass_], True),
        ([deny, pass_, ingress()], False),
        ([deny, pass_, baseline], False),
        ([baseline, ingress({})], True),
        ([accept, ingress()], True),
        ([baseline], False),
    ]:
        assert allowed(compiled(cluster(*policies)), "y/a", "x/a") is expected


@pytest.mark.parametrize("peer", [{"domainNames": ["a.example"]}, {"new": {}}, {}])
def test_unknown_peers_fail_closed(peer: dict[str, Any]) -> None:
    for action, expected in [("Accept", True), ("Deny", False), ("Pass", False)]:
        table = compiled(cluster(cluster_policy({"egress": [{"action": action, "to": [peer]}]})))
        assert allowed(table, "x/a", "y/a") is expected
        assert any("spec.egress[0].to[0]" in where for where in table.problems)
        baseline = cluster_policy(
            {
                "tier": "Baseline",
                "egress": [{"action": "Deny", "to": [{"networks": ["0.0.0.0/0"]}]}],
            },
            "b",
        )
        accept = cluster_policy({"egress": [{"action": "Accept", "to": [peer]}]})
        assert not allowed(compiled(cluster(accept, baseline)), "x/a", "y/a")


def test_protocols_and_networks_and_nodes() -> None:
    def egress(peer: Any, *protocols: Any) -> PolicyTable:
        rule = {"action": "Deny", "to": [peer], "protocols": list(protocols)}
        return compiled(cluster(cluster_policy({"egress": [rule]})))

    every = {"namespaces": {}}
    table = egress(every, {"tcp": {"destinationPort": {"range": {"start": 80, "end": 90}}}})
    assert [allowed(table, "x/a", "y/a", port) for port in (79, 80, 90, 91)] == [
        True, False, False, True,
    ]  # fmt: skip
    table = egress(every, {"destinationNamedPort": "dns"})
    assert not allowed(table, "x/a", "y/a", 53, protocol=17)
    assert allowed(table, "x/a", "y/a", 53)
    assert allowed(egress(every, {"udp": {}}), "x/a", "y/a")
    table = egress({"networks": ["10.0.2.0/24"]})
    assert not allowed(table, "x/a", "y/a", protocol=1, icmp_type=8)
    assert allowed(table, "x/a", "x/b")
    table = egress({"nodes": {"matchLabels": {"node": "n2"}}})
    assert not allowed(table, "x/a", "n2")
    assert allowed(table, "x/a", "n1")
    assert not allowed(egress(every, {"quic": {}}), "x/a", "y/a"), "unknown protocols fail closed"


def test_equal_start_and_end_are_no_range() -> None:
    port = {"destinationPort": {"range": {"start": 80, "end": 80}}}
    rule = {"action": "Accept", **FROM_Y, "protocols": [{"tcp": port}]}
    table = compiled(cluster(cluster_policy({"ingress": [rule]})))
    (where,) = table.problems
    assert where.endswith("spec.ingress[0].protocols[0].tcp.destinationPort")


def test_regions_of_nested_blocks() -> None:
    def block(cidr: str, *excepts: str) -> BlockPeer:
        return BlockPeer(parse_prefix(cidr), tuple(parse_prefix(text) for text in excepts))

    wide, narrow = block("10.0.0.0/8", "10.1.0.0/16"), block("10.1.2.0/24")
    emptied = block("10.3.0.0/24", "10.3.0.0/16")
    regions = block_regions({b.cidr: {b} for b in (wide, narrow, emptied)})
    assert [(first, last, set(blocks)) for first, last, blocks in regions] == [
        (p("10.0.0.0"), p("10.0.255.255"), {wide}),
        (p("10.1.2.0"), p("10.1.2.255"), {narrow}),
        (p("10.2.0.0"), p("10.255.255.255"), {wide}),
    ]
