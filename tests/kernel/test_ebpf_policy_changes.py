"""A policy changes: every packet is judged by all of it or by none, at each write to a map."""

import pytest

from podwire.kernel.bpf import Map, maps
from podwire.kube.objects import NetworkPolicy
from tests.kernel.ebpf_policies import pod, policy
from tests.kernel.ebpf_world import NEEDS_EBPF, POD, World
from tests.kernel.test_ebpf_policy_restart import is_let_through, start

pytestmark = NEEDS_EBPF
CASES = [(2, 1, port) for port in (80, 81, 88)] + [(1, 2, 80)]


def ingress(*rules):
    selector = {"podSelector": {"matchLabels": {"app": "web"}}}
    return selector | {"policyTypes": ["Ingress"], "ingress": list(rules)}


def ports(*numbers):
    return {"ports": [{"protocol": "TCP", "port": number} for number in numbers]}


CLIENTS = {"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}
NEAR = {"from": [{"ipBlock": {"cidr": "10.244.0.0/24"}}]}
WIDE = {"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.244.0.3/32"]}}]}
RANGE = {"ports": [{"protocol": "TCP", "port": 80, "endPort": 95}]}
CHANGES = {
    "all ports, then one": (ingress(CLIENTS), ingress(CLIENTS | ports(80))),
    "a range, then one port": (ingress(CLIENTS | RANGE), ingress(CLIENTS | ports(88))),
    "everybody, then clients": (ingress({}), ingress(CLIENTS | ports(80))),
    "clients, then everybody": (ingress(CLIENTS), ingress(ports(80))),
    "everybody, then a block": (ingress({}), ingress(NEAR | ports(80))),
    "a block, then everybody": (ingress(NEAR), ingress(ports(80, 81))),
    "a block with a hole, then one without": (ingress(WIDE), ingress(NEAR | ports(81, 88))),
}


@pytest.fixture(scope="module")
def node():
    """The world, its programs and the part."""
    with World() as world:
        yield world, *start(world, [(1, "one"), (2, "two")])


def enforce(world, part, spec):
    world.store.put(policy("p", spec))
    part.apply(world.compiler.update(world.store.take()))
    part.flush()


def watch(world, made, monkeypatch):
    """What became of each case after each write of one entry."""
    seen = []

    def judge():
        return tuple(is_let_through(world, made, *case) for case in CASES)

    def watched(body):
        def run(self, *args):
            done = body(self, *args)
            if self.info.name not in ("connections", "rulings"):
                seen.append(judge())
            return done

        return run

    monkeypatch.setattr(maps, "_BATCH", 1)
    for name in ("update", "delete", "_run_batch"):
        monkeypatch.setattr(Map, name, watched(getattr(Map, name)))
    return seen, judge


@pytest.mark.parametrize("name", list(CHANGES))
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_of_rules(node, monkeypatch, name, back):
    world, made, part = node
    for key in list(world.store.all(NetworkPolicy)):
        world.store.remove(NetworkPolicy, key)
    first, second = CHANGES[name][:: -1 if back else 1]
    enforce(world, part, first)
    with monkeypatch.context() as patch:
        seen, judge = watch(world, made, patch)
        before = judge()
        enforce(world, part, second)
        after = judge()
    assert before != after
    turns = [one for one, next in zip([before, *seen], [*seen, after], strict=True) if one != next]
    assert turns == [before], seen
    assert part.verify() == []


def test_of_labels(node, monkeypatch):
    """Denied by its own policy before, by the other pod's after."""
    world, made, part = node
    for key in list(world.store.all(NetworkPolicy)):
        world.store.remove(NetworkPolicy, key)
    shut = {"podSelector": {"matchLabels": {"app": "client"}}, "policyTypes": ["Egress"]}
    world.store.put(policy("shut", shut))
    trusted = {"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}
    enforce(world, part, ingress(trusted))
    with monkeypatch.context() as patch:
        seen, judge = watch(world, made, patch)
        assert not any(judge()[:3])
        world.store.put(pod("two", "node", POD[2], app="other"))
        part.apply(world.compiler.update(world.store.take()))
        part.flush()
        assert not any(judge()[:3])
    assert seen
    assert not any(any(each[:3]) for each in seen), seen
    world.store.put(pod("two", "node", POD[2], app="client"))
    assert part.verify() == []
