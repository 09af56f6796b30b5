"""How large the pool must be: one idempotent formula from demand and targets, no state.

    request = ceil((demand + minimum free) / batch) * batch, within the cap

Demand is what pods hold, what ADDs wait for and what cools down: the pool is sized for pods that
are here, not by how often a loop comes round. Targets mean what they mean in the AWS VPC CNI, with
two faults mended: cooling addresses are not available, and ADDs that wait count as demand also
when no warm target is set.
"""

from __future__ import annotations

from dataclasses import dataclass

from podwire.ipam.vpc.limits import PREFIX_ADDRESSES, InstanceLimits
from podwire.ipam.vpc.settings import Settings


@dataclass(frozen=True)
class PoolStats:
    """Counts of addresses that pods may have, in-flight requests included in `total`.

    `free_prefixes` are prefixes without an assigned or cooling address.
    """

    total: int = 0
    assigned: int = 0
    cooling: int = 0
    waiting: int = 0
    prefixes: int = 0
    free_prefixes: int = 0

    @property
    def demand(self) -> int:
        return self.assigned + self.cooling + self.waiting

    @property
    def spare(self) -> int:
        """Addresses nobody has and nobody waits for; negative when ADDs wait."""
        return self.total - self.demand


@dataclass(frozen=True)
class Need:
    """Units to ask for: addresses, or prefixes under prefix delegation.

    With `whole_enis` every ENI that is touched is filled up, as WARM_ENI_TARGET asks.
    """

    units: int
    whole_enis: bool = False


def short_and_over(stats: PoolStats, settings: Settings) -> tuple[int, int]:
    """Addresses missing from, and above, WARM_IP_TARGET and MINIMUM_IP_TARGET."""
    warm, minimum = settings.warm_ip_target or 0, settings.minimum_ip_target or 0
    short = max(warm - stats.spare, minimum - stats.total, 0)
    over = max(min(max(stats.spare - warm, 0), stats.total - minimum), 0)
    return short, over


def prefixes_short_and_over(stats: PoolStats, settings: Settings) -> tuple[int, int]:
    """The same in /28 prefixes: what is missing rounded up, only whole free prefixes are over."""
    warm, minimum = settings.warm_ip_target or 0, settings.minimum_ip_target or 0
    short, _ = short_and_over(stats, settings)
    needed = max(_prefixes(stats.demand + warm), _prefixes(minimum))
    return _prefixes(short), max(min(stats.free_prefixes, stats.prefixes - needed), 0)


def need(stats: PoolStats, settings: Settings, limits: InstanceLimits, max_pods: int) -> Need:
    """What to ask EC2 for. Zero units: the pool is not too low.

    Nothing is kept warm beyond `max_pods`, but an ADD that waits is always served.
    """
    if settings.ipv6:
        return Need(0 if stats.prefixes else 1)
    room = max(max_pods, stats.demand) - stats.total
    if room <= 0:
        return Need(0)
    if settings.ip_targets:
        short = min(short_and_over(stats, settings)[0], room)
        return Need(_prefixes(short) if settings.prefix_delegation else short)
    if settings.prefix_delegation:
        free = PREFIX_ADDRESSES * (settings.warm_prefix_target or 0)
        return Need(_prefixes(min(_missing(stats, free), room)))
    free = limits.slots_per_eni * settings.warm_eni_target
    # An ENI that is only kept warm is made when everybody is served.
    missing = -stats.spare if stats.spare < 0 else _missing(stats, free)
    return Need(min(missing, room), whole_enis=True)


def surplus(stats: PoolStats, settings: Settings) -> int:
    """Units (addresses, or whole free prefixes) that may go back to the subnet one by one."""
    if settings.ipv6:
        return 0
    if settings.ip_targets:
        pick = prefixes_short_and_over if settings.prefix_delegation else short_and_over
        return pick(stats, settings)[1]
    if settings.prefix_delegation:
        return max(stats.free_prefixes - (settings.warm_prefix_target or 0), 0)
    return 0


def slots_per_eni(settings: Settings, limits: InstanceLimits) -> int:
    """Addresses or prefixes that we ask for on one ENI: of /80s one is plenty."""
    return 1 if settings.ipv6 else limits.slots_per_eni


def eni_is_surplus(
    stats: PoolStats, settings: Settings, limits: InstanceLimits, eni_total: int
) -> bool:
    """Whether the targets still hold without an idle ENI of `eni_total` addresses."""
    if settings.ipv6:
        return False
    without = PoolStats(
        total=stats.total - eni_total,
        assigned=stats.assigned,
        cooling=stats.cooling,
        waiting=stats.waiting,
    )
    if settings.ip_targets:
        return short_and_over(without, settings)[0] == 0
    if settings.prefix_delegation:
        free = PREFIX_ADDRESSES * (settings.warm_prefix_target or 0)
        return _missing(without, free) == 0
    # One more than the target: an ENI that goes as soon as it is spare would come back at once.
    return stats.spare >= (settings.warm_eni_target + 1) * limits.slots_per_eni


def _missing(stats: PoolStats, minimum_free: int) -> int:
    """Addresses missing; with a target of 0 the pool is low only when nothing is free."""
    return max(max(minimum_free, 1) - stats.spare, 0)


def _prefixes(addresses: int) -> int:
    return -(-addresses // PREFIX_ADDRESSES)
