"""Laws: rule sets say what the rules say, are disjoint, and do not depend on the way there."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.kube.objects import ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, Pod
from podwire.kube.store import Store
from podwire.net import parse_address
from podwire.policy import Attachment, Packet, PolicyCompiler, PolicyTable, Verdict
from podwire.policy.rulesets import CLOSED

NAMESPACES = ("x", "y")
PODS = [(namespace, name) for namespace in NAMESPACES for name in "abc"]
IPS = {pod: f"10.0.0.{i + 1}" for i, pod in enumerate(PODS)}
ADDRESSES = [*IPS.values(), "10.0.0.200", "192.0.2.1", "192.0.2.2", "8.8.8.8"]
PORTS = [(6, 80), (6, 81), (6, 79), (6, 65535), (17, 80), (17, 53), (132, 80), (1, 0), (47, 5)]

labels = st.dictionaries(st.sampled_from("pq"), st.sampled_from(["", "1", "2"]), max_size=2)
requirements = st.one_of(
    st.fixed_dictionaries(
        {
            "key": st.sampled_from("pq"),
            "operator": st.sampled_from(["In", "NotIn"]),
            "values": st.lists(st.sampled_from(["", "1", "2"]), min_size=1, max_size=2),
        }
    ),
    st.fixed_dictionaries(
        {"key": st.sampled_from("pq"), "operator": st.sampled_from(["Exists", "DoesNotExist"])}
    ),
    st.fixed_dictionaries({"key": st.sampled_from("pq"), "operator": st.just("Bad")}),
)
selectors = st.one_of(
    st.just({}),
    st.just({}),
    st.fixed_dictionaries({"matchLabels": labels}),
    st.fixed_dictionaries({"matchExpressions": st.lists(requirements, min_size=1, max_size=1)}),
)
cidrs = st.sampled_from(
    ["0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/29", "10.0.0.2/32", "192.0.2.0/24", "::/0", "bad"]
)
blocks = st.fixed_dictionaries({"cidr": cidrs}, optional={"except": st.lists(cidrs, max_size=2)})
np_peers = st.one_of(
    st.fixed_dictionaries({"podSelector": selectors}),
    st.fixed_dictionaries({"namespaceSelector": selectors}),
    st.fixed_dictionaries({"podSelector": selectors, "namespaceSelector": selectors}),
    st.fixed_dictionaries({"ipBlock": blocks}),
    st.just({}),
)
protocols = st.sampled_from(["TCP", "UDP", "SCTP"])
np_ports = st.one_of(
    st.fixed_dictionaries({}, optional={"protocol": protocols}),
    st.fixed_dictionaries({"port": st.sampled_from([80, 81])}, optional={"protocol": protocols}),
    st.fixed_dictionaries({"port": st.sampled_from(["web", "dns"])}),
    st.fixed_dictionaries({"port": st.just(80), "endPort": st.sampled_from([79, 81, 65535])}),
)


def np_rules(peers: str) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {},
        optional={peers: st.lists(np_peers, max_size=2), "ports": st.lists(np_ports, max_size=2)},
    )


audits = st.sampled_from([{}, {}, {}, {"podwire.dev/audit": "true"}])
network_policies = st.builds(
    lambda namespace, name, notes, spec: msgspec.convert(
        {"metadata": {"namespace": namespace, "name": name, "annotations": notes}, "spec": spec},
        NetworkPolicy,
    ),
    st.sampled_from(NAMESPACES),
    st.sampled_from(["one", "two"]),
    audits,
    st.fixed_dictionaries(
        {"podSelector": selectors},
        optional={
            "policyTypes": st.lists(st.sampled_from(["Ingress", "Egress"]), max_size=2),
            "ingress": st.lists(np_rules("from"), max_size=2),
            "egress": st.lists(np_rules("to"), max_size=2),
        },
    ),
)
pod_peers = st.one_of(
    st.fixed_dictionaries({"namespaces": selectors}),
    st.fixed_dictionaries(
        {"pods": st.fixed_dictionaries({"namespaceSelector": selectors, "podSelector": selectors})}
    ),
)
egress_peers = st.one_of(
    pod_peers,
    st.fixed_dictionaries({"networks": st.lists(cidrs, min_size=1, max_size=2)}),
    st.fixed_dictionaries({"nodes": selectors}),
    st.fixed_dictionaries({"domainNames": st.just(["a.example"])}),
)
cnp_protocols = st.one_of(
    st.just({"tcp": {"destinationPort": {"number": 80}}}),
    st.just({"udp": {"destinationPort": {"range": {"start": 53, "end": 80}}}}),
    st.just({"sctp": {}}),
    st.just({"destinationNamedPort": "web"}),
    st.just({"quic": {}}),
)


def cnp_rules(peers: str, peer: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {
            "action": st.sampled_from(["Accept", "Deny", "Pass"]),
            peers: st.lists(peer, min_size=1, max_size=2),
        },
        optional={"protocols": st.lists(cnp_protocols, min_size=1, max_size=2)},
    )


cluster_policies = st.builds(
    lambda name, notes, spec: msgspec.convert(
        {"metadata": {"name": name, "annotations": notes}, "spec": spec}, ClusterNetworkPolicy
    ),
    st.sampled_from(["first", "second"]),
    audits,
    st.fixed_dictionaries(
        {
            "tier": st.sampled_from(["Admin", "Baseline"]),
            "priority": st.integers(0, 3),
            "subject": pod_peers,
        },
        optional={
            "ingress": st.lists(cnp_rules("from", pod_peers), max_size=2),
            "egress": st.lists(cnp_rules("to", egress_peers), max_size=2),
        },
    ),
)
container_ports = st.lists(
    st.sampled_from(
        [
            {"name": "web", "containerPort": 80, "protocol": "TCP"},
            {"name": "web", "containerPort": 81, "protocol": "TCP"},
            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
        ]
    ),
    max_size=2,
)
pods = st.builds(
    lambda key, some, ports, ip, phase: msgspec.convert(
        {
            "metadata": {"namespace": key[0], "name": key[1], "labels": some},
            "spec": {"nodeName": "n1", "containers": [{"ports": ports}]},
            "status": {"podIPs": [{"ip": ip or IPS[key]}], "phase": phase},
        },
        Pod,
    ),
    st.sampled_from(PODS),
    labels,
    container_ports,
    st.sampled_from([None, None, None, "10.0.0.1"]),
    st.sampled_from(["Running", "Running", "Running", "Succeeded"]),
)
namespaces = st.builds(
    lambda name, some: msgspec.convert({"metadata": {"name": name, "labels": some}}, Namespace),
    st.sampled_from(NAMESPACES),
    labels,
)
nodes = st.builds(
    lambda ip, some: msgspec.convert(
        {
            "metadata": {"name": "n1", "labels": some},
            "status": {"addresses": [{"type": "InternalIP", "address": ip}]},
        },
        Node,
    ),
    st.sampled_from(["192.0.2.1", "192.0.2.2"]),
    labels,
)
policies = st.one_of(network_policies, network_policies, cluster_policies)
changes = st.tuples(
    st.sampled_from([False, False, False, True]),
    st.one_of(policies, policies, pods, namespaces, nodes),
)
steps = st.lists(st.lists(changes, min_size=1, max_size=5), min_size=1, max_size=5)
clusters = st.tuples(
    *(st.tuples(labels, container_ports) for _ in PODS), *(labels for _ in NAMESPACES)
)


def cluster(facts: tuple[Any, ...]) -> list[tuple[bool, Any]]:
    """All pods and namespaces, with the labels and ports drawn."""
    out: list[tuple[bool, Any]] = []
    for key, (some, ports) in zip(PODS, facts, strict=False):
        source = {
            "metadata": {"namespace": key[0], "name": key[1], "labels": some},
            "spec": {"nodeName": "n1", "containers": [{"ports": ports}]},
            "status": {"podIPs": [{"ip": IPS[key]}]},
        }
        out.append((False, msgspec.convert(source, Pod)))
    for name, some in zip(NAMESPACES, facts[len(PODS) :], strict=True):
        source = {"metadata": {"name": name, "labels": some}}
        out.append((False, msgspec.convert(source, Namespace)))
    return out


def attachments(store: Store) -> list[Attachment]:
    return [
        Attachment(key, f"veth-{key[0]}-{key[1]}", (parse_address(IPS[key]),))
        for key in store.all(Pod)
    ]


def disagreements(table: PolicyTable) -> list[str]:
    out: list[str] = []
    for endpoint in table.endpoints.values():
        (own,) = endpoint.addresses
        if table.owners[own].key != endpoint.pod:
            continue
        for text in ADDRESSES:
            peer = parse_address(text)
            if peer == own:
                continue
            for protocol, port in PORTS:
                for rule_set, source, destination, which in (
                    (endpoint.egress, own, peer, "egress"),
                    (endpoint.ingress, peer, own, "ingress"),
                ):
                    judged = getattr(
                        table.judge(Packet(source, destination, protocol, port)), which
                    )
                    if judged.why.value == "own node":
                        continue
                    compiled = table.outcome(rule_set, peer, protocol, port)
                    if judged.verdict is not compiled.verdict:
                        out.append(f"{endpoint.pod} {which} {text} {protocol}/{port}: {judged}")
                    elif rule_set != CLOSED and judged.policy != compiled.policy:
                        out.append(f"{endpoint.pod} {which} {text}: {judged} but {compiled}")
    return out


def assert_disjoint(table: PolicyTable) -> None:
    for rule_set in table.rule_sets.values():
        for verdicts in (rule_set.default, *rule_set.entries.values()):
            for _, spans in verdicts.protocols:
                assert spans[0].first == 0
                assert spans[-1].last == 65535
                for left, right in pairwise(spans):
                    assert left.last + 1 == right.first
    ends = [(len(i.first), i.first, i.last) for i in table.intervals]
    assert ends == sorted(ends)
    for left, right in pairwise(ends):
        assert left[0] != right[0] or left[2] < right[1]


def run_steps(script: list[list[tuple[bool, Any]]]) -> None:
    store = Store()
    compiler = PolicyCompiler("n1")
    attached: set[tuple[str, str]] = set()
    table: PolicyTable | None = None
    for step in script:
        for remove, obj in step:
            if remove:
                store.remove(type(obj), obj.key)
            else:
                store.put(obj)
        wanted = {attachment.pod: attachment for attachment in attachments(store)}
        for key in attached - wanted.keys():
            compiler.detach(key)
        for key in wanted.keys() - attached:
            compiler.attach(wanted[key])
        attached = set(wanted)
        entries = {n: dict(r.entries) for n, r in table.rule_sets.items()} if table else {}
        before, table = table, compiler.update(store.take())
        for number, kept in entries.items():
            assert before is not None
            assert before.rule_sets[number].entries == kept, "an old table changed"
        assert disagreements(table) == []
        assert_disjoint(table)
        assert_delta(before, table)


def assert_delta(old: PolicyTable | None, new: PolicyTable) -> None:
    delta = new.delta(old)
    if old is None:
        return
    for key in old.addresses.keys() | new.addresses.keys():
        if old.addresses.get(key) != new.addresses.get(key):
            assert key in delta.addresses
    for pod in old.endpoints.keys() | new.endpoints.keys():
        if old.endpoints.get(pod) != new.endpoints.get(pod):
            assert pod in delta.endpoints
    for number in old.rule_sets.keys() | new.rule_sets.keys():
        left, right = old.rule_sets.get(number), new.rule_sets.get(number)
        if number != CLOSED and (
            left is None
            or right is None
            or (left.default, left.entries) != (right.default, right.entries)
        ):
            assert number in delta.rule_sets


@settings(max_examples=120)
@given(clusters, steps)
def test_rule_sets_say_what_the_rules_say_after_any_history(
    facts: tuple[Any, ...], script: list[list[tuple[bool, Any]]]
) -> None:
    run_steps([cluster(facts) + script[0], *script[1:]])


def test_the_law_would_notice() -> None:
    """A rule set that allows too much is found."""
    store = Store()
    store.put(
        msgspec.convert({"metadata": {"namespace": "x", "name": "one"}, "spec": {}}, NetworkPolicy)
    )
    for key in PODS:
        store.put(
            msgspec.convert(
                {
                    "metadata": {"namespace": key[0], "name": key[1]},
                    "spec": {"nodeName": "n1"},
                    "status": {"podIPs": [{"ip": IPS[key]}]},
                },
                Pod,
            )
        )
    compiler = PolicyCompiler("n1")
    for attachment in attachments(store):
        compiler.attach(attachment)
    table = compiler.update(store.take())
    assert (
        table.judge(Packet(parse_address("10.0.0.4"), parse_address("10.0.0.1"), 6, 80)).verdict
        is Verdict.DENY
    )
    for pod, endpoint in list(table.endpoints.items()):
        table.endpoints[pod] = endpoint._replace(ingress=None)  # type: ignore[index]
    assert disagreements(table)
