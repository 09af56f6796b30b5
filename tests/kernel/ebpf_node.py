"""All parts of one node, as an agent has them, for test runs."""

import contextlib

import msgspec

from podwire.datapath.ebpf.nodes import NodesPart
from podwire.datapath.ebpf.pods import EbpfPods
from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kube.objects import Namespace, NetworkPolicy
from podwire.kube.store import Store
from podwire.net import parse_address, parse_prefix
from podwire.nodes import RouteTable
from podwire.policy import Attachment, PolicyCompiler
from tests.kernel.ebpf_policies import pod
from tests.kernel.ebpf_runs import ENDS, make_frame, run_tcx
from tests.kernel.ebpf_services import make_port, make_table
from tests.kernel.ebpf_world import NODE, POD, UPLINK_MAC, World

CLIENT = {4: "198.51.100.9", 6: "fd51::9"}
ROOM = 65536  # for entries of connections
ISOLATED = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


class Node:
    """A world and all parts of its node, as an agent has them."""

    def __init__(self, world):
        self.world = world
        self.programs = Programs(
            world.name, world.spaces["node"], connections=ROOM, room={"connections": ROOM}
        )
        self.programs.enable("services", "policy", "pods", "masquerade")
        self.services = ServicesPart(programs=self.programs)
        self.policy = PolicyPart(programs=self.programs)
        self.pods = EbpfPods(self.programs)
        self.nodes = NodesPart(self.programs)
        self.services.apply(make_table([]))
        self.links = {n: world.pod_link(n) for n in (1, 2)}
        self.pods.replace(self.links.values())
        self.nodes.apply(
            RouteTable(
                "node",
                "direct",
                underlay=parse_address(NODE[4]),
                pod_prefixes=frozenset({parse_prefix("10.244.0.0/24"), parse_prefix("fd44::/64")}),
                cluster_prefixes=frozenset(
                    {parse_prefix("10.244.0.0/16"), parse_prefix("fd44::/16")}
                ),
            )
        )
        self.enforce()

    def serve(self, *ports):
        self.services.apply(make_table(ports))
        self.programs.connections.clear()

    def enforce(self, *specs):
        """These NetworkPolicies hold, for pods one and two of namespace x."""
        compiler, store = PolicyCompiler("node"), Store()
        store.put(msgspec.convert({"metadata": {"name": "x"}}, Namespace))
        for number, name in ((1, "one"), (2, "two")):
            store.put(pod(name, "node", POD[number], app=name))
            addresses = tuple(parse_address(text) for text in POD[number].values())
            compiler.attach(Attachment(("x", name), f"pod{number}", addresses))
        for number, spec in enumerate(specs):
            metadata = {"name": f"p{number}", "namespace": "x"}
            store.put(msgspec.convert({"metadata": metadata, "spec": spec}, NetworkPolicy))
        self.policy.apply(compiler.update(store.take()))
        self.programs.connections.clear()

    def run(self, packet, link="pod1", *, host_mac=None):
        """``(verdict, IP packet)`` of a packet that comes in by `link`; "": the node sends it."""
        host, peer = ENDS.get(link, UPLINK_MAC)
        name = {"pod": "from_pod", "": "from_node"}.get(link[:3], "from_network")
        return run_tcx(
            self.world.spaces["node"],
            self.programs.program(name),
            self.world.ifindex(link or "up0"),
            make_frame(packet, (host_mac or host, peer)),
        )

    def count(self, name):
        return self.programs.outcomes()[name]


@contextlib.contextmanager
def whole_node():
    """A node in a world of its own."""
    with World() as world:
        made = Node(world)
        yield made
        made.services.cleanup()


def service(node, family, protocol, backends, **fields):
    """The node serves one Service, on port 80."""
    node.serve(make_port("web", 80, backends, family=family, protocol=protocol, **fields))
