"""Policies on eBPF: the table's boxes as entries of one longest-prefix map.

A rule set's outcome for an identity is a few entries, keyed (rule set, identity, protocol, port
prefix); an address finds its identity in another map, a pod its rule sets in a third. A fourth map
says which identity the tag means that packets of other nodes bear. `policy_maps` writes them so
that no packet is judged by half of a change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from podwire.datapath.counts import PolicyCount
from podwire.datapath.ebpf.layout import (
    NUMBER,
    RULE,
    RULE_KEY,
    SUBJECT,
    RuleVerdict,
    mapped,
    prefix_key,
)
from podwire.datapath.ebpf.part import TablePart
from podwire.datapath.ebpf.pods import set_plain, write_interface
from podwire.datapath.ebpf.policy_maps import Change, PolicyMaps
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.rulings import Ruling, Rulings, ruling_of
from podwire.kernel import link as links
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import Address, Protocol, host_prefix, range_to_prefixes
from podwire.policy import Endpoint, PolicyTable, Verdict
from podwire.policy.rulesets import RuleSet
from podwire.policy.table import PolicyDelta
from podwire.policy.tags import TagIndex, tag
from podwire.policy.verdicts import Outcome, Verdicts

_ANYBODY = 0
_VERDICTS = {
    Verdict.ALLOW: RuleVerdict.ALLOW,
    Verdict.DENY: RuleVerdict.DENY,
    Verdict.AUDIT: RuleVerdict.AUDIT,
}
_PORTLESS = (Protocol.ICMP, Protocol.ICMPV6)


class PolicyPart(TablePart[PolicyTable]):
    """A PolicyTable in maps and programs."""

    feature = "policy"

    def __init__(self, netns_fd: int | None = None, *, programs: Programs | None = None) -> None:
        super().__init__(netns_fd, programs=programs)
        self._tags = TagIndex("")
        self._rulings = Rulings(self._programs)
        self._maps = PolicyMaps(self._programs)

    def _apply(self, table: PolicyTable) -> None:
        old, self._table = self._table, table
        if old is None or old.cluster != table.cluster:
            self._write_whole(table)
            return
        delta = table.delta(old)
        changed = [table.endpoints[pod] for pod in delta.endpoints if pod in table.endpoints]
        gone = [old.endpoints[pod] for pod in delta.endpoints if pod in old.endpoints]
        change = self._change(old, table, delta)
        self._rulings.write(table)
        self._maps.prepare(change, apart=_is_apart(old, table, delta, change["rules"]))
        self._attach(each for each in changed if _is_judged(each))
        self._maps.commit()
        self._attach(each for each in changed if not _is_judged(each))
        if "pods" not in self._programs.features:  # else those who know the pods' links do it
            for each in gone:
                kept = table.endpoints[each.pod].addresses if each.pod in table.endpoints else ()
                self.connections.depart(set(each.addresses).difference(kept))
            self.connections.arrive(address for each in changed for address in each.addresses)
        self._maps.finish()
        self._rulings.forget(table)

    def _write_whole(self, table: PolicyTable) -> None:
        """An earlier process gave rule sets and identities other numbers."""
        self._tags = TagIndex(table.cluster)
        self._tags.change(table.identities, table.identities)
        entries = self._spell(table)
        self._rulings.adopt(table)
        known = self._programs.growing["subjects"].read()
        self._attach(
            (each for each in table.endpoints.values() if _is_judged(each)),
            lambda each: not any(mapped(address) in known for address in each.addresses),
        )
        self._maps.replace(entries)
        self._attach(each for each in table.endpoints.values() if not _is_judged(each))

    def _change(self, old: PolicyTable, table: PolicyTable, delta: PolicyDelta) -> Change:
        """For each map, those of its entries that may differ: before and after."""
        changed = [table.endpoints[pod] for pod in delta.endpoints if pod in table.endpoints]
        gone = [old.endpoints[pod] for pod in delta.endpoints if pod in old.endpoints]
        meanings = self._tags.change(delta.identities, table.identities)
        return {
            "rules": (
                self._rule_entries(old, delta.rule_sets),
                self._rule_entries(table, delta.rule_sets),
            ),
            "identities": (
                (_identities(old), _identities(table))
                if delta.intervals
                else (_exact(old, delta.addresses), _exact(table, delta.addresses))
            ),
            "tags": (_meanings(meanings[0]), _meanings(meanings[1])),
            "subjects": (_subjects(old, gone), _subjects(table, changed)),
        }

    def flush(self) -> None:
        """Let the slot that is not in force catch up, so that the next change finds it ready."""
        with self._programs.lock:
            self._maps.catch_up()

    def _verify(self, table: PolicyTable) -> list[str]:
        self._attach(table.endpoints.values())
        wrong = self._maps.repair(self._spell(table))
        return [f"{count} entries of map {kind}" for kind, count in wrong.items()]

    def status(self) -> dict[str, object]:
        """Fill levels of the maps."""
        kinds = ("identities", "rules", "subjects", "tags")
        return {kind: self._programs.growing[kind].held for kind in kinds}

    def counts(self) -> list[PolicyCount]:
        """How often each ruling was made since its policies came, also by earlier processes."""
        with self._programs.lock:
            return self._rulings.counts() if self._table is not None else []

    def ruling(self, number: int) -> Ruling | None:
        """Whose number an event bears; None for what no policy of the table says any more."""
        return self._rulings.named(number)

    def _attach(
        self,
        endpoints: Iterable[Endpoint],
        is_new: Callable[[Endpoint], bool] = lambda _: False,
    ) -> None:
        """Put the pods' program on their links; a link that is not there yet waits for verify.

        The open connections of pods that were not judged before, and of those that are new to this
        node's policies, are noted: they are not judged any more.
        """
        begun: dict[int, Sequence[Address]] = {}
        with NetlinkSocket(netns_fd=self._programs.netns_fd) as netlink:
            for endpoint in endpoints:
                found = links.find(netlink, endpoint.link)
                if found is None:
                    continue
                judged = _is_judged(endpoint)
                write_interface(self._programs, found.index, endpoint.addresses)
                self._programs.add_pod(found.index)
                was = set_plain(self._programs, found.index, endpoint.addresses, not judged)
                if judged and (was or is_new(endpoint)):
                    begun[found.index] = endpoint.addresses
        self.connections.adopt(begun)

    def _spell(self, table: PolicyTable) -> dict[str, dict[bytes, bytes]]:
        return {
            "rules": self._rule_entries(table, table.rule_sets),
            "identities": _identities(table),
            "tags": _meanings(self._tags.meanings()),
            "subjects": _subjects(table, table.endpoints.values()),
        }

    def _rule_entries(self, table: PolicyTable, numbers: Iterable[int]) -> dict[bytes, bytes]:
        found = (table.rule_sets[number] for number in numbers if number in table.rule_sets)
        return {key: value for rule_set in found for key, value in self._rules(rule_set)}

    def _rules(self, rule_set: RuleSet) -> Iterator[tuple[bytes, bytes]]:
        packed: dict[Outcome, bytes] = {}
        yield from self._boxes(rule_set, _ANYBODY, rule_set.default, packed)
        for identity, verdicts in rule_set.entries.items():
            yield from self._boxes(rule_set, identity, verdicts, packed)

    def _boxes(
        self, rule_set: RuleSet, identity: int, verdicts: Verdicts, packed: dict[Outcome, bytes]
    ) -> Iterator[tuple[bytes, bytes]]:
        """Entries of one identity; what equals the rest (`other`) needs none."""

        def rule(outcome: Outcome) -> bytes:
            found = packed.get(outcome)
            if found is None:
                number = self._rulings.number(ruling_of(rule_set, outcome))
                found = packed[outcome] = RULE.pack(number, _VERDICTS[outcome.verdict])
            return found

        yield RULE_KEY.pack(64, rule_set.number, identity, 0, bytes(2)), rule(verdicts.other)
        for protocol, spans in verdicts.protocols:
            for span in spans:
                if span.outcome == verdicts.other:
                    continue
                first, last = (0, 0) if protocol in _PORTLESS else (span.first, span.last)
                if not span.first <= first <= span.last:
                    continue
                for port, length in range_to_prefixes(first, last, 16):
                    key = (
                        80 + length,
                        rule_set.number,
                        identity,
                        protocol,
                        port.to_bytes(2, "big"),
                    )
                    yield RULE_KEY.pack(*key), rule(span.outcome)


def _is_judged(endpoint: Endpoint) -> bool:
    return bool(endpoint.ingress or endpoint.egress)


def _is_apart(
    old: PolicyTable,
    table: PolicyTable,
    delta: PolicyDelta,
    rules: tuple[Mapping[bytes, bytes], Mapping[bytes, bytes]],
) -> bool:
    """Whether the change is about pods that come or go, and what has a number of its own: then no
    packet is judged by two of the entries of which one is written and the other is not yet.
    """
    before, after = rules
    return (
        not delta.intervals
        and not any(pod in old.endpoints and pod in table.endpoints for pod in delta.endpoints)
        and not any(each in old.addresses and each in table.addresses for each in delta.addresses)
        and all(_is_unknown(old, key) for key in after if before.get(key) != after[key])
        and all(_is_unknown(table, key) for key in before.keys() - after.keys())
    )


def _is_unknown(table: PolicyTable, key: bytes) -> bool:
    """Whether a rule's rule set or identity is none of the table's; numbers are not given twice."""
    _, rule_set, identity, *_ = RULE_KEY.unpack(key)
    return rule_set not in table.rule_sets or bool(identity and identity not in table.identities)


def _subjects(table: PolicyTable, endpoints: Iterable[Endpoint]) -> dict[bytes, bytes]:
    out: dict[bytes, bytes] = {}
    for endpoint in endpoints:
        host = table.pod_host(endpoint.pod)
        bears = 0
        if host is not None and host.kind == "pod":
            bears = tag(table.cluster, host.namespace, host.labels, host.ports)
        value = SUBJECT.pack(endpoint.ingress or 0, endpoint.egress or 0, bears)
        out.update((mapped(address), value) for address in endpoint.addresses)
    return out


def _meanings(tags: Mapping[int, int]) -> dict[bytes, bytes]:
    return {NUMBER.pack(each): NUMBER.pack(identity) for each, identity in tags.items()}


def _exact(table: PolicyTable, addresses: Iterable[Address]) -> dict[bytes, bytes]:
    return {
        prefix_key(*host_prefix(address)): NUMBER.pack(table.addresses[address])
        for address in addresses
        if address in table.addresses
    }


def _identities(table: PolicyTable) -> dict[bytes, bytes]:
    """Exact addresses, and the intervals cut into prefixes: the longest match is the one.

    IPv4 lies inside ::/0 as maps write it; what is said of IPv6 must not hold for it.
    """
    out = {prefix_key(bytes(4), 0): NUMBER.pack(_ANYBODY)}
    for first, last, identity in table.intervals:
        size = len(first)
        pieces = range_to_prefixes(
            int.from_bytes(first, "big"), int.from_bytes(last, "big"), size * 8
        )
        for number, length in pieces:
            out[prefix_key(number.to_bytes(size, "big"), length)] = NUMBER.pack(identity)
    out.update(_exact(table, table.addresses))
    return out
