"""Rulings: what policies decide, numbered so that a number never means anything else.

A ruling's number is a hash of its words. A process that starts finds the maps of an earlier one,
and events that nobody has read yet: their numbers mean to it what they meant to the earlier one,
and the counts of what still exists go on.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Collection, Mapping
from typing import NamedTuple

from podwire.datapath.counts import PolicyCount
from podwire.datapath.ebpf.layout import RULING
from podwire.datapath.ebpf.programs import Programs
from podwire.errors import KernelError
from podwire.kernel.bpf import Map
from podwire.policy import Direction, PolicyRef, PolicyTable, Verdict
from podwire.policy.model import Policy
from podwire.policy.rulesets import RuleSet
from podwire.policy.verdicts import Outcome

log = logging.getLogger(__name__)


class Ruling(NamedTuple):
    """A verdict of one direction; `policies`: whose doing it is, several with a default deny."""

    verdict: Verdict
    direction: Direction
    policies: tuple[PolicyRef, ...]

    @property
    def number(self) -> int:
        """64 bits: of 100,000 rulings, two are alike once in four billion clusters."""
        words = f"{self.verdict} {self.direction} {', '.join(map(str, self.policies))}"
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")


def ruling_of(rule_set: RuleSet, outcome: Outcome) -> Ruling:
    """What an outcome of this rule set is; a default is the doing of all that isolate the pod."""
    policies = (outcome.policy,) if outcome.policy is not None else rule_set.isolating
    return Ruling(outcome.verdict, rule_set.direction, policies)


def _in_use(table: PolicyTable) -> set[Ruling]:
    found: set[Ruling] = set()
    for rule_set in table.rule_sets.values():
        different = {id(v): v for v in (rule_set.default, *rule_set.entries.values())}
        for verdicts in different.values():
            outcomes = {span.outcome for _, spans in verdicts.protocols for span in spans}
            found.update(ruling_of(rule_set, each) for each in outcomes | {verdicts.other})
    return found


class Rulings:
    """The rulings of one table, and the map in which programs count them.

    Entries are made before a rule names them. A ruling for which the map has no room is not
    counted; it holds all the same.
    """

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._numbers: dict[Ruling, int] = {}
        self._by_number: dict[int, Ruling] = {}
        self._new: list[int] = []
        self._counted: set[int] = set()
        self._policies: Mapping[PolicyRef, Policy] | None = None

    @property
    def _counters(self) -> Map:
        return self._programs.maps["rulings"]

    def number(self, ruling: Ruling) -> int:
        found = self._numbers.get(ruling)
        if found is None:
            found = self._numbers[ruling] = ruling.number
            self._by_number[found] = ruling
            self._new.append(found)
        return found

    def named(self, number: int) -> Ruling | None:
        """None for one that no table of this process holds (any more)."""
        return self._by_number.get(number)

    def adopt(self, table: PolicyTable) -> None:
        """Keep the counts of an earlier process, as far as the table has their rulings."""
        counters = self._counters
        held = {RULING.unpack(key)[0] for key, _ in counters.items()}
        self._counted = held & self._by_number.keys()
        counters.delete_batch([RULING.pack(number) for number in held - self._counted])
        self._new = [number for number in self._by_number if number not in self._counted]
        self.write(table)

    def write(self, table: PolicyTable) -> None:
        """Make the entries of new rulings, as far as there is room."""
        if not self._new:
            return
        counters = self._counters
        room = counters.info.max_entries
        if len(self._by_number) > room * 3 // 4:
            self._drop(self._numbers.keys() - _in_use(table))
        self._programs.held["rulings"] = len(self._by_number)
        room -= len(self._counted)
        made, self._new = self._new[:room], self._new[room:]
        try:
            counters.update_batch((RULING.pack(number), counters.zero) for number in made)
        except KernelError as error:  # out of memory: counting is no reason not to enforce
            log.warning("policies are enforced, but not counted: %s", error)
        self._counted.update(made)

    def forget(self, table: PolicyTable) -> None:
        """Drop those of policies that are gone: no rule bears their numbers any more.

        Others stay, so that what a policy decided before it had company is still told.
        """
        if table.policies is not self._policies:
            self._policies = table.policies
            self._drop({r for r in self._numbers if not table.policies.keys() >= {*r.policies}})
            self.write(table)

    def _drop(self, rulings: Collection[Ruling]) -> None:
        numbers = {self._numbers.pop(ruling) for ruling in rulings}
        for number in numbers:
            del self._by_number[number]
        self._new = [number for number in self._new if number not in numbers]
        self._counters.delete_batch([RULING.pack(number) for number in numbers & self._counted])
        self._counted -= numbers
        self._programs.held["rulings"] = len(self._by_number)

    def counts(self) -> list[PolicyCount]:
        """How often each ruling was made, most packets first."""
        packets = {
            RULING.unpack(key)[0]: sum(n for (n,) in struct.iter_unpack("=Q", values))
            for key, values in self._counters.items()
        }
        found = [
            PolicyCount(*ruling, packets.get(number, 0))
            for number, ruling in self._by_number.items()
        ]
        return sorted(found, key=lambda count: -count.packets)
