"""Room in an array (of backends, of Maglev tables): runs of slots, lent and given back."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple


class Run(NamedTuple):
    """`size` slots from `first`."""

    first: int
    size: int


EMPTY = Run(0, 0)


class Slots:
    """Hands out runs. A returned run waits in `pending` until nobody reads it any more."""

    def __init__(self) -> None:
        self.top = 0
        """Slots that the array must have."""
        self._free: dict[int, list[int]] = defaultdict(list)
        self._pending: list[Run] = []

    def take(self, size: int) -> Run:
        if not size:
            return EMPTY
        room = _room(size)
        if self._free[room]:
            return Run(self._free[room].pop(), size)
        self.top += room
        return Run(self.top - room, size)

    def give_back(self, run: Run) -> None:
        if run.size:
            self._pending.append(run)

    def settle(self) -> None:
        """Nobody reads the returned runs any more: they may be lent again."""
        for run in self._pending:
            self._free[_room(run.size)].append(run.first)
        self._pending.clear()

    @property
    def waiting(self) -> int:
        return len(self._pending)

    def adopt(self, runs: set[Run]) -> None:
        """Take over runs that an earlier process lent; what lies between them is free."""
        at = 0
        for run in sorted(runs):
            self._release(at, run.first)
            at = max(at, run.first + _room(run.size))
        self.top = at

    def _release(self, start: int, end: int) -> None:
        """Cut a gap into rooms that `take` asks for, the largest first."""
        while start < end:
            room = _floor(end - start)
            self._free[room].append(start)
            start += room


def _room(size: int) -> int:
    """Rooms come in steps of at most an eighth, so that a list that grows fits into few sizes."""
    step = 1 << max(0, size.bit_length() - 4)
    return (size + step - 1) // step * step


def _floor(size: int) -> int:
    """The largest room that is not larger than `size`."""
    step = 1 << max(0, size.bit_length() - 4)
    return size // step * step
