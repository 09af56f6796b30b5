"""The API server's judgement. The shared conformance cases run where they are present."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from podwire.lab.api.defaults import DEFAULTS
from podwire.lab.api.typed import prune_nulls
from podwire.lab.api.validation import validate

SHARED = Path(__file__).parents[5] / "shared/conformance/netpol/validation"


def fields_of(kind: str, spec: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
    obj = {"metadata": {"name": "x", "namespace": "ns"}, "spec": spec}
    prune_nulls(obj)
    DEFAULTS[kind](obj)
    return [problem.field for problem in validate(kind, obj, old)]


def policy_with(peer: Any = None, port: Any = None) -> dict[str, Any]:
    rule: dict[str, Any] = {}
    if peer is not None:
        rule["from"] = [peer]
    if port is not None:
        rule["ports"] = [port]
    return {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [rule]}


def block(cidr: str, *exceptions: str) -> dict[str, Any]:
    return {"ipBlock": {"cidr": cidr, "except": list(exceptions)}}


PEER = "spec.ingress[0].from[0]"
PORT = "spec.ingress[0].ports[0]"


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ({}, []),
        (policy_with({"podSelector": {}}), []),
        (policy_with({}), [PEER]),
        (policy_with(block("10.0.0.0/8") | {"podSelector": {}}), [PEER]),
        (policy_with(block("")), [f"{PEER}.ipBlock.cidr"]),
        (policy_with(block("10.0.0.0")), [f"{PEER}.ipBlock.cidr"]),
        (policy_with(block("10.0.0.5/8")), [f"{PEER}.ipBlock.cidr"]),
        (policy_with(block("010.0.0.0/8")), [f"{PEER}.ipBlock.cidr"]),
        (policy_with(block("10.0.0.0/08")), [f"{PEER}.ipBlock.cidr"]),
        (policy_with(block("::ffff:10.0.0.0/104")), [f"{PEER}.ipBlock.cidr"]),
        (policy_with(block("10.0.0.0/8", "10.1.0.0/16")), []),
        (policy_with(block("10.0.0.0/8", "10.0.0.0/8")), [f"{PEER}.ipBlock.except[0]"]),
        (policy_with(block("10.0.0.0/8", "fd00::/64")), [f"{PEER}.ipBlock.except[0]"]),
        (
            policy_with(block("10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/16")),
            [f"{PEER}.ipBlock.except[1]"],
        ),
        (policy_with(port={}), []),
        (policy_with(port={"port": 0}), [f"{PORT}.port"]),
        (policy_with(port={"port": 65536}), [f"{PORT}.port"]),
        (policy_with(port={"port": "80"}), [f"{PORT}.port"]),
        (policy_with(port={"port": "web"}), []),
        (policy_with(port={"port": "web", "endPort": 90}), [f"{PORT}.endPort"]),
        (policy_with(port={"endPort": 90}), [f"{PORT}.endPort"]),
        (policy_with(port={"port": 90, "endPort": 80}), [f"{PORT}.endPort"]),
        (policy_with(port={"port": 80, "endPort": 80}), []),
        (policy_with(port={"protocol": "ICMP"}), [f"{PORT}.protocol"]),
        ({"policyTypes": ["Ingress", "Egress", "Ingress"]}, ["spec.policyTypes"]),
        ({"policyTypes": ["Sideways"]}, ["spec.policyTypes[0]"]),
        (
            {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}},
            ["spec.podSelector.matchExpressions[0].values"],
        ),
        (
            policy_with({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Is"}]}}),
            [f"{PEER}.podSelector.matchExpressions[0].operator"],
        ),
        ({"podSelector": {"matchLabels": {"a": "-"}}}, ["spec.podSelector.matchLabels"]),
    ],
)
def test_network_policy(spec, fields):
    assert fields_of("NetworkPolicy", spec) == fields


def test_a_stored_cidr_stays_valid_on_update():
    old = {"metadata": {"name": "x"}, "spec": policy_with(block("10.0.0.5/8"))}
    assert fields_of("NetworkPolicy", policy_with(block("10.0.0.5/8")), old) == []
    assert fields_of("NetworkPolicy", policy_with(block("10.0.0.6/8")), old) == [
        f"{PEER}.ipBlock.cidr"
    ]


WEB = {"name": "web", "port": 80}


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ({"ports": [{"port": 80}]}, []),
        ({"ports": []}, ["spec.ports"]),
        ({"ports": [], "clusterIP": "None"}, []),
        ({"ports": [{"port": 0}]}, ["spec.ports[0].port", "spec.ports[0].targetPort"]),
        ({"ports": [WEB, {"port": 81}]}, ["spec.ports[1].name"]),
        ({"ports": [WEB, {"name": "web", "port": 81}]}, ["spec.ports[1].name"]),
        ({"ports": [WEB, {"name": "b", "port": 80}]}, ["spec.ports[1]"]),
        ({"ports": [WEB, {"name": "b", "port": 80, "protocol": "UDP"}]}, []),
        ({"ports": [{"port": 80, "protocol": "ICMP"}]}, ["spec.ports[0].protocol"]),
        ({"ports": [{"port": 80, "nodePort": 30000}]}, ["spec.ports[0].nodePort"]),
        ({"ports": [WEB], "type": "Magic"}, ["spec.type"]),
        ({"type": "ExternalName"}, ["spec.externalName"]),
        ({"type": "ExternalName", "externalName": "example.com"}, []),
        (
            {"ports": [WEB], "type": "NodePort", "clusterIP": "None", "clusterIPs": ["None"]},
            ["spec.clusterIPs[0]"],
        ),
        ({"ports": [WEB], "sessionAffinity": "Cookie"}, ["spec.sessionAffinity"]),
        (
            {
                "ports": [WEB],
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}},
            },
            ["spec.sessionAffinityConfig.clientIP.timeoutSeconds"],
        ),
        ({"ports": [WEB], "externalIPs": ["127.0.0.1"]}, ["spec.externalIPs[0]"]),
        ({"ports": [WEB], "externalIPs": ["010.1.1.1"]}, ["spec.externalIPs[0]"]),
        ({"ports": [WEB], "externalTrafficPolicy": "Local"}, ["spec.externalTrafficPolicy"]),
        (
            {"ports": [WEB], "loadBalancerSourceRanges": ["10.0.0.0/8"]},
            ["spec.loadBalancerSourceRanges"],
        ),
        (
            {"ports": [WEB], "type": "LoadBalancer", "loadBalancerSourceRanges": ["10.0.0.1/8"]},
            ["spec.loadBalancerSourceRanges[0]"],
        ),
        ({"ports": [WEB], "healthCheckNodePort": 30001}, ["spec.healthCheckNodePort"]),
        ({"ports": [WEB], "trafficDistribution": "Near"}, ["spec.trafficDistribution"]),
        ({"ports": [WEB], "internalTrafficPolicy": "Near"}, ["spec.internalTrafficPolicy"]),
        (
            {"ports": [WEB], "ipFamilies": ["IPv4", "IPv4"], "ipFamilyPolicy": "PreferDualStack"},
            ["spec.ipFamilies[1]"],
        ),
    ],
)
def test_service(spec, fields):
    assert fields_of("Service", spec) == fields


def test_the_sentence_is_the_api_servers():
    obj = {"metadata": {"name": "x"}, "spec": {"ports": [{"port": 80, "protocol": "ICMP"}]}}
    DEFAULTS["Service"](obj)
    assert [str(problem) for problem in validate("Service", obj)] == [
        'spec.ports[0].protocol: Unsupported value: "ICMP": supported values: "SCTP", "TCP", "UDP"'
    ]


@pytest.mark.parametrize("case", sorted(SHARED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shared_case(case):
    wanted = yaml.safe_load(case.read_text())
    policy = wanted["policy"]
    prune_nulls(policy)
    DEFAULTS["NetworkPolicy"](policy)
    fields = [problem.field for problem in validate("NetworkPolicy", policy)]
    assert fields == ([] if wanted["expect"] == "accept" else [wanted["field"]])
