"""A PolicyTable in nftables: elements of maps, one transaction per table, nothing listed.

The rules are in `policy_rules`, the elements in `policy_elements`. Every change of a table,
additions and deletions, is one transaction: a packet meets the old policies or the new ones.
Established connections are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from podwire.datapath import Requirement
from podwire.datapath.counts import PolicyCount
from podwire.datapath.nftables import policy_rules as rules
from podwire.datapath.nftables.fixed import FixedTable
from podwire.datapath.nftables.policy_elements import (
    GONE,
    Changes,
    ElementKey,
    Gone,
    PolicyElements,
    Reason,
    Wanted,
    register,
)
from podwire.datapath.policy import BRIDGE_REQUIREMENTS
from podwire.errors import KernelError
from podwire.kernel.nftables import BRIDGE, INET, Data, Element, NfTables, Set, Transaction
from podwire.policy import PolicyRef, PolicyTable


class PolicyPart:
    """Policies of one network namespace. `bridge`: the pods' bridge, if they are on one."""

    def __init__(self, netns_fd: int | None = None, bridge: str | None = None) -> None:
        self.requirements: Sequence[Requirement] = BRIDGE_REQUIREMENTS if bridge else ()
        self._bridge = bridge
        self._nft = NfTables(netns_fd)
        self._guard = FixedTable(self._nft, BRIDGE, rules.TABLE, rules.BRIDGE_SCRIPT)
        self._made: list[tuple[str, bytes]] = []
        self._elements = PolicyElements(bridge)
        self._held: Wanted = {}
        self._table: PolicyTable | None = None
        self._strangers = 0  # see NfTables.strangers

    def close(self) -> None:
        self._nft.close()

    # --- Part ---

    def start(self) -> None:
        """Make the rules, or adopt an earlier process's: its elements hold until `apply`."""
        self._adopt()

    def apply(self, table: PolicyTable) -> None:
        """Make the kernel hold `table`, in one transaction."""
        if table is self._table:
            return
        old, self._table = self._table, None  # should this fail, nothing is taken for granted
        try:
            if old is None:
                self._replace(self._elements.everything(table))
            else:
                self._change(self._elements.difference(old, table))
        except KernelError:  # somebody changed our tables
            self._adopt()
            self._replace(self._elements.everything(table))
        self._table = table
        self._change(self._elements.forget_codes(table))

    def flush(self) -> None:
        """Nothing waits: a policy that waits is a hole."""

    def verify(self) -> list[str]:
        """Repair what somebody changed in our tables, and say so."""
        strangers = self._nft.strangers()
        if self._table is None or strangers == self._strangers:
            return []
        repairs: list[str] = []
        if not self._intact():
            self._make()
            repairs.append(f"made the rules of table {rules.TABLE} again")
        self._held = self._read()
        wanted = self._elements.everything(self._table)
        repairs += [
            f"restored the set {rules.TABLE} {target.name}"
            for target, held in self._held.items()
            if held != wanted[target]
        ]
        self._replace(wanted)
        self._strangers = strangers
        return repairs

    def cleanup(self) -> None:
        """Remove our tables."""
        table = f"table inet {rules.TABLE}"
        self._nft.run(f"add {table}\ndelete {table}\n")
        self._guard.remove()
        self._table, self._held = None, {}

    def status(self) -> dict[str, object]:
        return {
            "revision": self._table.revision if self._table else 0,
            **{target.name: len(self._held.get(target, ())) for target in rules.INET_SETS},
        }

    def counts(self) -> list[PolicyCount]:
        """How often each reason decided since its rule set came, most packets first."""
        counters = self._nft.element_counters(rules.VERDICTS)
        out: list[PolicyCount] = []
        for reason, code in self._elements.codes.items():
            packets, _ = counters.get(register(code), (0, 0))
            out.append(PolicyCount(*reason[:2], self._policies(reason), packets))
        return sorted(out, key=lambda count: -count.packets)

    def _policies(self, reason: Reason) -> tuple[PolicyRef, ...]:
        if reason.policy is not None:
            return (reason.policy,)
        rule_set = self._table.rule_sets.get(reason.rule_set or 0) if self._table else None
        return rule_set.isolating if rule_set else ()

    # --- structure ---

    def _make(self) -> None:
        """The judging chains are made before what leads to them: closed stays closed."""
        try:
            self._nft.run(rules.STRUCTURE)
        except KernelError:  # another version's sets: nothing of them can be kept
            self._nft.run(f"delete table inet {rules.TABLE}\n{rules.STRUCTURE}")
        if not self._intact():
            self._nft.replace_rules(INET, rules.TABLE, rules.judging_chains())
            self._nft.run(rules.BASE)
            self._made = self._nft.rules(INET, rules.TABLE)
        if self._bridge:
            self._guard.make()

    def _intact(self) -> bool:
        if not self._made or self._nft.rules(INET, rules.TABLE) != self._made:
            return False
        return self._bridge is None or self._guard.intact()

    def _adopt(self) -> None:
        """Make the rules, and learn what their sets hold."""
        self._make()
        self._strangers = self._nft.strangers()
        self._held = self._read()

    def _read(self) -> Wanted:
        return {
            target: {
                (element.key, element.end, element.flags): element.data
                for element in self._nft.elements(target)
            }
            for target in self._elements.sets
        }

    # --- elements ---

    def _replace(self, wanted: Wanted) -> None:
        """Make the sets hold exactly this."""
        changes: Changes = {}
        for target, held in self._held.items():
            some: dict[ElementKey, Data | Gone] = dict.fromkeys(held, GONE)
            some.update(wanted.get(target, {}))
            changes[target] = some
        self._change(changes)

    def _change(self, changes: Mapping[Set, Mapping[ElementKey, Data | Gone]]) -> None:
        """One transaction: all that goes first, so that ranges may give way to others."""
        transaction = Transaction()
        added: dict[Set, list[Element]] = {}
        for target, some in changes.items():
            held = self._held[target]
            gone: list[Element] = []
            for (key, end, flags), data in some.items():
                place = (key, end, flags)
                if place in held and (data is GONE or held[place] != data):
                    gone.append(Element(key, None, end, 0, flags))
                if data is not GONE and (place not in held or held[place] != data):
                    added.setdefault(target, []).append(Element(key, data, end, 0, flags))
            transaction.delete(target, gone)
        for target, elements in added.items():
            transaction.add(target, elements)
        self._nft.commit(transaction)
        for change in transaction.changes:
            held = self._held[change.set]
            for element in change.elements:
                place = (element.key, element.end, element.flags)
                if change.verb == "delete":
                    del held[place]
                else:
                    held[place] = element.data
