"""What people ask: why, matrix, diff, lint."""

from __future__ import annotations

import json

import pytest

from podwire.agent import policy_api, policy_drops, policy_why
from podwire.errors import InvalidObject
from podwire.kernel.nflog import Logged, parse_packet
from podwire.policy.lint import lint
from tests.unit.policy.test_policy_rules import (
    cluster,
    cluster_policy,
    compiled,
    ingress,
    network_policy,
    p,
)

FROM_B = {"from": [{"podSelector": {"matchLabels": {"app": "b"}}}], "ports": [{"port": 80}]}


def why(source: str, destination: str, port: int, **more: str):
    store = cluster(ingress(FROM_B))
    query = {"src": source, "dst": destination, "port": str(port), "family": "IPv4", **more}
    return policy_why.why(store, compiled(store), query)


def test_why_names_the_rule_or_the_nearest_miss() -> None:
    (answer,) = why("x/b", "x/a", 80)
    assert (answer["verdict"], answer["source"], answer["destination"]) == (
        "allow", "pod x/b", "pod x/a",
    )  # fmt: skip
    inbound = answer["directions"][1]
    assert inbound["field"] == "spec.ingress[0].from[0] spec.ingress[0].ports[0]"
    (answer,) = why("x/b", "x/a", 81)
    assert answer["verdict"] == "deny"
    assert answer["directions"][1]["hints"] == [
        "NetworkPolicy x/p spec.ingress[0] matches the peer, but its ports are TCP/80"
    ]
    (answer,) = why("8.8.8.8", "x/a", 80)
    assert answer["directions"][1]["hints"] == [
        "NetworkPolicy x/p spec.ingress[0] matches the port, but its peers are pods app=b of "
        "namespace x"
    ]
    (answer,) = why("8.8.8.8", "10.0.1.1", 81)
    assert answer["directions"][1]["hints"] == [
        "no ingress rule of the isolating policies comes near: add one"
    ]
    (answer,) = why("node:n1", "x/a", 80)
    assert answer["directions"][1]["why"] == "own node"


def test_why_answers_for_each_family_and_refuses_what_it_cannot_know() -> None:
    assert [a["source_address"] for a in why("x/b", "x/a", 80, family="")] == [
        "10.0.1.2", "fd00::1:2",
    ]  # fmt: skip
    for source, destination in [("x/none", "x/a"), ("x/a", "x/none"), ("node:n9", "x/a")]:
        with pytest.raises(InvalidObject):
            why(source, destination, 80)
    with pytest.raises(InvalidObject, match="family"):
        why("8.8.8.8", "fd00::1:1", 80, family="")


def test_matrix_shows_who_reaches_whom() -> None:
    table = compiled(cluster(ingress(FROM_B)))
    answer = policy_api.matrix(table, {"port": "80", "namespaces": "x"})
    assert answer["pods"] == ["x/a", "x/b"]
    assert answer["rows"] == [[None, "allow"], ["allow", None]]
    answer = policy_api.matrix(table, {"port": "81"})
    assert [row[0] for row in answer["rows"]] == [None, "deny", "deny", "deny"]


def test_diff_names_the_pairs_that_change() -> None:
    before = compiled(cluster(ingress(FROM_B)))
    new = ingress({"from": [{"namespaceSelector": {}}], "ports": [{"port": 80}]})
    body = json.dumps([{"kind": "NetworkPolicy", **new}, {"kind": "Service"}])
    after = policy_api.proposed(before, {"body": body})
    answer = policy_api.diff(before, after)
    assert answer["policies"] == ["NetworkPolicy x/p"]
    assert [(c["source"], c["destination"], c["port"], c["after"]) for c in answer["changes"]] == [
        ("y/a", "x/a", 80, "allow"),
        ("y/b", "x/a", 80, "allow"),
    ]
    with pytest.raises(InvalidObject, match="spec"):
        policy_api.proposed(before, {"body": '[{"kind": "NetworkPolicy", "spec": 1}]'})


def test_lint() -> None:
    blocks = [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.2.0/24"]}},
              {"ipBlock": {"cidr": "10.0.2.1/32"}}]  # fmt: skip
    table = compiled(
        cluster(
            network_policy({"podSelector": {"matchLabels": {"app": "none"}}}, "nobody"),
            ingress({"from": blocks}, {"from": [{}]}, {"ports": [{"port": "gone"}]}),
            cluster_policy({"tier": "Nonsense"}, "bad"),
        )
    )
    found = {(str(f.policy), f.field, f.message) for f in lint(table)}
    assert found >= {
        ("NetworkPolicy x/nobody", "spec", "selects no pod"),
        ("NetworkPolicy x/p", "spec.ingress[0].from[0].ipBlock.except",
         "10.0.2.0/24 is no deny: spec.ingress[0] allows addresses of it again"),
        ("NetworkPolicy x/p", "spec.ingress[1]",
         "no peer of it can be enforced: it matches nobody"),
        ("NetworkPolicy x/p", "spec.ingress[2].ports[0].port", "no pod has a port named 'gone'"),
        ("ClusterNetworkPolicy bad", "spec.tier",
         "unknown tier 'Nonsense': the policy is not enforced"),
    }  # fmt: skip
    assert lint(compiled(cluster(ingress(FROM_B)))) == []


def test_a_logged_packet_is_named() -> None:
    table = compiled(cluster(ingress(FROM_B)))
    packet = Logged("podwire denied", p("10.0.2.1"), p("10.0.1.1"), 6, 40000, 80, None)
    drop = policy_drops.logged(table, packet, 0)
    assert (drop["source_name"], drop["destination_name"]) == ("y/a", "x/a")
    assert drop["policies"] == ["NetworkPolicy x/p"]
    assert drop["direction"] == "ingress"


def test_packets_are_read_behind_extension_headers() -> None:
    head = b"\x60\0\0\0\0\x10\0\x40" + p("fd00::1") + p("fd00::2")
    udp = b"\x30\x39\0\x35\0\x08\0\0"
    packet = head + b"\x11\0\x01\x04\0\0\0\0" + udp
    assert parse_packet(packet) == (p("fd00::1"), p("fd00::2"), 17, 12345, 53, None)
    icmp = b"\x45" + bytes(8) + b"\x01" + bytes(2) + p("10.0.0.1") + p("10.0.0.2") + b"\x08\0"
    assert parse_packet(icmp) == (p("10.0.0.1"), p("10.0.0.2"), 1, 0, 0, 8)
    assert parse_packet(b"") is None
