"""The maps of policies, in two slots: `settings.policies` says which one packets are judged by.

A change of what is in force is made in the other slot, which then comes into force by one write:
each packet is judged by all of the change or by none. The slot that was in force makes up for it
later, when no packet reads it any more. What packets cannot see half of (a pod that comes, with
rule sets and identities of its own) is written where it is in force, without a turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from podwire.datapath.ebpf.growing import GrowingMap
from podwire.datapath.ebpf.programs import POLICY_MAPS, Programs

Entries: TypeAlias = Mapping[bytes, bytes]
Change: TypeAlias = Mapping[str, tuple[Entries, Entries]]
"""By map: entries before and after, of those that may differ."""


class PolicyMaps:
    """`prepare`, `commit`, `finish` make one change; `commit` is when packets see it.

    After a KernelError what the maps hold is not known, and `replace` is to follow.
    """

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._change: Change = {}
        self._apart = False
        self._behind: list[Change] | None = None
        """What the other slot lacks; None: it may hold anything."""
        self._is_read = True
        """Whether a packet may still be judged by the other slot."""

    def prepare(self, change: Change, *, apart: bool) -> None:
        """Write what must be there first. `apart`: packets cannot see half of it."""
        self._change, self._apart = change, apart
        if apart:
            for name in POLICY_MAPS:
                if name != "subjects":
                    _write(self._programs.growing[name], *change[name])
            return
        self.catch_up()
        self._behind = None
        self._make_up([change])

    def commit(self) -> None:
        """From now on, packets are judged by it."""
        if self._apart:
            _write(self._programs.growing["subjects"], *self._change["subjects"])
        else:
            self._turn()
            self._behind = []
        if self._behind is not None:
            self._behind.append(self._change)

    def finish(self) -> None:
        """Remove what nothing leads to any more."""
        if self._apart:
            for name in reversed(POLICY_MAPS):
                _delete(self._programs.growing[name], *self._change[name])

    def replace(self, entries: Mapping[str, Entries]) -> None:
        """Exactly these, from one packet to the next."""
        growing = self._programs.growing
        self._behind, self._is_read = None, True  # an earlier process may have just turned
        if any(growing[name].read() != entries[name] for name in POLICY_MAPS):
            self._settle()
            for name, spare in self._programs.spare_policies().items():
                spare.replace(entries[name])
            self._turn()

    def repair(self, entries: Mapping[str, Entries]) -> dict[str, int]:
        """Make both slots hold exactly these; by map, how many entries in force were wrong."""
        self.catch_up()
        growing, spare = self._programs.growing, self._programs.spare_policies()
        wrong = {name: growing[name].replace(entries[name]) for name in POLICY_MAPS}
        for name in POLICY_MAPS:
            spare[name].replace(entries[name])
        return {name: count for name, count in wrong.items() if count}

    def catch_up(self) -> None:
        """Make the other slot hold what the one in force does, when no packet reads it any more."""
        if self._behind == []:
            return
        self._settle()
        behind, self._behind = self._behind, None
        if behind is None:
            for name, spare in self._programs.spare_policies().items():
                spare.replace(self._programs.growing[name].read())
        else:
            self._make_up(behind)
        self._behind = []

    def _make_up(self, changes: list[Change]) -> None:
        spare = self._programs.spare_policies()
        for change in changes:
            for name in POLICY_MAPS:
                _write(spare[name], *change[name])
                _delete(spare[name], *change[name])

    def _turn(self) -> None:
        self._programs.turn_policies()
        self._is_read = True

    def _settle(self) -> None:
        if self._is_read:
            self._programs.growing["connections"].settle()
            self._is_read = False


def _write(growing: GrowingMap, old: Entries, new: Entries) -> None:
    """Write what is new or differs; what only `old` has is left."""
    changed = {key: value for key, value in new.items() if old.get(key) != value}
    growing.write(changed, len(new.keys() - old.keys()))


def _delete(growing: GrowingMap, old: Entries, new: Entries) -> None:
    growing.delete(list(old.keys() - new.keys()))
