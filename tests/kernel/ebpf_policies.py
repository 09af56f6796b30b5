"""Pods and policies of namespace x for eBPF tests, as the API would show them."""

import msgspec

from podwire.agent import policy_drops
from podwire.datapath.ebpf.events import EventReader
from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.kube.objects import Namespace, NetworkPolicy, Node, Pod
from podwire.kube.store import Store
from podwire.net import parse_address
from podwire.policy import Attachment, PolicyCompiler
from tests.kernel.ebpf_world import NODE, OUTSIDE, POD, REMOTE


def pod(name, node, addresses, **labels):
    return msgspec.convert(
        {
            "metadata": {"name": name, "namespace": "x", "labels": labels},
            "spec": {"nodeName": node},
            "status": {"phase": "Running", "podIPs": [{"ip": ip} for ip in addresses.values()]},
        },
        Pod,
    )


def policy(name, spec, **annotations):
    metadata = {"name": name, "namespace": "x", "annotations": annotations}
    return msgspec.convert({"metadata": metadata, "spec": spec}, NetworkPolicy)


def populate(world):
    """Two pods here and one elsewhere, as the API would show them."""
    world.store, world.compiler = Store(), PolicyCompiler("node")
    for name, address in (("node", NODE), ("other", OUTSIDE)):
        status = {"addresses": [{"type": "InternalIP", "address": a} for a in address.values()]}
        world.store.put(msgspec.convert({"metadata": {"name": name}, "status": status}, Node))
    world.store.put(msgspec.convert({"metadata": {"name": "x"}}, Namespace))
    world.store.put(pod("one", "node", POD[1], app="web"))
    world.store.put(pod("two", "node", POD[2], app="client"))
    world.store.put(pod("far", "other", REMOTE, app="client"))
    for number, name in ((1, "one"), (2, "two")):
        addresses = tuple(parse_address(text) for text in POD[number].values())
        world.compiler.attach(Attachment(("x", name), f"pod{number}", addresses))


def enforce(world, *policies):
    for key in list(world.store.all(NetworkPolicy)):
        world.store.remove(NetworkPolicy, key)
    for one in policies:
        world.store.put(one)
    table = world.compiler.update(world.store.take())
    world.part.apply(table)
    return table


CLOSED = {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"]}


class Node1:
    """The node's policies, as an agent holds them; `restart` forgets all that a process knows."""

    def __init__(self, world, programs=None):
        self.world = world
        self.start(programs)

    def start(self, programs=None):
        programs = programs or Programs(self.world.name, self.world.spaces["node"])
        self.part = PolicyPart(programs=programs)
        self.part.start()
        populate(self)
        self.reader = EventReader(self.part._programs)

    def stop(self):
        self.reader.close()
        self.part._programs.close()

    def enforce(self, *policies):
        self.table = enforce(self, *policies)

    def told(self):
        """The events that wait, as `podwire policy drops` has them."""
        return [
            policy_drops.refused(self.table, event, self.part.ruling(event.ruling))
            for event in self.reader.read()
        ]

    def counts(self):
        return {
            (c.verdict.value, c.direction.value, *(ref.name for ref in c.policies)): c.packets
            for c in self.part.counts()
            if c.packets
        }

    def lost(self):
        return self.part._programs.outcomes()["events_lost"]
