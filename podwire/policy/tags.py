"""Tags: what a node tells the others of who sent a packet, in the 24 bits that a tunnel's id has.

Identity numbers belong to one node. A tag is a hash of what a pod's identity is made of, so that
all nodes compute it alike, whatever the order of events; it is keyed with the UID of the cluster's
kube-system Namespace, so that nobody who may only label pods can aim at the tag of another. The
ipBlocks around an address are each node's own matter and not in it: where they make two identities
of one, and where two collide, the tag says nothing and the address decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from podwire.policy.identities import Identity
from podwire.policy.model import ContainerPort
from podwire.policy.selectors import Labels

FIRST = 8192
"""Ids below say nothing of the sender."""
_COUNT = (1 << 24) - FIRST


def tag(key: str, namespace: str, labels: Labels, ports: tuple[ContainerPort, ...]) -> int:
    """The tag of a pod, by what identities of pods differ in; `key` is the cluster's secret."""
    text = json.dumps([namespace, sorted(labels.items()), ports], separators=(",", ":"))
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key.encode()[:64]).digest()
    return FIRST + int.from_bytes(digest, "big") % _COUNT


class TagIndex:
    """Which identity of this node each tag means: only where there is exactly one."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._tags: dict[int, int] = {}
        self._bearers: dict[int, set[int]] = {}

    def change(
        self, numbers: Iterable[int], identities: Mapping[int, Identity]
    ) -> tuple[dict[int, int], dict[int, int]]:
        """Take in that these identities came or went.

        `identities` are those that there are now. Returns tag → identity of the tags concerned,
        as it was and as it is.
        """
        concerned: dict[int, int | None] = {}
        for number in numbers:
            known, bears = self._tags.get(number), self._bears(identities.get(number))
            if known == bears:
                continue
            for each in filter(None, (known, bears)):
                concerned.setdefault(each, self._meaning(each))
            if known is not None:
                self._leave(known, number)
            if bears is not None:
                self._tags[number] = bears
                self._bearers.setdefault(bears, set()).add(number)
        before = {each: number for each, number in concerned.items() if number is not None}
        return before, self._meanings(concerned)

    def meanings(self) -> dict[int, int]:
        """Tag → identity, all of them."""
        return self._meanings(self._bearers)

    def _bears(self, identity: Identity | None) -> int | None:
        if identity is None or identity.kind != "pod":
            return None
        return tag(self._key, identity.namespace, identity.labels, identity.ports)

    def _leave(self, bears: int, number: int) -> None:
        del self._tags[number]
        self._bearers[bears].discard(number)
        if not self._bearers[bears]:
            del self._bearers[bears]

    def _meaning(self, bears: int) -> int | None:
        numbers = self._bearers.get(bears, ())
        return next(iter(numbers)) if len(numbers) == 1 else None

    def _meanings(self, tags: Iterable[int]) -> dict[int, int]:
        found = ((each, self._meaning(each)) for each in tags)
        return {each: number for each, number in found if number is not None}
