"""The books: which ENI holds which addresses, which pod has which of them, which rest.

In memory; who owns an address is kept on disk by the caller, in the transaction of the ADD or DEL,
and comes back by `restore`. What EC2 holds is never kept: it is asked for.

Invariants: an address has one owner at most, also while its ENI is unknown; an address that rests
goes to nobody; an ENI or prefix with an owner or a resting address is never taken away by us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from podwire.ipam.vpc.cloud import CloudEni
from podwire.ipam.vpc.limits import PREFIX_ADDRESSES
from podwire.ipam.vpc.plan import EniView
from podwire.ipam.vpc.pool import PoolStats
from podwire.net import Address, Prefix, network

OwnerT = TypeVar("OwnerT")


@dataclass
class Eni:
    """An attached ENI. `touched` is the turn of our last change: older answers say nothing."""

    record: CloudEni
    added: float
    touched: int
    cidrs: dict[Prefix, None] = field(default_factory=dict[Prefix, None])  # in order of arrival
    unseen: set[Prefix] = field(default_factory=set[Prefix])  # missing in the last answer
    gone_once: bool = False
    usable: bool = True  # False: not set up, on its way out, or not for pods
    fault: str = ""  # why it is not usable
    tie_after: float = 0.0  # not before that is it tied to the instance's life again

    @property
    def trusted(self) -> bool:
        """Pods may get addresses of it: it is set up and the last answer of EC2 showed it."""
        return self.usable and not self.gone_once

    @property
    def order(self) -> tuple[int, int]:
        return (self.record.card_index, self.record.device_index or 0)


@dataclass(frozen=True)
class Assignment(Generic[OwnerT]):
    owner: OwnerT
    address: Address
    at: float


@dataclass
class Changes:
    """What an answer of EC2 changed in the books."""

    new: list[CloudEni] = field(default_factory=list[CloudEni])
    lost: list[CloudEni] = field(default_factory=list[CloudEni])
    lost_cidrs: int = 0
    doubtful: bool = False  # something is missing for the first time: look again


class DataStore(Generic[OwnerT]):
    """`clock` counts seconds, `cooldown_s` is how long a freed address rests."""

    def __init__(self, clock: Callable[[], float], cooldown_s: float) -> None:
        self.enis: dict[str, Eni] = {}
        self.owners: dict[Address, Assignment[OwnerT]] = {}
        self.cooling: dict[Address, float] = {}  # until when
        self.turn = 0  # counts our own changes: tells answers from before them from later ones
        self._assignments: dict[OwnerT, Assignment[OwnerT]] = {}
        self._homes: dict[Prefix, str] = {}
        self._clock, self.cooldown_s = clock, cooldown_s

    # -- owners -----------------------------------------------------------------------------

    def restore(
        self, owned: Iterable[tuple[OwnerT, Address]], resting: Iterable[tuple[Address, float]]
    ) -> None:
        """Take over what was on disk, before or after the ENIs are known."""
        now = self._clock()
        for owner, address in owned:
            self._own(Assignment(owner, address, now))
        self.cooling.update(resting)

    def assignment(self, owner: OwnerT) -> Assignment[OwnerT] | None:
        return self._assignments.get(owner)

    def assign(self, owner: OwnerT) -> Assignment[OwnerT] | None:
        """The owner's address, the same for the same owner; None when none is free."""
        if known := self._assignments.get(owner):
            return known
        self.wake()
        address = next(self._free_addresses(), None)
        if address is None:
            return None
        return self._own(Assignment(owner, address, self._clock()))

    def release(self, owner: OwnerT) -> Assignment[OwnerT] | None:
        """The owner's address rests from now on; None when there was none."""
        assignment = self.cancel(owner)
        if assignment is not None:
            self.cooling[assignment.address] = self.rest_until()
        return assignment

    def cancel(self, owner: OwnerT) -> Assignment[OwnerT] | None:
        """Undo an assignment that no pod ever used: its address need not rest."""
        assignment = self._assignments.pop(owner, None)
        if assignment is not None:
            del self.owners[assignment.address]
        return assignment

    def rest_until(self) -> float:
        """When an address that is released now will be free again."""
        return self._clock() + self.cooldown_s

    def wake(self) -> float | None:
        """End the rests that are over; returns when the next one is, if any."""
        now = self._clock()
        for address in [a for a, until in self.cooling.items() if until <= now]:
            del self.cooling[address]
        return min(self.cooling.values(), default=None)

    def _own(self, assignment: Assignment[OwnerT]) -> Assignment[OwnerT]:
        self._assignments[assignment.owner] = assignment
        self.owners[assignment.address] = assignment
        return assignment

    def _free_addresses(self) -> Iterator[Address]:
        """Free ones in the order of choice: primary ENI first, prefixes in use before idle ones,
        so that whole ENIs and whole prefixes stay free to go."""
        for eni in sorted(self.enis.values(), key=lambda eni: eni.order):
            if not eni.trusted:
                continue
            cidrs = [cidr for cidr in eni.cidrs if cidr not in eni.unseen]
            cidrs.sort(key=lambda cidr: cidr.length < cidr.bits and not self._used(cidr))
            for cidr in cidrs:
                for address in pod_addresses(cidr):
                    if address not in self.owners and address not in self.cooling:
                        yield address

    # -- ENIs -------------------------------------------------------------------------------

    def add_eni(self, record: CloudEni, *, usable: bool, fault: str = "") -> Eni:
        bare = replace(record, cidrs=frozenset())
        eni = Eni(bare, added=self._clock(), touched=self.turn, usable=usable, fault=fault)
        self.enis[record.id] = eni
        self.add_cidrs(record.id, record.cidrs)
        return eni

    def remove_eni(self, eni_id: str) -> None:
        eni = self.enis.pop(eni_id)
        for cidr in eni.cidrs:
            self._homes.pop(cidr, None)

    def add_cidrs(self, eni_id: str, cidrs: Iterable[Prefix]) -> None:
        eni = self.enis[eni_id]
        self.touch(eni_id)
        for cidr in sorted(cidrs):
            eni.cidrs[cidr] = None
            eni.unseen.discard(cidr)
            self._homes[cidr] = eni_id

    def remove_cidrs(self, eni_id: str, cidrs: Iterable[Prefix]) -> None:
        eni = self.enis[eni_id]
        self.touch(eni_id)
        for cidr in cidrs:
            eni.cidrs.pop(cidr, None)
            eni.unseen.discard(cidr)
            self._homes.pop(cidr, None)

    def touch(self, eni_id: str) -> None:
        """Answers that were asked for before now say nothing about this ENI any more."""
        if eni := self.enis.get(eni_id):
            self.turn += 1
            eni.touched = self.turn

    def eni_of(self, address: Address) -> Eni | None:
        """The ENI an address belongs to; None when no known one has it."""
        bits = len(address) * 8
        for length in (32, 28) if bits == 32 else (80,):
            home = self._homes.get(network(address, length))
            if home is not None:
                return self.enis[home]
        return None

    def idle_cidrs(self, eni_id: str) -> list[Prefix]:
        """What of an ENI nobody has and nothing of which rests, newest first."""
        return [cidr for cidr in reversed(self.enis[eni_id].cidrs) if not self._used(cidr)]

    def observe(self, records: Iterable[CloudEni], asked_at: int) -> Changes:
        """Make the books follow what EC2 says, as asked for at turn `asked_at`.

        What is new counts at once. What is missing is not handed out any more, and leaves the
        books only when a second answer misses it too; pods keep addresses that are gone.
        """
        changes = Changes()
        seen = {record.id: record for record in records}
        for id, record in seen.items():
            eni = self.enis.get(id)
            if eni is None:
                changes.new.append(record)
            elif eni.touched <= asked_at:
                eni.gone_once = False
                self._observe_cidrs(eni, record, changes)
        for id, eni in list(self.enis.items()):
            if id in seen or eni.touched > asked_at:
                continue
            if eni.gone_once:
                changes.lost.append(eni.record)
                changes.lost_cidrs += len(eni.cidrs)
                self.remove_eni(id)
            else:
                eni.gone_once = changes.doubtful = True
                eni.unseen.update(eni.cidrs)
        return changes

    def _observe_cidrs(self, eni: Eni, record: CloudEni, changes: Changes) -> None:
        held = set(eni.cidrs)
        missing = held - record.cidrs
        twice = missing & eni.unseen
        for cidr in twice:
            del eni.cidrs[cidr]
            self._homes.pop(cidr, None)
        changes.lost_cidrs += len(twice)
        eni.unseen = missing - twice
        changes.doubtful |= bool(eni.unseen)
        for cidr in sorted(record.cidrs - held):
            eni.cidrs[cidr] = None
            self._homes[cidr] = eni.record.id
        eni.record = replace(record, cidrs=frozenset())

    # -- counts -----------------------------------------------------------------------------

    def stats(self, waiting: int = 0) -> PoolStats:
        """Counts over usable ENIs. A /80 counts as a prefix of no countable size."""
        self.wake()
        total = assigned = cooling = prefixes = free_prefixes = 0
        for eni in self.enis.values():
            if not eni.usable:
                continue
            for cidr in eni.cidrs:
                if cidr in eni.unseen:
                    continue
                if cidr.length == 32 and len(cidr.address) == 4:  # the many: one look each
                    total += 1
                    assigned += cidr.address in self.owners
                    cooling += cidr.address in self.cooling
                    continue
                used, resting = self._usage(cidr)
                assigned += used
                cooling += resting
                total += 0 if cidr.bits == 128 else 1 << (32 - cidr.length)
                prefixes += 1
                free_prefixes += not used and not resting
        return PoolStats(total, assigned, cooling, waiting, prefixes, free_prefixes)

    def view(self, eni: Eni, slots: int) -> EniView:
        """What planning sees of an ENI with room for `slots` addresses or prefixes."""
        usage = [self._usage(cidr) for cidr in eni.cidrs]
        return EniView(
            id=eni.record.id,
            free_slots=max(slots - len(eni.cidrs), 0) if eni.trusted else 0,
            total=sum(1 if cidr.length == 32 else PREFIX_ADDRESSES for cidr in eni.cidrs),
            assigned=sum(used for used, _ in usage),
            cooling=sum(resting for _, resting in usage),
            age_s=self._clock() - eni.added,
            primary=eni.record.primary,
            trunk=eni.record.kind == "trunk",
            efa=eni.record.kind.startswith("efa"),
        )

    def _used(self, cidr: Prefix) -> bool:
        return any(self._usage(cidr))

    def _usage(self, cidr: Prefix) -> tuple[int, int]:
        """Owned and resting addresses of one CIDR."""
        if cidr.length == cidr.bits:
            return cidr.address in self.owners, cidr.address in self.cooling
        if cidr.bits == 32:
            addresses = list(pod_addresses(cidr))
            return (
                sum(address in self.owners for address in addresses),
                sum(address in self.cooling for address in addresses),
            )
        return sum(a in cidr for a in self.owners), sum(a in cidr for a in self.cooling)


def pod_addresses(cidr: Prefix) -> Iterator[Address]:
    """Addresses of a CIDR that pods may have: a delegated IPv4 prefix has no network or broadcast
    address; the zero address of an IPv6 one is the anycast address of routers (RFC 4291, 2.6.1)."""
    first, size = int.from_bytes(cidr.address, "big"), len(cidr.address)
    count = 1 << (cidr.bits - cidr.length)
    skip = 1 if cidr.bits == 128 and count > 1 else 0
    for number in range(first + skip, first + count):
        yield number.to_bytes(size, "big")
