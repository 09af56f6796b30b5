"""Tags: all nodes compute them alike, and a tag that could mean two identities means none."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.kube.objects import Namespace, NetworkPolicy, Pod
from podwire.kube.store import Store
from podwire.policy import PolicyCompiler, PolicyTable
from podwire.policy.identities import Identity
from podwire.policy.tags import FIRST, TagIndex, tag

KEY = "8f1c5a1e-0000-4000-8000-000000000001"


def made(kind: Any, name: str, spec: dict[str, Any] | None = None, **metadata: Any) -> Any:
    status = {"podIPs": [{"ip": metadata.pop("ip")}]} if "ip" in metadata else {}
    source = {"metadata": {"name": name, **metadata}, "spec": spec or {}, "status": status}
    return msgspec.convert(source, kind)


def pods(count: int) -> list[Pod]:
    """Of a few label sets in two namespaces, each with an address of its own."""
    return [
        made(
            Pod, f"p{i}", ip=f"10.244.{i % 3}.{i}", namespace="ab"[i % 2], labels={"n": f"{i % 5}"}
        )
        for i in range(1, count)
    ]


class Node:
    """A node's compiler and the index that follows its tables by their deltas."""

    def __init__(self, name: str) -> None:
        self.store, self.compiler = Store(), PolicyCompiler(name)
        self.store.put(made(Namespace, "kube-system", uid=KEY))
        self.index: TagIndex | None = None
        self.held: dict[int, int] = {}
        self.table: PolicyTable | None = None

    def settle(self) -> dict[int, dict[str, str]]:
        """Tags as a map in the kernel would hold them, with the labels of what each means."""
        old, self.table = self.table, self.compiler.update(self.store.take())
        if self.index is None:
            assert self.table.cluster == KEY
            self.index = TagIndex(self.table.cluster)
        before, after = self.index.change(self.table.delta(old).identities, self.table.identities)
        assert before.items() <= self.held.items()
        for gone in before.keys() - after.keys():
            del self.held[gone]
        self.held.update(after)
        assert self.held == self.index.meanings()
        return {each: dict(self.table.identities[n].labels) for each, n in self.held.items()}


def test_a_tag_is_24_bits_above_those_that_say_nothing() -> None:
    found = {tag(KEY, "x", {"i": str(i)}, ()) for i in range(2000)}
    assert min(found) >= FIRST
    assert max(found) < 1 << 24
    assert len(found) > 1990


def test_labels_namespace_and_key_matter_and_their_order_does_not() -> None:
    one = tag(KEY, "x", {"a": "1", "b": "2"}, ())
    assert tag(KEY, "x", {"b": "2", "a": "1"}, ()) == one
    others = [
        tag(KEY, "y", {"a": "1", "b": "2"}, ()),
        tag(KEY, "x", {"a": "1", "b": "3"}, ()),
        tag("", "x", {"a": "1", "b": "2"}, ()),
    ]
    assert one not in others


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_nodes_agree_whatever_the_order_of_events(dice: random.Random) -> None:
    one, two = Node("one"), Node("two")
    every = pods(20)
    for node in (one, two):
        dice.shuffle(every)
        for each in every:
            node.store.put(each)
            if dice.random() < 0.3:
                node.settle()
        for each in dice.sample(every, 5):
            node.store.remove(Pod, each.key)
            node.settle()
            node.store.put(each)
    assert one.settle() == two.settle()
    assert len(one.held) == 10


def test_the_delta_is_what_changed() -> None:
    node = Node("one")
    for each in pods(12):
        node.store.put(each)
    node.settle()
    node.store.put(made(Pod, "new", ip="10.244.9.9", namespace="a", labels={"n": "new"}))
    old = node.table
    assert set(node.settle().keys()) > {tag(KEY, "a", {"n": "new"}, ())}
    assert node.table is not None
    assert len(node.table.delta(old).identities) == 1
    node.store.remove(Pod, ("a", "new"))
    assert tag(KEY, "a", {"n": "new"}, ()) not in node.settle()


def test_an_ip_block_that_splits_an_identity_makes_its_tag_ambiguous() -> None:
    node = Node("one")
    for i in (1, 2):
        node.store.put(made(Pod, f"p{i}", ip=f"10.244.{i}.9", namespace="a", labels={"n": "1"}))
    here = made(Pod, "here", {"nodeName": "one"}, ip="10.244.0.9", namespace="a", labels={"n": "0"})
    node.store.put(here)
    node.compiler = PolicyCompiler("one", attach_own_pods=True)
    split = tag(KEY, "a", {"n": "1"}, ())
    assert split in node.settle()
    spec = {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.244.1.0/24"}}]}]}
    node.store.put(made(NetworkPolicy, "some", spec, namespace="a"))
    assert split not in node.settle()
    node.store.remove(NetworkPolicy, ("a", "some"))
    assert split in node.settle()


def test_a_collision_says_nothing_until_one_of_the_two_is_gone() -> None:
    seen: dict[int, Identity] = {}
    for i in itertools.count(1):
        other = Identity(i, "pod", "x", {"i": str(i)}, (), frozenset())
        bears = tag(KEY, "x", other.labels, ())
        if bears in seen:
            break
        seen[bears] = other
    one = seen[bears]
    index = TagIndex(KEY)
    both = {one.number: one, other.number: other}
    assert index.change([one.number], both) == ({}, {bears: one.number})
    assert index.change([other.number], both) == ({bears: one.number}, {})
    assert index.change([one.number], {other.number: other}) == ({}, {bears: other.number})
    assert index.change([other.number], {}) == ({bears: other.number}, {})
    assert index.meanings() == {}


def test_another_compilers_numbers_mean_what_it_says() -> None:
    """As when a process compiles anew: the same numbers, for others."""
    index = TagIndex(KEY)
    first, second = (
        {1: identity("a"), 2: identity("b")},
        {1: identity("b"), 2: identity("c")},
    )
    index.change(first, first)
    before, after = index.change({1, 2}, second)
    tags = {name: tag(KEY, "x", {"app": name}, ()) for name in "abc"}
    assert before == {tags["a"]: 1, tags["b"]: 2}
    assert after == {tags["b"]: 1, tags["c"]: 2} == index.meanings()


def identity(app: str) -> Identity:
    return Identity(0, "pod", "x", {"app": app}, (), frozenset())
