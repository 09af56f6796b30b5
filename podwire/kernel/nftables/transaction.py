"""Elements of sets and maps, and the transactions that change them: values, to build and compare.

An element's key and data are the concatenated fields as the kernel's registers hold them: each
field in network order, padded to four bytes (`concat`); `mark`, `priority` and `numgen` fields
are host order. Intervals of single-field sets are two elements (`interval`), those of concatenated
sets one element with `end`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

IP = 2
IP6 = 10
BRIDGE = 7
INET = 1

_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")

INTERVAL_END = 1


class Verdict(NamedTuple):
    """A map's data that decides: `code` as in nf_tables.h, `chain` for jump and goto."""

    code: int
    chain: str = ""


ACCEPT = Verdict(1)
DROP = Verdict(0)
RETURN = Verdict(-5)


def jump(chain: str) -> Verdict:
    return Verdict(-3, chain)


def goto(chain: str) -> Verdict:
    return Verdict(-4, chain)


Data: TypeAlias = bytes | Verdict | None


class Element(NamedTuple):
    """One element. `data` is None in sets; `end` is the inclusive last key of a concatenated range.

    `timeout_ms` 0 is the set's default. Deleting looks at `key`, `end` and `flags` only.
    """

    key: bytes
    data: Data = None
    end: bytes | None = None
    timeout_ms: int = 0
    flags: int = 0


class Set(NamedTuple):
    """Where elements live: a set or map. `family` is `IP`, `IP6`, `BRIDGE` or `INET`."""

    family: int
    table: str
    name: str


class Change(NamedTuple):
    verb: Literal["add", "delete"]
    set: Set
    elements: Sequence[Element]


def concat(*fields: bytes) -> bytes:
    """The fields one after the other, each padded to four bytes."""
    return b"".join(field + _PAD[len(field) & 3] for field in fields)


def interval(first: bytes, last: bytes) -> list[Element]:
    """The inclusive range as the two elements that a single-field interval set holds."""
    after = int.from_bytes(last, "big") + 1
    if after >> (8 * len(last)):
        return [Element(first)]
    return [Element(first), Element(after.to_bytes(len(last), "big"), flags=INTERVAL_END)]


def intervals(elements: Iterable[Element]) -> frozenset[tuple[bytes, bytes]]:
    """The inclusive ranges that the elements of a single-field interval set mean."""
    elements = list(elements)
    starts = sorted(e.key for e in elements if not e.flags & INTERVAL_END)
    ends = sorted(e.key for e in elements if e.flags & INTERVAL_END and any(e.key))
    ranges: set[tuple[bytes, bytes]] = set()
    for i, start in enumerate(starts):
        after = int.from_bytes(ends[i], "big") if i < len(ends) else 1 << (len(start) * 8)
        ranges.add((start, (after - 1).to_bytes(len(start), "big")))
    return frozenset(ranges)


class Transaction:
    """Element changes in order, across sets, tables and families; all of them happen or none.

    Adding an element that is there with the same data is no error; with other data it is EEXIST
    or EBUSY, so delete it first. Deleting an absent element is ENOENT.
    """

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def add(self, target: Set, elements: Iterable[Element]) -> None:
        self._append("add", target, elements)

    def delete(self, target: Set, elements: Iterable[Element]) -> None:
        self._append("delete", target, elements)

    def _append(
        self, verb: Literal["add", "delete"], target: Set, elements: Iterable[Element]
    ) -> None:
        sequence = elements if isinstance(elements, (list, tuple)) else list(elements)
        if sequence:
            self.changes.append(Change(verb, target, sequence))

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __len__(self) -> int:
        """How many elements change."""
        return sum(len(change.elements) for change in self.changes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transaction) and self.changes == other.changes

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "\n".join(
            f"{verb} {target.table}/{target.name} "
            + ", ".join(spell(element) for element in elements)
            for verb, target, elements in self.changes
        )


def spell(element: Element) -> str:
    """An element for people: hexadecimal words, ranges with a hyphen."""
    out = element.key.hex(" ", 4)
    if element.end is not None:
        out += f"-{element.end.hex(' ', 4)}"
    if element.flags & INTERVAL_END:
        out += " (end)"
    if isinstance(element.data, Verdict):
        out += f" : {element.data.code} {element.data.chain}".rstrip()
    elif element.data is not None:
        out += f" : {element.data.hex(' ', 4)}"
    return out
