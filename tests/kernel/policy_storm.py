"""Policies, Services and pods change all the time while agents die and programs are replaced.

pod1 is a server, pod2 a client that every state of the world lets reach its port 80, pod3 a
stranger that none does, pod4 and pod5 come and go and are strangers, too. Nobody may reach port 81.
Every datagram is a flow of its own, so that each packet is judged.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import socket
import threading
import time

import msgspec

from podwire.datapath.ebpf.layout import Phase
from podwire.datapath.ebpf.pods import EbpfPods
from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel import netns
from podwire.kube.objects import Namespace, NetworkPolicy, Node, Pod
from podwire.kube.store import Store
from podwire.net import Protocol, parse_address
from podwire.policy import Attachment, PolicyCompiler
from tests.kernel.ebpf_agent import Talk
from tests.kernel.ebpf_policies import pod, policy
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import NODE, OUTSIDE, POD

OPEN, SHUT = 80, 81
PAUSE_S = 0.003  # or the agents would get none of the machine
APPS = {1: "web", 2: "client", 3: "stranger", 4: "guest", 5: "guest"}
STAYING = (1, 2, 3)
ON_80 = {"ports": [{"port": OPEN}, {"port": OPEN, "protocol": "UDP"}]}
UP_TO_80 = {
    "ports": [{"port": 8, "endPort": OPEN, "protocol": protocol} for protocol in ("TCP", "UDP")]
}
CLIENTS = {"podSelector": {"matchLabels": {"app": "client"}}}
NO_STRANGERS = {
    "namespaceSelector": {},
    "podSelector": {
        "matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["stranger", "guest"]}]
    },
}


def _blocks(*cidrs):
    return [{"ipBlock": {"cidr": cidr}} for cidr in cidrs]


BY_ADDRESS = _blocks(f"{POD[2][4]}/32", f"{POD[2][6]}/128")
CLIENT_RULES = [
    {"from": [CLIENTS], **ON_80},
    {"from": [CLIENTS], **UP_TO_80},
    {"from": [NO_STRANGERS], **ON_80},
    {"from": BY_ADDRESS, **UP_TO_80},
    {"from": [CLIENTS, *BY_ADDRESS], **ON_80},
]
OUTSIDE_RULES = [
    {"from": _blocks(f"{OUTSIDE[4]}/32", f"{OUTSIDE[6]}/128"), **ON_80},
    {"from": _blocks("192.168.0.0/16", "fd09::/16"), **UP_TO_80},
    {"from": _blocks("128.0.0.0/1", "fd08::/14"), **ON_80},
]
EGRESS_RULES = [{}, {"to": [{"podSelector": {"matchLabels": {"app": "web"}}}]}]


def _of_web(*rules):
    selector = {"podSelector": {"matchLabels": {"app": "web"}}}
    return selector | {"policyTypes": ["Ingress"], "ingress": list(rules)}


class Scene:
    """What the API says at one time: it follows from the number alone."""

    def __init__(self, number):
        dice = random.Random(number)
        client, outside = dice.choice(CLIENT_RULES), dice.choice(OUTSIDE_RULES)
        if dice.random() < 0.5:
            specs = {"web": _of_web(client, outside)}
        else:
            specs = {"web-a": _of_web(client), "web-b": _of_web(outside)}
        if dice.random() < 0.3:
            rule = dice.choice(EGRESS_RULES)
            specs["clients"] = CLIENTS | {"policyTypes": ["Egress"], "egress": [rule]}
        for other in range(dice.choice((0, 2, 8))):
            some = _blocks(*(f"172.{16 + other}.{dice.randrange(256)}.0/24" for _ in range(9)))
            specs[f"more-{other}"] = _of_web({"from": some, "ports": [{"port": 90 + other}]})
        if dice.random() < 0.1:  # more than the maps have room for at first
            many = _blocks(*(f"172.30.{n >> 8}.{n & 255}/32" for n in range(0, 1500, 2)))
            specs["many"] = _of_web({"from": many, "ports": [{"port": 99}]})
        self.policies = specs
        self.pods = [*STAYING, *(n for n in APPS if n not in STAYING and dice.random() < 0.5)]
        self.labels = {n: {"app": app, "v": str(dice.randrange(3))} for n, app in APPS.items()}
        self.services = dice.choice((0, 5, 20, 110))

    def ports(self):
        """The Service of the test, and others."""
        both = itertools.product((4, 6), (Protocol.TCP, Protocol.UDP))
        for family, protocol in both:
            end = {"family": family, "protocol": protocol}
            yield make_port(f"web{family}{protocol}", OPEN, [POD[1][family]], **end)
            for n in range(self.services):
                yield make_port(f"{n}-{family}{protocol}", 1000 + n, [POD[3][family]], **end)


class Agent:
    """The parts in the order in which an agent has them, over whatever is there."""

    def __init__(self, world, number):
        self.world, self.scene = world, Scene(number)
        self.programs = Programs(world.name, world.spaces["node"])
        self.programs.enable("services", "policy", "pods", "masquerade", attach=False)
        self.services = ServicesPart(programs=self.programs)
        self.policy = PolicyPart(programs=self.programs)
        self.pods = EbpfPods(self.programs)
        self.store, self.compiler = Store(), PolicyCompiler("node")
        self.links = {n: world.ifindex(f"pod{n}") for n in APPS}
        addresses = [{"type": "InternalIP", "address": text} for text in NODE.values()]
        status = {"addresses": addresses}
        self.store.put(msgspec.convert({"metadata": {"name": "node"}, "status": status}, Node))
        self.store.put(msgspec.convert({"metadata": {"name": "x"}}, Namespace))
        for part in (self.services, self.policy, self.pods):
            part.start()
        # in another order each time, so that rule sets and identities get other numbers
        order = random.Random(number).sample(self.scene.pods, len(self.scene.pods))
        self.pods.replace(self._link(n) for n in order)
        for n in order:
            self._attach(n)
        self._tell(self.scene)
        if self.programs.phase is not Phase.SERVING:
            self.programs.attach(Phase.SERVING)

    def _link(self, n):
        return self.world.pod_link(n, with_sockets=True)

    def _attach(self, n):
        addresses = tuple(parse_address(text) for text in POD[n].values())
        self.compiler.attach(Attachment(("x", f"p{n}"), f"pod{n}", addresses))

    def _tell(self, scene):
        names = {("x", name) for name in scene.policies}
        for key in list(self.store.all(NetworkPolicy)):
            if key not in names:
                self.store.remove(NetworkPolicy, key)
        for n in APPS:
            if n in scene.pods:
                self.store.put(pod(f"p{n}", "node", POD[n], **scene.labels[n]))
            elif ("x", f"p{n}") in self.store.all(Pod):
                self.store.remove(Pod, ("x", f"p{n}"))
        for name, spec in scene.policies.items():
            self.store.put(policy(name, spec))
        self.services.apply(make_table(scene.ports()))
        self._enforce()

    def _enforce(self):
        self.policy.apply(self.compiler.update(self.store.take()))

    def change(self, number):
        """To another scene, pods as CNI ADD and DEL have it."""
        before, self.scene = self.scene, Scene(number)
        for n in set(before.pods) - set(self.scene.pods):
            self.pods.remove(self.links[n])
            self.compiler.detach(("x", f"p{n}"))
            self._enforce()
        self._tell(self.scene)
        for n in set(self.scene.pods) - set(before.pods):
            self.pods.add(self._link(n))
            self._attach(n)
            self._enforce()
        if number % 3:  # else the next change comes before the loop's flush
            self.policy.flush()
            self.services.flush()


class Server:
    """pod1's ports; `breaches` are what should not have come, `heard` counts what came."""

    def __init__(self, world):
        self.breaches, self.heard = [], 0
        self.stopped = threading.Event()
        self._strangers = {POD[n][family] for n in (3, 4, 5) for family in (4, 6)}
        self._threads = []
        for family, port in itertools.product((4, 6), (OPEN, SHUT)):
            kind = socket.AF_INET6 if family == 6 else socket.AF_INET
            one = netns.socket(world.spaces["pod1"], kind, socket.SOCK_DGRAM)
            one.settimeout(0.2)
            one.bind((POD[1][family], port))
            thread = threading.Thread(target=self._serve, args=(one, port), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, one, port):
        with one:
            while not self.stopped.is_set():
                with contextlib.suppress(TimeoutError):
                    data, peer = one.recvfrom(100)
                    self.heard += 1
                    if port == SHUT or peer[0] in self._strangers:
                        self.breaches.append((peer[0], port))
                    one.sendto(data, peer)

    def close(self):
        self.stopped.set()
        for thread in self._threads:
            thread.join()


class Probe(threading.Thread):
    """One datagram after the other, each from a port of its own; `lost` got no answer.

    What may have been lost because a CPU of the machine had too much to do, as it is in a flood
    elsewhere, says nothing.
    """

    def __init__(self, world, space, targets, answered):
        super().__init__(name=space, daemon=True)
        self._fd, self._targets, self._answered = world.spaces[space], targets, answered
        self.stopped, self.sent, self.lost, self.failure = threading.Event(), 0, [], None

    def run(self):
        try:
            for target in itertools.cycle(self._targets):
                if self.stopped.is_set():
                    return
                self._send(target)
        except Exception as error:
            self.failure = repr(error)

    def _send(self, target):
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        overrun = _overrun()
        with netns.socket(self._fd, family, socket.SOCK_DGRAM) as one:
            one.sendto(b"?", target)
            self.sent += 1
            if self._answered:
                one.settimeout(5)  # long after the slowest answer: what does not come is lost
                try:
                    one.recv(10)
                except TimeoutError:
                    if _overrun() == overrun:
                        self.lost.append(target)
        time.sleep(PAUSE_S)


def _overrun():
    """Packets that a CPU's backlog had no room for; all namespaces share them."""
    with open("/proc/net/softnet_stat") as file:
        return sum(int(line.split()[1], 16) for line in file)


def _both(addresses, port):
    return [(addresses[family], port) for family in (4, 6)]


class Storm:
    """Traffic, and the agents under it. `seen` sums it up."""

    def __init__(self, world):
        self._world = world
        self._number = multiprocessing.RawValue("I", 0)
        self.replaced = multiprocessing.RawValue("I", 0)
        self.killed = 0

    def run(self, restarts, replacements, seed=0):
        """Raises AssertionError when a packet fared as it must not."""
        self._number.value = seed
        world = self._world
        for family in (4, 6):
            world.echo("pod1", POD[1][family], OPEN)
        began = time.monotonic()
        Agent(world, self._number.value).programs.close()
        typical = time.monotonic() - began
        server = Server(world)
        self.talks = [
            Talk(world, space, target, PAUSE_S)
            for space, target in (
                *(("pod2", target) for target in _both(VIP, OPEN)),
                *(("pod2", target) for target in _both(POD[1], OPEN)),
                ("outside", (NODE[4], 30000 + OPEN)),
                ("outside", (NODE[6], 30000 + OPEN)),
            )
        ]
        served, shut = [*_both(POD[1], OPEN), *_both(VIP, OPEN)], _both(POD[1], SHUT)
        self.allowed = [
            Probe(world, "pod2", served, True),
            Probe(world, "outside", _both(NODE, 30000 + OPEN), True),
        ]
        self.denied = [
            Probe(world, "pod3", served + shut, False),
            Probe(world, "pod4", served, False),
            Probe(world, "pod2", shut, False),
            Probe(world, "outside", shut, False),
        ]
        threads = [*self.talks, *self.allowed, *self.denied]
        for one in threads:
            one.start()
        try:
            dice = random.Random(seed)
            for _ in range(restarts):
                self._live(dice.random() * 2 * typical)
            self._replace(replacements)
        finally:
            for one in threads:
                one.stopped.set()
            for one in threads:
                one.join(timeout=10)
            server.close()
        self.changes = self._number.value - seed
        assert [one.failure for one in threads] == [None] * len(threads)
        assert [one.lost for one in self.allowed] == [[], []]
        assert server.breaches == []
        assert server.heard >= sum(one.sent for one in self.allowed)

    def _live(self, seconds):
        """An agent that changes things as long as it lives."""
        child = os.fork()
        if child == 0:
            try:
                agent = Agent(self._world, self._number.value)
                while True:
                    self._number.value += 1
                    agent.change(self._number.value)
            finally:
                os._exit(1)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, "the agent failed"
        self.killed += 1

    def _replace(self, replacements):
        """Programs are replaced between changes, and the last agent finds all as it should be."""
        agent = Agent(self._world, self._number.value)
        for _ in range(replacements):
            for _ in range(3):
                self._number.value += 1
                agent.change(self._number.value)
            agent.programs.reload()
            self.replaced.value += 1
        assert agent.policy.verify() == []
        assert agent.services.verify() == []
        agent.programs.close()
