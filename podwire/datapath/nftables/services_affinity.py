"""Numbers for session affinity: one per list of backends, and one per backend in it.

A client's entry in the kernel holds the number of the backend that it got. So a backend keeps its
number while it lives, also over a restart of the agent: the numbers are read back from the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, TypeAlias

from podwire.datapath.nftables.services_rules import ID_BITS, ID_MASK
from podwire.services import Backend, ServicePortName

ListName: TypeAlias = tuple[ServicePortName, str]
"""A port and the policy (cluster, local) whose list it is."""

MOST_LISTS = 1 << (32 - ID_BITS)


class AffinityList(NamedTuple):
    id: int
    """In the upper bits; the lower are the backend's number, from 1."""
    numbers: dict[Backend, int]


class AffinityIds:
    """Who has which number. Numbers of backends that are gone are given out again."""

    def __init__(self) -> None:
        self._lists: dict[ListName, AffinityList] = {}
        self._taken: set[int] = {0}
        self._next = 1
        self.without: set[ListName] = set()
        """Lists that got no number, and so have no affinity."""

    def adopt(self, name: ListName, list_id: int, numbers: dict[Backend, int]) -> None:
        """Take over what an earlier process gave out."""
        index = list_id >> ID_BITS
        if index not in self._taken:
            self._taken.add(index)
            self._lists[name] = AffinityList(list_id, dict(numbers))

    def list_of(self, name: ListName, backends: Sequence[Backend]) -> AffinityList | None:
        """The list's numbers with one for each of `backends`; None when they have run out."""
        known = self._lists.get(name)
        if known is None and len(backends) <= ID_MASK:
            known = self._new_list()
        if known is None:
            self.without.add(name)
            return None
        self.without.discard(name)
        self._lists[name] = known
        numbers = known.numbers
        if numbers.keys() != set(backends):
            current = set(backends)
            for gone in numbers.keys() - current:
                del numbers[gone]
            free = _free(set(numbers.values()))
            for backend in backends:
                if backend not in numbers:
                    numbers[backend] = next(free)
        return known

    def forget(self, names: Iterable[ListName]) -> None:
        """Give the numbers of lists back that exist no more."""
        for name in names:
            self.without.discard(name)
            known = self._lists.pop(name, None)
            if known is not None:
                self._taken.discard(known.id >> ID_BITS)

    def _new_list(self) -> AffinityList | None:
        if len(self._taken) >= MOST_LISTS:
            return None
        while self._next in self._taken:
            self._next = (self._next + 1) % MOST_LISTS
        self._taken.add(self._next)
        return AffinityList(self._next << ID_BITS, {})


def _free(taken: set[int]) -> Iterator[int]:
    """Free numbers, long unused ones first: clients of a backend that went shall spread."""
    highest = max(taken, default=0)
    for number in chain(range(highest + 1, ID_MASK + 1), range(1, highest)):
        if number not in taken:
            yield number
