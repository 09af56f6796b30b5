"""Policies on iptables and ipset. One meaning with `podwire.datapath.nftables.policy`.

`policy_rules` tells the way of a packet. The rules of a family change in one transaction, to sets
that were filled before: a packet meets the old policies or the new ones. Established connections
are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from podwire.datapath import Requirement
from podwire.datapath.counts import PolicyCount
from podwire.datapath.iptables.families import FAMILIES, Rulesets
from podwire.datapath.iptables.policy_rules import hooks, names
from podwire.datapath.iptables.policy_spelling import FamilyPolicies
from podwire.datapath.iptables.ruleset import Wanted
from podwire.datapath.policy import BRIDGE_REQUIREMENTS
from podwire.errors import PodwireError
from podwire.kernel.iptables import Flavour
from podwire.policy import PolicyTable
from podwire.services import Family


class PolicyPart:
    """Policies of one network namespace. `bridge`: the pods' bridge, if they are on one."""

    def __init__(
        self,
        netns_fd: int | None = None,
        bridge: str | None = None,
        flavour: Flavour | None = None,
    ) -> None:
        self.requirements: Sequence[Requirement] = BRIDGE_REQUIREMENTS if bridge else ()
        self._kernel = Rulesets(netns_fd, flavour, names, hooks())
        self._bridge = bridge or ""
        self._spelling = self._fresh_spelling()
        self._held: dict[Family, Wanted] = {}  # empty: not known
        self._table: PolicyTable | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Nothing is held open."""

    def start(self) -> None:
        """What an earlier process left stays in force until the first table is applied."""
        with self._lock:
            self._kernel.require_programs()
            self._forget()

    def apply(self, table: PolicyTable) -> None:
        """Make the kernel hold `table`."""
        with self._lock:
            if table is self._table and self._held:
                return
            if not self._held:
                self._replace(table)
                return
            try:
                for family, spelling in self._spelling.items():
                    wanted = spelling.wanted(table)
                    update = wanted.since(self._held[family])
                    if update.chains or update.late_chains or update.late_sets:
                        self._kernel[family].write(update)
                    self._held[family] = wanted
            except PodwireError:
                # What is held is not known any more: the next try starts afresh.
                self._forget()
                raise
            self._table = table

    def flush(self) -> None:
        """Take away chains and sets that nothing uses any more."""
        with self._lock:
            self._kernel.flush()

    def verify(self) -> list[str]:
        """Compare rules and sets with the table, repair, and name each repair."""
        with self._lock:
            if self._table is None:
                return []
            if self._held and self._kernel.look_intact(
                {family: held.sizes() for family, held in self._held.items()}
            ):
                return []
            table = self._table
            self._forget()
            repairs = self._replace(table)
            self._kernel.flush()
            return repairs

    def cleanup(self) -> None:
        """Remove all of ours."""
        with self._lock:
            self._kernel.remove()
            self._forget()
            self._table = None

    def status(self) -> dict[str, object]:
        out: dict[str, object] = {
            "flavour": self._kernel.flavour,
            "revision": self._table.revision if self._table else 0,
        }
        for family, held in self._held.items():
            out[str(self._kernel.iptables[family])] = {
                "chains": len(held.chains),
                "sets": len(held.sets),
                "elements": sum(map(len, held.elements.values())),
                "waiting_deletes": self._kernel[family].waiting,
            }
        return out

    def counts(self) -> list[PolicyCount]:
        """How often each reason denied or would have, most packets first.

        What is allowed is not counted on this data path.
        """
        counted: dict[PolicyCount, int] = {}
        for family, spelling in self._spelling.items():
            for reason in spelling.reasons:
                found = self._kernel.iptables[family].counters("mangle", reason.chain)
                policies = (reason.policy,) if reason.policy is not None else reason.isolating
                count = PolicyCount(reason.verdict, reason.direction, policies, 0)
                counted[count] = counted.get(count, 0) + (found[-1] if found else 0)
        counts = [count._replace(packets=packets) for count, packets in counted.items()]
        return sorted(counts, key=lambda count: -count.packets)

    def _replace(self, table: PolicyTable) -> list[str]:
        repairs: list[str] = []
        held: dict[Family, Wanted] = {}
        for family, spelling in self._spelling.items():
            held[family] = spelling.wanted(table)
            repairs += self._kernel[family].replace(held[family])
        self._held, self._table = held, table
        return repairs

    def _forget(self) -> None:
        self._held = {}
        self._spelling = self._fresh_spelling()

    def _fresh_spelling(self) -> dict[Family, FamilyPolicies]:
        return {family: FamilyPolicies(family, self._bridge) for family in FAMILIES}
