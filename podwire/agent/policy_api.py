"""What `podwire policy` asks of all policies: functions from the table to what JSON can hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec

from podwire.agent.control import Query
from podwire.errors import InvalidObject
from podwire.kernel.ctnetlink.entries import Entry
from podwire.kube.objects import ClusterNetworkPolicy, NetworkPolicy
from podwire.net import Protocol, format_address, protocol_name
from podwire.policy import Direction, PolicyTable
from podwire.policy import lint as linting
from podwire.policy import matrix as matrices
from podwire.policy.explain import describe
from podwire.policy.model import Key, Policy, Rule

_KINDS = {"NetworkPolicy": NetworkPolicy, "ClusterNetworkPolicy": ClusterNetworkPolicy}


def listing(table: PolicyTable, query: Query) -> list[dict[str, Any]]:
    """One row per policy; `namespace` narrows it down."""
    namespace = query.get("namespace", "")
    return [
        {
            "policy": str(policy.ref),
            "tier": policy.tier.name.capitalize(),
            "priority": policy.priority,
            "selects": str(policy.subject.pods),
            "pods": len(_selected(table, policy)),
            "isolates": sorted(direction.value for direction in policy.isolates),
            "ingress_rules": len(policy.ingress),
            "egress_rules": len(policy.egress),
            "audit": policy.audit,
            "version": policy.version,
            "problems": len(policy.problems),
        }
        for policy in sorted(table.policies.values(), key=lambda policy: policy.order)
        if not namespace or policy.ref.namespace == namespace
    ]


def show(table: PolicyTable, query: Query) -> list[dict[str, Any]]:
    """All about the policies of a name (``namespace/name``, ``name``). Raises InvalidObject."""
    return [
        {
            "policy": str(policy.ref),
            "version": policy.version,
            "audit": policy.audit,
            "subject": describe(policy.subject),
            "pods": [f"{namespace}/{name}" for namespace, name in _selected(table, policy)],
            "isolates": sorted(direction.value for direction in policy.isolates),
            "rules": [
                _shown(direction, rule)
                for direction in Direction
                for rule in policy.rules(direction)
            ],
            "problems": dict(policy.problems),
        }
        for policy in _named(table, query.get("name", ""))
    ]


def _named(table: PolicyTable, text: str) -> list[Policy]:
    """Policies of all kinds called so. Raises InvalidObject when there is none."""
    namespace, slash, name = text.rpartition("/")
    found = [
        policy
        for ref, policy in table.policies.items()
        if ref.name == name and (not slash or ref.namespace == namespace)
    ]
    if not found:
        raise InvalidObject("no such policy is known here", object=text)
    return found


def _shown(direction: Direction, rule: Rule) -> dict[str, Any]:
    return {
        "direction": direction.value,
        "number": rule.number,
        "name": rule.name,
        "action": rule.action.value,
        "peers": None if rule.peers is None else [describe(peer) for peer in rule.peers],
        "ports": None if rule.ports is None else [str(port) for port in rule.ports],
    }


def _selected(table: PolicyTable, policy: Policy) -> list[Key]:
    out: list[Key] = []
    for facts in matrices.pods_of(table):
        host = table.pod_host(facts.key)
        if host and policy.subject.matches(host.namespace, host.labels, host.namespace_labels):
            out.append(facts.key)
    return out


def applied(table: PolicyTable, query: Query, enforced: bool) -> dict[str, Any]:
    """Which version of the policies of a name this node has, and whether the kernel has it."""
    name = query.get("name", "")
    try:
        versions = {str(policy.ref): policy.version for policy in _named(table, name)}
    except InvalidObject:
        versions = {}
    return {"node": table.node_name, "versions": versions, "enforced": enforced}


def lint(table: PolicyTable, _: Query) -> list[dict[str, Any]]:
    """Every finding."""
    return [
        {"policy": str(finding.policy), "field": finding.field, "message": finding.message}
        for finding in linting.lint(table)
    ]


# --- matrix and diff -----------------------------------------------------------------------------


def matrix(table: PolicyTable, query: Query) -> dict[str, Any]:
    """Who reaches whom on `port`/`protocol`, `family`, among the pods of `namespaces` (a,b)."""
    wanted = [name for name in query.get("namespaces", "").split(",") if name]
    pods = matrices.pods_of(table, wanted)
    protocol = Protocol[query.get("protocol", "TCP").upper()]
    bits = 128 if query.get("family") == "IPv6" else 32
    rows = matrices.reach(table, pods, protocol, int(query.get("port", "80")), bits)
    return {
        "pods": [f"{pod.key[0]}/{pod.key[1]}" for pod in pods],
        "rows": [[verdict.value if verdict else None for verdict in row] for row in rows],
    }


def _policies_in(documents: Iterable[Any]) -> list[NetworkPolicy | ClusterNetworkPolicy]:
    """The policies among manifests. Raises InvalidObject for one that does not decode."""
    out: list[NetworkPolicy | ClusterNetworkPolicy] = []
    for document in documents:
        kind = _KINDS.get(str(document.get("kind")))
        if kind is None:
            continue
        metadata = document.setdefault("metadata", {})
        if kind is NetworkPolicy:
            metadata.setdefault("namespace", "default")
        try:
            out.append(msgspec.convert(document, kind))
        except msgspec.ValidationError as error:
            raise InvalidObject(
                str(error), object=f"{document['kind']} {metadata.get('name')}"
            ) from None
    return out


def proposed(table: PolicyTable, query: Query) -> PolicyTable:
    """The table with the policies in `body` (a JSON list of manifests). Raises InvalidObject."""
    try:
        documents = json.loads(query.get("body", "[]"))
    except ValueError:
        raise InvalidObject("the body is no JSON list of policies") from None
    return matrices.with_policies(table, _policies_in(documents))


def diff(before: PolicyTable, after: PolicyTable) -> dict[str, Any]:
    """What would be judged otherwise."""
    changes, points = matrices.changes(before, after)
    new = [ref for ref, policy in after.policies.items() if before.policies.get(ref) is not policy]
    return {
        "policies": [str(ref) for ref in new],
        "tried": [f"{Protocol(protocol).name}/{port}" for protocol, port in points],
        "changes": [
            {
                "source": "/".join(change.source),
                "destination": "/".join(change.destination),
                "protocol": Protocol(change.protocol).name,
                "port": change.port,
                "before": change.before.verdict.value,
                "after": change.after.verdict.value,
                "reason": str(change.after.deciding),
            }
            for change in changes
        ],
        "problems": {
            f"{ref} {field}": sentence
            for ref in new
            for field, sentence in after.policies[ref].problems
        },
    }


def flow(table: PolicyTable, entry: Entry) -> str:
    """A connection in words."""
    source, destination = entry.original.source, entry.reply.source
    return (
        f"{table.host(source)} ({format_address(source)}) → "
        f"{table.host(destination)} ({format_address(destination)}) "
        f"{protocol_name(entry.original.protocol)}/{entry.reply.source_port}"
    )
