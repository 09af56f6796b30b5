"""Chains and sets of one part in both families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from podwire.datapath.iptables.ruleset import Names, Ruleset
from podwire.errors import Unsupported
from podwire.kernel.ipset import IpSets
from podwire.kernel.iptables import Flavour, Hook, Iptables, detect_flavour
from podwire.services import Family

FAMILIES: tuple[Family, Family] = (4, 6)
_WHOLE_CHECK = 10
"""Every so many checks compare everything, whatever the cheap look says."""


class Rulesets:
    """The rulesets of a network namespace by family. Not thread-safe.

    `flavour` None: what the machine uses. Raises Unsupported where it has no iptables.
    """

    def __init__(
        self,
        netns_fd: int | None,
        flavour: Flavour | None,
        names: Callable[[Family], Names],
        hooks: Mapping[str, Sequence[Hook]],
    ) -> None:
        self.flavour: Flavour = flavour or detect_flavour(netns_fd)
        self.iptables: dict[Family, Iptables] = {
            family: Iptables(family, self.flavour, netns_fd) for family in FAMILIES
        }
        sets = IpSets(netns_fd)
        self._rulesets: dict[Family, Ruleset] = {
            family: Ruleset(iptables, sets, names(family), hooks)
            for family, iptables in self.iptables.items()
        }
        self._looks = 0

    def __getitem__(self, family: Family) -> Ruleset:
        return self._rulesets[family]

    def require_programs(self) -> None:
        """Raises Unsupported, with what to install."""
        for iptables in self.iptables.values():
            if not iptables.exists():
                raise Unsupported(f"{iptables} is missing: install the package iptables")

    def look_intact(self, sizes: Mapping[Family, Mapping[str, int]]) -> bool:
        """A cheap look, with the elements that every set should have.

        Every tenth one says no, so that now and then everything is compared.
        """
        self._looks += 1
        return self._looks % _WHOLE_CHECK != 0 and all(
            self._rulesets[family].looks_intact(some) for family, some in sizes.items()
        )

    def flush(self) -> None:
        """Take away chains and sets that nothing uses any more."""
        for ruleset in self._rulesets.values():
            ruleset.flush()

    def remove(self) -> None:
        """Remove all of ours."""
        for ruleset in self._rulesets.values():
            ruleset.remove()
