"""Identities: what policies can tell apart, numbered; and which peers each of them matches.

All addresses with the same namespace, labels, container ports and ipBlocks around them share one
identity, so that rule sets speak about a few hundred numbers, and a pod that comes or goes changes
one address. Addresses outside the cluster have an identity too where an ipBlock covers them.

Only peers in use (`PeerIndex.use`) are matched; both sides are indexed by a label that a match
needs, so that one new pod or one new policy does not look at all the others.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from podwire.net import Address, Prefix
from podwire.policy.model import (
    BlockPeer,
    ContainerPort,
    Host,
    NamedPortPeer,
    NodePeer,
    Peer,
    PodPeer,
    pod_homes,
)
from podwire.policy.selectors import Labels

IdentityKey: TypeAlias = tuple[object, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """`kind` is "pod", "node" or "world"; `number` is never given again."""

    number: int
    kind: str
    namespace: str
    labels: Labels
    ports: tuple[ContainerPort, ...]
    blocks: frozenset[BlockPeer]

    def __str__(self) -> str:
        labels = ",".join(f"{key}={value}" for key, value in sorted(self.labels.items()))
        blocks = " ".join(sorted(str(block.cidr) for block in self.blocks))
        return " ".join(part for part in (self.kind, self.namespace, labels, blocks) if part)


class Interval(NamedTuple):
    """Addresses outside the cluster's hosts, inclusive, and their identity."""

    first: Address
    last: Address
    identity: int


Touched = Callable[[Peer, int], None]
"""Called when an identity starts or stops to match a peer."""


class PeerIndex:
    """Identities of addresses, and the peers in use that each of them matches."""

    def __init__(self, touched: Touched) -> None:
        self.identities: dict[int, Identity] = {}
        self.addresses: dict[Address, int] = {}
        self.intervals: tuple[Interval, ...] = ()
        self.members: dict[Peer, set[int]] = {}
        self.matched: dict[int, set[Peer]] = {}
        self._touched = touched
        self._renumbered: set[int] = set()
        self._next = 1
        self._numbers: dict[IdentityKey, int] = {}
        self._keys: dict[int, IdentityKey] = {}
        self._users: dict[int, int] = {}
        self._uses: dict[Peer, int] = {}
        self._peers_at: dict[tuple[str, ...], set[PodPeer]] = {}
        self._identities_at: dict[tuple[str, ...], set[int]] = {}
        self._blocks: dict[Prefix, set[BlockPeer]] = {}
        self._lengths: dict[int, list[int]] = {}
        self._world: list[int] = []
        self._blocks_changed = False
        self._moved_blocks: set[BlockPeer] = set()
        self._sorted: list[Address] | None = None

    # --- peers ---

    def use(self, peer: Peer, namespace_labels: Callable[[str], Labels]) -> None:
        """Count one more user; the first one makes the peer known and matches all identities."""
        self._uses[peer] = self._uses.get(peer, 0) + 1
        if self._uses[peer] > 1:
            return
        self.members[peer] = set()
        if isinstance(peer, BlockPeer):
            self._blocks.setdefault(peer.cidr, set()).add(peer)
            self._moved_blocks.add(peer)
            self._blocks_changed = True
            return
        if isinstance(peer, PodPeer):
            for home in peer.homes():
                self._peers_at.setdefault(home, set()).add(peer)
                for number in self._identities_at.get(home, ()):
                    self._match(peer, number, namespace_labels)
            return
        for number in self.identities:
            self._match(peer, number, namespace_labels)

    def drop(self, peer: Peer) -> None:
        """Count one user less; without any the peer is forgotten.

        In one update use first and drop then, and `assign` last.
        """
        self._uses[peer] -= 1
        if self._uses[peer]:
            return
        del self._uses[peer]
        for number in self.members.pop(peer):
            self.matched[number].discard(peer)
            self._touched(peer, number)
        if isinstance(peer, BlockPeer):
            self._blocks[peer.cidr].discard(peer)
            if not self._blocks[peer.cidr]:
                del self._blocks[peer.cidr]
            self._moved_blocks.add(peer)
            self._blocks_changed = True
        elif isinstance(peer, PodPeer):
            for home in peer.homes():
                self._peers_at[home].discard(peer)
                if not self._peers_at[home]:
                    del self._peers_at[home]

    def namespace_changed(self, name: str, namespace_labels: Callable[[str], Labels]) -> None:
        """Match the namespace's identities again."""
        for number in list(self._identities_at.get((name,), ())):
            self._match_all(self.identities[number], namespace_labels)

    def _match(self, peer: Peer, number: int, namespace_labels: Callable[[str], Labels]) -> None:
        if _matches(peer, self.identities[number], namespace_labels):
            self.members[peer].add(number)
            self.matched[number].add(peer)
            self._touched(peer, number)

    def _match_all(self, identity: Identity, namespace_labels: Callable[[str], Labels]) -> None:
        before = self.matched.get(identity.number, set[Peer]())
        after = {
            peer
            for peer in self._candidates(identity)
            if _matches(peer, identity, namespace_labels)
        }
        self.matched[identity.number] = after
        for peer in before - after:
            self.members[peer].discard(identity.number)
            self._touched(peer, identity.number)
        for peer in after - before:
            self.members[peer].add(identity.number)
            self._touched(peer, identity.number)

    def _candidates(self, identity: Identity) -> Iterable[Peer]:
        yield from identity.blocks & self._uses.keys()
        if identity.kind == "pod":
            for home in pod_homes(identity.namespace, identity.labels):
                yield from self._peers_at.get(home, ())
            for name in {port.name for port in identity.ports}:
                if NamedPortPeer(name) in self._uses:
                    yield NamedPortPeer(name)
        elif identity.kind == "node":
            yield from (peer for peer in self._uses if isinstance(peer, NodePeer))

    # --- addresses ---

    def assign(
        self,
        dirty: set[Address],
        host: Callable[[Address], Host],
        namespace_labels: Callable[[str], Labels],
    ) -> dict[Address, int | None]:
        """Give the dirty addresses, and those in blocks that came or went, their identities.

        Returns what changed: address → identity, None for an address that has none any more.
        """
        if self._blocks_changed:
            self._reblock(dirty, namespace_labels)
        changed: dict[Address, int | None] = {}
        for address in dirty:
            old = self.addresses.get(address)
            owner = host(address)
            if owner.kind == "world":
                if old is not None:
                    del self.addresses[address]
                    self._sorted = None
                    self._leave(old)
                    changed[address] = None
                continue
            number = self._identity(owner, self.blocks_around(address), namespace_labels)
            if number == old:
                continue
            self._users[number] += 1
            if old is None:
                self._sorted = None
            else:
                self._leave(old)
            self.addresses[address] = number
            changed[address] = number
        return changed

    def take_renumbered(self) -> frozenset[int]:
        """Identities that came or went since this was asked last."""
        renumbered, self._renumbered = frozenset(self._renumbered), set()
        return renumbered

    def blocks_around(self, address: Address) -> frozenset[BlockPeer]:
        """The ipBlocks in use that contain the address."""
        bits = len(address) * 8
        lengths = self._lengths.get(bits)
        if not lengths:
            return frozenset()
        value = int.from_bytes(address, "big")
        found: list[BlockPeer] = []
        for length in lengths:
            masked = (value >> (bits - length) << (bits - length)).to_bytes(bits // 8, "big")
            for block in self._blocks.get(Prefix(masked, length), ()):
                if address in block:
                    found.append(block)
        return frozenset(found)

    def _reblock(self, dirty: set[Address], namespace_labels: Callable[[str], Labels]) -> None:
        self._blocks_changed = False
        self._lengths = {
            bits: sorted({p.length for p in self._blocks if p.bits == bits}) for bits in (32, 128)
        }
        for block in self._moved_blocks:
            dirty.update(self._inside(block.cidr))
        self._moved_blocks.clear()
        intervals: list[Interval] = []
        before, self._world = self._world, []
        for first, last, blocks in block_regions(self._blocks):
            number = self._identity(Host(), blocks, namespace_labels)
            self._users[number] += 1
            self._world.append(number)
            intervals.append(Interval(first, last, number))
        self.intervals = tuple(intervals)
        for number in before:
            self._leave(number)

    def _inside(self, prefix: Prefix) -> list[Address]:
        if self._sorted is None:
            self._sorted = sorted(self.addresses)
        start = bisect_left(self._sorted, prefix.first)
        end = bisect_right(self._sorted, prefix.last)
        return [a for a in self._sorted[start:end] if len(a) == len(prefix.address)]

    def _identity(
        self,
        owner: Host,
        blocks: frozenset[BlockPeer],
        namespace_labels: Callable[[str], Labels],
    ) -> int:
        """The number for these facts; a new one has no users yet."""
        labels = frozenset(owner.labels.items())
        key: IdentityKey = (owner.kind, owner.namespace, labels, owner.ports, blocks)
        number = self._numbers.get(key)
        if number is not None:
            return number
        number, self._next = self._next, self._next + 1
        identity = Identity(number, owner.kind, owner.namespace, owner.labels, owner.ports, blocks)
        self._numbers[key] = number
        self._keys[number] = key
        self._users[number] = 0
        self.identities[number] = identity
        self._renumbered.add(number)
        if identity.kind == "pod":
            for home in pod_homes(identity.namespace, identity.labels):
                self._identities_at.setdefault(home, set()).add(number)
        self._match_all(identity, namespace_labels)
        return number

    def _leave(self, number: int) -> None:
        self._users[number] -= 1
        if self._users[number]:
            return
        identity = self.identities.pop(number)
        self._renumbered.add(number)
        del self._users[number], self._numbers[self._keys.pop(number)]
        for peer in self.matched.pop(number):
            self.members[peer].discard(number)
            self._touched(peer, number)
        if identity.kind == "pod":
            for home in pod_homes(identity.namespace, identity.labels):
                at = self._identities_at[home]
                at.discard(number)
                if not at:
                    del self._identities_at[home]


def _matches(peer: Peer, identity: Identity, namespace_labels: Callable[[str], Labels]) -> bool:
    if isinstance(peer, BlockPeer):
        return peer in identity.blocks
    if isinstance(peer, PodPeer):
        return identity.kind == "pod" and peer.matches(
            identity.namespace, identity.labels, namespace_labels(identity.namespace)
        )
    if isinstance(peer, NodePeer):
        return identity.kind == "node" and peer.nodes.matches(identity.labels)
    return any(port.name == peer.name for port in identity.ports)


def block_regions(
    blocks: Mapping[Prefix, set[BlockPeer]],
) -> list[tuple[Address, Address, frozenset[BlockPeer]]]:
    """Disjoint regions of addresses, in order, with the non-empty set of blocks that cover each.

    Prefixes are nested or disjoint, so one pass over them in order with a stack cuts the space.
    """
    closes: dict[Prefix, set[BlockPeer]] = {}
    for some in blocks.values():
        for block in some:
            for gap in block.excepts:
                closes.setdefault(gap, set()).add(block)
    regions: list[tuple[Address, Address, frozenset[BlockPeer]]] = []
    for bits in (32, 128):
        prefixes = sorted(
            {p for p in (*blocks, *closes) if p.bits == bits}, key=lambda p: (p.address, p.length)
        )
        _sweep(prefixes, blocks, closes, bits, regions)
    return regions


def _sweep(
    prefixes: list[Prefix],
    opens: Mapping[Prefix, set[BlockPeer]],
    closes: Mapping[Prefix, set[BlockPeer]],
    bits: int,
    regions: list[tuple[Address, Address, frozenset[BlockPeer]]],
) -> None:
    size = bits // 8
    cursor = 0
    # An except wider than its block leaves nothing of it, also when the block opens further in.
    stack: list[tuple[int, frozenset[BlockPeer], frozenset[BlockPeer]]] = []
    none: frozenset[BlockPeer] = frozenset()

    def emit(until: int, covered: frozenset[BlockPeer]) -> None:
        nonlocal cursor
        if until > cursor and covered:
            first, last = cursor.to_bytes(size, "big"), (until - 1).to_bytes(size, "big")
            if regions and regions[-1][2] == covered and regions[-1][1] == _before(first):
                regions[-1] = (regions[-1][0], last, covered)
            else:
                regions.append((first, last, covered))
        cursor = max(cursor, until)

    for prefix in prefixes:
        start = int.from_bytes(prefix.address, "big")
        while stack and stack[-1][0] <= start:
            end, covered, _ = stack.pop()
            emit(end, covered)
        covered, closed = (stack[-1][1], stack[-1][2]) if stack else (none, none)
        emit(start, covered)
        closed = closed | closes.get(prefix, none)
        covered = (covered | opens.get(prefix, none)) - closed
        stack.append((start + (1 << (bits - prefix.length)), covered, closed))
    while stack:
        end, covered, _ = stack.pop()
        emit(end, covered)


def _before(address: Address) -> Address | None:
    value = int.from_bytes(address, "big")
    return (value - 1).to_bytes(len(address), "big") if value else None
