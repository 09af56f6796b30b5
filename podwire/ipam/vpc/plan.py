"""Where new addresses go and which ENIs may leave: values in, steps out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from podwire.ipam.vpc.limits import InstanceLimits
from podwire.ipam.vpc.pool import Need, PoolStats, eni_is_surplus
from podwire.ipam.vpc.settings import Settings

MIN_ENI_AGE_S = 60.0


@dataclass(frozen=True)
class EniView:
    """What planning needs to know of an ENI. `free_slots` excludes requests in flight."""

    id: str
    free_slots: int = 0
    total: int = 0  # addresses for pods
    assigned: int = 0
    cooling: int = 0
    age_s: float = 0.0
    primary: bool = False
    trunk: bool = False
    efa: bool = False


@dataclass(frozen=True)
class Fill:
    """Ask for `units` more on an attached ENI."""

    eni: str
    units: int


@dataclass(frozen=True)
class Create:
    """Create and attach an ENI that brings `units` from the start."""

    units: int


Step: TypeAlias = Fill | Create


def grow(need: Need, enis: Sequence[EniView], room: int, slots_per_eni: int) -> list[Step]:
    """The fewest EC2 calls that cover `need`: attached ENIs first, then at most `room` new ones."""
    steps: list[Step] = []
    missing = need.units
    for eni in enis:
        if missing > 0 and eni.free_slots > 0:
            units = eni.free_slots if need.whole_enis else min(missing, eni.free_slots)
            steps.append(Fill(eni.id, units))
            missing -= units
    while missing > 0 and room > 0:
        units = slots_per_eni if need.whole_enis else min(missing, slots_per_eni)
        steps.append(Create(units))
        missing -= units
        room -= 1
    return steps


def eni_room(limits: InstanceLimits, settings: Settings, attached: int, trunk_to_come: bool) -> int:
    """ENIs that may still be attached; unmanaged ones count as attached."""
    most = min(limits.enis, settings.max_eni or limits.enis)
    return max(most - attached - (1 if trunk_to_come else 0), 0)


def _removable(eni: EniView) -> bool:
    """Whether an ENI may leave at all, whatever the targets say."""
    return not (
        eni.primary
        or eni.trunk
        or eni.efa
        or eni.assigned
        or eni.cooling
        or eni.age_s < MIN_ENI_AGE_S
    )


def enis_to_release(
    enis: Iterable[EniView], stats: PoolStats, settings: Settings, limits: InstanceLimits
) -> list[str]:
    """ENIs without which every target still holds, the smallest loss first."""
    leaving: list[str] = []
    for eni in sorted(filter(_removable, enis), key=lambda eni: eni.total):
        if eni_is_surplus(stats, settings, limits, eni.total):
            leaving.append(eni.id)
            stats = replace(stats, total=stats.total - eni.total)
    return leaving


def free_device_index(used: Iterable[int], limit: int = 100) -> int | None:
    """The first device index that is free, as EC2 wants one at attach."""
    taken = set(used)
    return next((index for index in range(1, limit) if index not in taken), None)
