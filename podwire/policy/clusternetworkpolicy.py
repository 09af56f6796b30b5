"""ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2) → `Policy`.

An unknown or unsupported peer (`domainNames`: we do not follow DNS) fails closed, as the API asks:
an Accept rule matches nothing by it, a Deny or Pass rule becomes a Deny of everything. The same is
done for a protocol of an unknown kind and for an unknown action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import msgspec

from podwire.kube.objects import ClusterNetworkPolicy, LabelSelector
from podwire.net import Protocol
from podwire.policy.model import (
    AUDIT_ANNOTATION,
    Action,
    BlockPeer,
    Direction,
    NamedPort,
    NodePeer,
    Peer,
    PodPeer,
    Policy,
    PolicyRef,
    PortMatch,
    PortRange,
    Rule,
    Tier,
)
from podwire.policy.networkpolicy import read_prefix
from podwire.policy.selectors import EVERYTHING, Report, Selector, compile_selector

_TIERS = {"Admin": Tier.ADMIN, "Baseline": Tier.BASELINE}
_PROTOCOLS = {"tcp": Protocol.TCP, "udp": Protocol.UDP, "sctp": Protocol.SCTP}
_MATCHES_NOTHING = PodPeer(Selector((("", ""),)), "")


def translate(source: ClusterNetworkPolicy) -> Policy:
    """The policy; what could not be enforced as written is in its `problems`.

    Without a sound tier and subject it selects nothing: such a policy isolates nobody by itself,
    and nobody can say whom it meant.
    """
    problems: list[tuple[str, str]] = []

    def report(field: str, message: str) -> None:
        problems.append((field, message))

    spec = source.spec
    tier = _TIERS.get(spec.tier)
    if tier is None:
        report("spec.tier", f"unknown tier {spec.tier!r}: the policy is not enforced")
    if not 0 <= spec.priority <= 1000:
        report("spec.priority", f"{spec.priority} is not between 0 and 1000")
    subject = _pod_peer(spec.subject, "spec.subject", report)
    if tier is None or subject is None:
        tier, subject = Tier.ADMIN, _MATCHES_NOTHING
    return Policy(
        PolicyRef("ClusterNetworkPolicy", "", source.metadata.name),
        tier,
        subject,
        priority=spec.priority,
        ingress=_rules(Direction.INGRESS, spec.ingress, report),
        egress=_rules(Direction.EGRESS, spec.egress, report),
        audit=source.metadata.annotations.get(AUDIT_ANNOTATION) == "true",
        problems=tuple(problems),
        version=source.metadata.resource_version,
    )


def _rules(direction: Direction, rules: Any, report: Report) -> tuple[Rule, ...]:
    return tuple(_rule(direction, i, rule, report) for i, rule in enumerate(rules or ()))


def _rule(direction: Direction, number: int, source: Any, report: Report) -> Rule:
    field = f"spec.{direction.value}[{number}]"
    rule = _mapping(source)
    try:
        action = Action(rule.get("action"))
    except ValueError:
        report(f"{field}.action", f"unknown action {rule.get('action')!r}: taken as Deny")
        action = Action.DENY
    read_peer = _pod_peer if direction is Direction.INGRESS else _egress_peer
    listed, where = rule.get(direction.peers_field), f"{field}.{direction.peers_field}"
    peers, peers_known = _each(listed, where, read_peer, report)
    if not listed:
        report(where, "at least one peer is required")
        peers_known = False
    if not peers_known and action is not Action.ACCEPT:
        return Rule(Action.DENY, number, field, name=str(rule.get("name", "")))
    listed = rule.get("protocols")
    ports, ports_known = _each(listed, f"{field}.protocols", _port, report)
    if not ports_known and action is not Action.ACCEPT:
        action, listed = Action.DENY, None
    return Rule(
        action,
        number,
        field,
        tuple(peer for peer, _ in peers),
        tuple(port for port, _ in ports) if listed else None,
        tuple(field for _, field in peers),
        tuple(field for _, field in ports) if listed else (),
        str(rule.get("name", "")),
    )


def _each(
    items: Any, field: str, read: Callable[[dict[str, Any], str, Report], Any], report: Report
) -> tuple[list[tuple[Any, str]], bool]:
    """What was read with the fields it came from, and whether all of it was understood."""
    pairs: list[tuple[Any, str]] = []
    known = True
    for i, item in enumerate(cast("list[Any]", items) if isinstance(items, list) else ()):
        where = f"{field}[{i}]"
        found = read(_mapping(item), where, report)
        if found is None:
            known = False
            continue
        several = cast("list[Any]", found) if isinstance(found, list) else [found]
        pairs += [(one, where) for one in several]
    return pairs, known


def _egress_peer(
    source: dict[str, Any], field: str, report: Report
) -> Peer | list[BlockPeer] | None:
    if set(source) == {"networks"} and isinstance(source["networks"], list):
        texts = cast("list[Any]", source["networks"])
        prefixes = [
            read_prefix(str(text), f"{field}.networks[{i}]", report) for i, text in enumerate(texts)
        ]
        sound = [BlockPeer(prefix) for prefix in prefixes if prefix is not None]
        return sound if len(sound) == len(prefixes) else None
    if set(source) == {"nodes"}:
        selector = _selector(source["nodes"], f"{field}.nodes", report)
        return None if selector is None else NodePeer(selector)
    if set(source) == {"domainNames"}:
        report(f"{field}.domainNames", "domain names are not supported: the rule fails closed")
        return None
    return _pod_peer(source, field, report)


def _pod_peer(source: dict[str, Any], field: str, report: Report) -> PodPeer | None:
    """Exactly one of `namespaces` and `pods`."""
    if set(source) == {"namespaces"}:
        namespaces = _selector(source["namespaces"], f"{field}.namespaces", report)
        return None if namespaces is None else PodPeer(EVERYTHING, None, namespaces)
    if set(source) == {"pods"}:
        pods = _mapping(source["pods"])
        where = f"{field}.pods"
        by_namespace = _selector(
            pods.get("namespaceSelector", {}), f"{where}.namespaceSelector", report
        )
        by_labels = _selector(pods.get("podSelector", {}), f"{where}.podSelector", report)
        if by_namespace is None or by_labels is None:
            return None
        return PodPeer(by_labels, None, by_namespace)
    kinds = ", ".join(sorted(source)) or "nothing"
    report(field, f"exactly one kind that podwire knows is needed, not {kinds}")
    return None


def _selector(source: Any, field: str, report: Report) -> Selector | None:
    try:
        selector = msgspec.convert(source if source is not None else {}, LabelSelector)
    except msgspec.ValidationError as error:
        report(field, str(error))
        return None
    return compile_selector(selector, field, report)


def _port(source: dict[str, Any], field: str, report: Report) -> PortMatch | None:
    """Exactly one of tcp, udp, sctp and destinationNamedPort."""
    if len(source) != 1:
        report(field, "exactly one of tcp, udp, sctp, destinationNamedPort is needed")
        return None
    ((kind, value),) = source.items()
    if kind == "destinationNamedPort":
        return NamedPort(str(value), None)
    if kind not in _PROTOCOLS:
        report(field, f"unknown protocol {kind!r}")
        return None
    port = _mapping(value).get("destinationPort")
    if port is None:
        return PortRange(_PROTOCOLS[kind])
    where = f"{field}.{kind}.destinationPort"
    match _mapping(port):
        case {"number": int(number)} if 1 <= number <= 65535 and len(port) == 1:
            return PortRange(_PROTOCOLS[kind], number, number)
        case {"range": {"start": int(start), "end": int(end)}} if (
            1 <= start < end <= 65535 and len(port) == 1
        ):
            return PortRange(_PROTOCOLS[kind], start, end)
        case _:
            report(where, "needs a number from 1 to 65535, or a range with start < end")
            return None


def _mapping(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
