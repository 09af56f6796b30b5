"""What a rule set says about one peer: a function of protocol and port, in disjoint boxes.

Rules overlap and have an order; the kernel's interval sets must not overlap. So the rules that
match a peer are painted, first rule first, on the plane of protocols × ports, and what comes out is
one outcome per box.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from podwire.policy.model import (
    Action,
    ContainerPort,
    NamedPort,
    Policy,
    PolicyRef,
    PortRange,
    Rule,
    Tier,
    Verdict,
)

LAST_PORT = 65535


class Outcome(NamedTuple):
    """A verdict and the policy whose rule decided; None: a default of the rule set decided."""

    verdict: Verdict
    policy: PolicyRef | None = None


DEFAULT_ALLOW = Outcome(Verdict.ALLOW)
DEFAULT_DENY = Outcome(Verdict.DENY)


class Span(NamedTuple):
    """Ports, inclusive, of one protocol, with one outcome."""

    first: int
    last: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Outcomes by protocol and port.

    `other` holds for every protocol that is not a key of `protocols`; the spans of a protocol are
    in order, disjoint, and cover all ports.
    """

    other: Outcome
    protocols: tuple[tuple[int, tuple[Span, ...]], ...] = ()

    def at(self, protocol: int, port: int) -> Outcome:
        for number, spans in self.protocols:
            if number == protocol:
                return spans[bisect_right(spans, port, key=lambda span: span.first) - 1].outcome
        return self.other


Ranges: TypeAlias = list[tuple[int, int]]
_OTHER = -1
"""Stands for all protocols that no rule names; its ports are one point."""

Plane: TypeAlias = dict[int, Ranges]
"""Ranges of ports by protocol, in order and disjoint."""


class RuleUse(NamedTuple):
    """A rule and the policy that it belongs to; tuples of them are in evaluation order."""

    policy: Policy
    rule: Rule


def paint(
    uses: Sequence[RuleUse], isolated: bool, ports: tuple[ContainerPort, ...] = ()
) -> Verdicts:
    """The outcomes for a peer that the peers of all of `uses` match.

    `ports` are the destination pod's, for named ports. Tiers: Admin, then the union of the
    namespaced policies (final where `isolated`), then Baseline, then allow.
    """
    matches = [_ranges(use.rule, ports) for use in uses]
    plane: Plane = {_OTHER: [(0, 0)]}
    for ranges in matches:
        for match in ranges or ():
            plane[match.protocol] = [(0, LAST_PORT)]
    painted: dict[int, list[Span]] = {protocol: [] for protocol in plane}
    for tier in Tier:
        passed: Plane = {protocol: [] for protocol in plane}
        for use, ranges in zip(uses, matches, strict=True):
            if use.policy.tier is not tier:
                continue
            outcome = _outcome(use)
            for protocol, piece in _cut(plane, ranges):
                if outcome is None:
                    passed[protocol].append(piece)
                else:
                    painted[protocol].append(Span(*piece, outcome))
        if tier is Tier.NAMESPACED and isolated:
            break
        for protocol, pieces in passed.items():
            if pieces:
                plane[protocol] = sorted(plane[protocol] + pieces)
    rest = DEFAULT_DENY if isolated else DEFAULT_ALLOW
    for protocol, pieces in plane.items():
        painted[protocol] += [Span(*piece, rest) for piece in pieces]
    return _verdicts({protocol: sorted(spans) for protocol, spans in painted.items()})


def _outcome(use: RuleUse) -> Outcome | None:
    """None for Pass."""
    action = use.rule.action
    if action is Action.PASS:
        return None
    return Outcome(Verdict.ALLOW if action is Action.ACCEPT else Verdict.DENY, use.policy.ref)


def _ranges(rule: Rule, ports: tuple[ContainerPort, ...]) -> list[PortRange] | None:
    """The rule's port ranges; None: any protocol and port."""
    if rule.ports is None:
        return None
    out: list[PortRange] = []
    for match in rule.ports:
        if isinstance(match, NamedPort):
            out += match.resolve(ports)
        else:
            out.append(match)
    return out


def _cut(plane: Plane, ranges: list[PortRange] | None) -> Iterable[tuple[int, tuple[int, int]]]:
    """Take what the ranges cover out of the plane, and hand it over by protocol."""
    if ranges is None:
        for protocol, pieces in plane.items():
            for piece in pieces:
                yield protocol, piece
            plane[protocol] = []
        return
    for match in ranges:
        pieces = plane[match.protocol]
        start = max(bisect_right(pieces, (match.first, -1)) - 1, 0)
        end = start
        left: Ranges = []
        while end < len(pieces) and pieces[end][0] <= match.last:
            first, last = pieces[end]
            end += 1
            if last < match.first:
                left.append((first, last))
                continue
            if first < match.first:
                left.append((first, match.first - 1))
            if last > match.last:
                left.append((match.last + 1, last))
            yield match.protocol, (max(first, match.first), min(last, match.last))
        pieces[start:end] = left


def _verdicts(painted: dict[int, list[Span]]) -> Verdicts:
    """Neighbours of one outcome joined; protocols that differ from `other` nowhere left out."""
    other = painted.pop(_OTHER)[0].outcome
    protocols: list[tuple[int, tuple[Span, ...]]] = []
    for protocol in sorted(painted):
        spans: list[Span] = []
        for span in painted[protocol]:
            if spans and spans[-1].outcome == span.outcome:
                spans[-1] = Span(spans[-1].first, span.last, span.outcome)
            else:
                spans.append(span)
        if len(spans) > 1 or spans[0].outcome != other:
            protocols.append((protocol, tuple(spans)))
    return Verdicts(other, tuple(protocols))


def audited(enforced: Verdicts, everything: Verdicts) -> Verdicts:
    """`enforced`, with AUDIT where only the policies in audit mode would deny."""

    def merge(here: Outcome, there: Outcome) -> Outcome:
        if here.verdict is Verdict.ALLOW and there.verdict is Verdict.DENY:
            return Outcome(Verdict.AUDIT, there.policy)
        return here

    numbers = {number for number, _ in enforced.protocols + everything.protocols}
    painted: dict[int, list[Span]] = {_OTHER: [Span(0, 0, merge(enforced.other, everything.other))]}
    for number in numbers:
        starts = {0}
        for verdicts in (enforced, everything):
            starts.update(span.first for span in dict(verdicts.protocols).get(number, ()))
        ordered = sorted(starts)
        painted[number] = [
            Span(first, after - 1, merge(enforced.at(number, first), everything.at(number, first)))
            for first, after in zip(ordered, [*ordered[1:], LAST_PORT + 1], strict=True)
        ]
    return _verdicts(painted)
