"""The overlay on eBPF: who sent a packet travels with it, and nobody may say so for another.

The node of `ebpf_world`, all of it on eBPF; `outside` is another node at the other end of the
tunnel, with a plain collect-metadata device and routes whose keys say what the test wants.
"""

import contextlib
import ipaddress
import socket
import struct

import msgspec
import pytest

from podwire.datapath.ebpf.nodes import NodesPart
from podwire.datapath.ebpf.overlay import OverlayPart
from podwire.datapath.ebpf.pods import EbpfPods
from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel import netns
from podwire.kube.objects import ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, Pod
from podwire.kube.store import Store
from podwire.net import Protocol, parse_address
from podwire.nodes import OVERLAY_DEVICES, OVERLAY_ID, OVERLAY_PORTS, RouteCompiler
from podwire.nodes.compiler import tunnel_mac
from podwire.policy import Attachment, Packet, PolicyCompiler, Verdict
from podwire.policy.tags import tag
from podwire.wiring.routes import NodeRoutes
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, OUTSIDE, POD, REMOTE, World

pytestmark = NEEDS_EBPF

OVERLAY_DEVICE = OVERLAY_DEVICES["vxlan"]
CLUSTER = "8f1c5a1e-0000-4000-8000-000000000001"
CIDRS = {"node": ("10.244.0.0/24", "fd44::/64"), "other": ("10.244.1.0/24", "fd44:1::/64")}
THIRD = {4: "10.244.2.5", 6: "fd44:2::5"}  # of a third node's pods
UNUSED = {4: "10.244.0.77", 6: "fd44::77"}  # of the node's own
INSIDE = {4: "10.244.0.0", 6: "fd44::"}  # the node's own address in the tunnel
STRANGER = {4: "192.168.9.66", 6: "fd09::66"}  # on the underlay, and no node
OTHER_INSIDE = {4: "10.244.1.0", 6: "fd44:1::"}
BITS = {4: 32, 6: 128}
CLIENT, OTHER = {"app": "client"}, {"app": "other"}
PORT = {"tcp": 80}


def tag_of(labels):
    return tag(CLUSTER, "x", labels, ())


def make_node(name, addresses, cidrs):
    status = {"addresses": [{"type": "InternalIP", "address": each} for each in addresses]}
    spec = {"podCIDRs": list(cidrs)}
    return msgspec.convert({"metadata": {"name": name}, "spec": spec, "status": status}, Node)


def make_pod(name, node, addresses, labels):
    return msgspec.convert(
        {
            "metadata": {"name": name, "namespace": "x", "labels": labels},
            "spec": {"nodeName": node},
            "status": {"phase": "Running", "podIPs": [{"ip": each} for each in addresses]},
        },
        Pod,
    )


def make_policy(peers, **spec):
    """Who may reach pod1."""
    spec = {"podSelector": {"matchLabels": CLIENT}, "ingress": [{"from": peers}], **spec}
    metadata = {"name": "some", "namespace": "x"}
    return msgspec.convert({"metadata": metadata, "spec": spec}, NetworkPolicy)


class Overlay(World):
    """All parts of the node, and the tunnel's other end. `underlay` is 4 or 6."""

    def __init__(self, underlay):
        super().__init__()
        self.underlay = underlay
        self.store = Store()
        self.programs = Programs(self.name, self.spaces["node"])
        self.routes = NodeRoutes(self.spaces["node"], guard=self.programs.sync_links)
        self._closing.callback(self.routes.close)
        self._closing.callback(self.programs.close)
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            self._set_up_node()
            self._set_up_other(underlay)
            undo.pop_all()

    def _set_up_node(self):
        self.programs.enable("services", "policy", "pods", "masquerade", "overlay")
        self.services = ServicesPart(programs=self.programs)
        self.policies = PolicyPart(programs=self.programs)
        self.tunnels = OverlayPart(programs=self.programs)
        self.nodes = NodesPart(self.programs)
        self._pods()
        self.route_compiler = RouteCompiler("node", "vxlan")
        self.policy_compiler = PolicyCompiler("node", overlay=True)

    def _set_up_other(self, underlay):
        system = {"metadata": {"name": "kube-system", "uid": CLUSTER}}
        for each in (system, {"metadata": {"name": "x"}}):
            self.store.put(msgspec.convert(each, Namespace))
        self.store.put(make_node("node", [NODE[underlay]], CIDRS["node"]))
        self.store.put(make_node("other", [OUTSIDE[underlay]], CIDRS["other"]))
        third = {4: "192.168.9.3", 6: "fd09::3"}[underlay]
        self.store.put(make_node("third", [third], ("10.244.2.0/24", "fd44:2::/64")))
        self.store.put(make_pod("one", "node", POD[1].values(), CLIENT))
        self.store.put(make_pod("two", "node", POD[2].values(), OTHER))
        for number, name in ((1, "one"), (2, "two")):
            addresses = tuple(map(parse_address, POD[number].values()))
            self.policy_compiler.attach(Attachment(("x", name), f"pod{number}", addresses))
        self.batch(
            self.spaces["outside"],
            f"link add {OVERLAY_DEVICE} address {tunnel_mac('other').hex(':')} mtu 1500 type vxlan "
            "external dstport 8472 nolearning udp6zerocsumrx",
            f"link set {OVERLAY_DEVICE} up",
            *(f"addr add {STRANGER[f]}/{BITS[f]} dev eth0" for f in (4, 6)),
            *(
                f"addr add {a[f]}/{BITS[f]} dev lo"
                for a in (THIRD, UNUSED, OTHER_INSIDE)
                for f in (4, 6)
            ),
            *(
                f"neigh add {INSIDE[f]} lladdr {tunnel_mac('node').hex(':')} dev {OVERLAY_DEVICE}"
                for f in (4, 6)
            ),
        )
        self.send_as(OVERLAY_ID)

    def _pods(self):
        pods = EbpfPods(self.programs)
        pods.start()
        pods.replace(self.pod_link(n) for n in (1, 2))

    def send_as(self, tag, *, outer=OUTSIDE):
        """What the other node says of what it sends from now on."""
        remote, local = NODE[self.underlay], outer[self.underlay]
        encap = "ip" if self.underlay == 4 else "ip6"
        key = f"encap {encap} id {tag} dst {remote} src {local}"
        key += " csum" if self.underlay == 6 else ""
        self.batch(
            self.spaces["outside"],
            *(
                f"route replace {to} {key} {via} dev {OVERLAY_DEVICE} src {REMOTE[f]}"
                for f, cidr in zip((4, 6), CIDRS["node"], strict=True)
                for to, via in ((INSIDE[f], ""), (cidr, f"via {INSIDE[f]} onlink"))
            ),
        )

    def apply(self):
        changes = self.store.take()
        table = self.route_compiler.update(changes)
        for part in (self.routes, self.tunnels, self.nodes):
            netns.call(self.spaces["node"], lambda part=part: part.apply(table))
        self.table = self.policy_compiler.update(changes)
        self.policies.apply(self.table)

    def allow(self, *peers):
        """Only these label sets reach pod1."""
        self.enforce(make_policy([{"podSelector": {"matchLabels": labels}} for labels in peers]))

    def enforce(self, *policies):
        """These policies and no others."""
        for kind in (NetworkPolicy, ClusterNetworkPolicy):
            for key in list(self.store.all(kind)):
                self.store.remove(kind, key)
        for each in policies:
            self.store.put(each)
        self.apply()

    def reaches(self, family, *, source=None, kind=socket.SOCK_STREAM):
        """Whether pod1 answers the other node's pod."""
        source = (source or REMOTE)[family]
        wait = 3 if source == REMOTE[family] else 0.3
        try:
            seen = self.ask("outside", POD[1][family], 80, kind, source=(source, 0), timeout=wait)
        except TimeoutError:
            return False
        assert seen == (POD[1][family], source)
        return True

    def refuses(self, family, **options):
        with pytest.raises(TimeoutError):
            self.ask(
                "outside", POD[1][family], 80, source=(REMOTE[family], 0), timeout=0.15, **options
            )

    @contextlib.contextmanager
    def captured(self, sender):
        """Outer source and tunnel id of what the node sends meanwhile for `sender`, an address.

        Others may still end what they did before.
        """
        found = []
        raw = netns.socket(self.spaces["outside"], socket.AF_PACKET, socket.SOCK_RAW, 0x0300)
        raw.setblocking(False)
        version = socket.AF_INET if self.underlay == 4 else socket.AF_INET6
        place = slice(26, 30) if self.underlay == 4 else slice(22, 38)
        udp = 34 if self.underlay == 4 else 54
        inner = ipaddress.ip_address(sender).packed
        at = udp + 16 + 14 + (12 if len(inner) == 4 else 8)  # behind UDP, VXLAN and Ethernet
        with raw:
            yield found
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = raw.recv(2048)
                    source = socket.inet_ntop(version, frame[place].ljust(place.stop - place.start))
                    to_tunnel = frame[udp + 2 : udp + 4] == struct.pack("!H", 8472)
                    from_it = frame[at : at + len(inner)] == inner
                    if to_tunnel and from_it and source != OUTSIDE[self.underlay]:
                        found.append((source, int.from_bytes(frame[udp + 12 : udp + 15], "big")))


@pytest.fixture(scope="module", params=[4, 6], ids=["over IPv4", "over IPv6"])
def world(request):
    with Overlay(request.param) as made:
        made.apply()
        for family in (4, 6):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                for space, addresses in (
                    ("pod1", POD[1]),
                    ("pod2", POD[2]),
                    ("outside", REMOTE),
                    ("outside", OTHER_INSIDE),
                ):
                    made.serve(space, addresses[family], 80, kind)
        for family in (4, 6):
            made.serve("pod1", POD[1][family], 81)
            made.serve("outside", REMOTE[family], 81)
            made.serve("pod1", POD[1][family], OVERLAY_PORTS["vxlan"], socket.SOCK_DGRAM)
        yield made


@pytest.fixture(autouse=True)
def plain(world):
    """Each test starts with an honest peer that says nothing, and no policy."""
    yield
    world.send_as(OVERLAY_ID)
    for key in [("x", "far"), ("x", "same")]:
        world.store.remove(Pod, key)
    world.enforce()


FAMILIES = pytest.mark.parametrize("family", [4, 6])


@FAMILIES
def test_pods_and_nodes_reach_each_other_and_say_who_they_are(world, family):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with world.captured(POD[1][family]) as seen:
            assert world.ask("pod1", REMOTE[family], 80, kind) == (REMOTE[family], POD[1][family])
        assert set(seen) == {(NODE[world.underlay], tag_of(CLIENT))}
        with world.captured(POD[2][family]) as seen:
            assert world.ask("pod2", REMOTE[family], 80, kind) == (REMOTE[family], POD[2][family])
        assert set(seen) == {(NODE[world.underlay], tag_of(OTHER))}
        with world.captured(INSIDE[family]) as seen:
            assert world.ask("node", REMOTE[family], 80, kind) == (REMOTE[family], INSIDE[family])
        assert set(seen) == {(NODE[world.underlay], OVERLAY_ID)}
        with world.captured(POD[1][family]) as seen:
            assert world.reaches(family, kind=kind)
        assert set(seen) == {(NODE[world.underlay], tag_of(CLIENT))}  # the answers


@FAMILIES
def test_a_sender_is_known_by_its_tag_before_its_address(world, family):
    world.allow(OTHER)  # of which pod2 is one, so that the identity is known here
    world.refuses(family)
    world.send_as(tag_of(OTHER))
    assert world.reaches(family)
    world.send_as(tag_of(CLIENT))
    world.refuses(family)
    world.send_as(tag_of({"app": "nobody here knows"}))
    world.refuses(family)


@FAMILIES
def test_a_tag_outweighs_what_is_remembered_of_the_address(world, family):
    """The address was a client's; its new owner is somebody else, which its own node knows."""
    world.store.put(make_pod("far", "other", REMOTE.values(), CLIENT))
    world.allow(CLIENT)
    assert world.reaches(family)  # as nodes on other data paths send: by the address
    world.send_as(tag_of(OTHER))
    world.refuses(family)
    world.send_as(tag_of(CLIENT))
    assert world.reaches(family)


def test_an_ambiguous_tag_says_nothing(world):
    """Two identities of the same labels, one of them in an ipBlock: the address decides."""
    world.store.put(make_pod("same", "third", THIRD.values(), OTHER))
    world.store.put(make_pod("far", "other", REMOTE.values(), OTHER))
    world.send_as(tag_of(OTHER))
    world.allow(OTHER)
    assert world.reaches(4)
    held = world.programs.growing["tags"].read()
    assert struct.pack("=I", tag_of(OTHER)) in held
    world.enforce(make_policy([{"ipBlock": {"cidr": "10.244.2.0/24"}}]))
    held = world.programs.growing["tags"].read()
    assert struct.pack("=I", tag_of(OTHER)) not in held
    assert struct.pack("=I", tag_of(CLIENT)) in held
    world.refuses(4)  # its address is not in the block


@FAMILIES
def test_a_policy_about_nodes_holds_for_their_addresses_inside(world, family):
    """Else a pod would get around it by the address that a node has in the tunnel."""
    spec = {
        "tier": "Admin",
        "priority": 1,
        "subject": {"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": CLIENT}}},
        "egress": [{"action": "Deny", "to": [{"nodes": {}}]}],
    }
    assert world.ask("pod1", OTHER_INSIDE[family], 80)
    deny = {"metadata": {"name": "nodes"}, "spec": spec}
    world.enforce(msgspec.convert(deny, ClusterNetworkPolicy))
    with pytest.raises(TimeoutError):
        world.ask("pod1", OTHER_INSIDE[family], 80, timeout=0.15)
    assert world.ask("pod1", REMOTE[family], 80)


SPECS = {
    "nobody": {"ingress": []},
    "by label": {"ingress": [{"from": [{"podSelector": {"matchLabels": OTHER}}]}]},
    "by namespace, one port": {
        "ingress": [{"from": [{"namespaceSelector": {}}], "ports": [{"port": 80}]}]
    },
    "by address, but not this one": {
        "ingress": [
            {"from": [{"ipBlock": {"cidr": "10.244.0.0/16", "except": [f"{REMOTE[4]}/32"]}}]},
            {"from": [{"ipBlock": {"cidr": "fd44::/16", "except": [f"{REMOTE[6]}/128"]}}]},
        ]
    },
    "to one port": {
        "egress": [{"to": [{"podSelector": {"matchLabels": OTHER}}], "ports": [{"port": 81}]}],
        "policyTypes": ["Egress"],
    },
}


@pytest.mark.parametrize("name", list(SPECS))
def test_what_connects_is_what_the_evaluator_says(world, name):
    world.store.put(make_pod("far", "other", REMOTE.values(), OTHER))
    world.enforce(make_policy([], **SPECS[name]))
    world.send_as(tag_of(OTHER))
    table = world.table
    for family in (4, 6):
        here, far = POD[1][family], REMOTE[family]
        for space, source, target in (("pod1", here, far), ("outside", far, here)):
            for port in (80, 81):
                ends = parse_address(source), parse_address(target)
                judged = table.judge(Packet(*ends, Protocol.TCP, port))
                end = judged.egress if space == "pod1" else judged.ingress
                allowed = end.verdict is not Verdict.DENY
                try:
                    wait = 3 if allowed else 0.1
                    seen = world.ask(space, target, port, source=(source, 0), timeout=wait)
                except TimeoutError:
                    seen = None
                assert seen == ((target, source) if allowed else None), (source, target, port)


@FAMILIES
def test_only_nodes_send_and_each_only_for_its_own_pods(world, family):
    assert world.reaches(family)
    spoofed = world.programs.outcomes()["spoofed"]
    assert not world.reaches(family, source=THIRD)  # another node's pod
    assert not world.reaches(family, source=UNUSED)
    world.send_as(tag_of(OTHER), outer=STRANGER)
    world.refuses(family)
    assert world.programs.outcomes()["spoofed"] >= spoofed + 2


def test_a_pod_does_not_reach_the_other_end_of_the_tunnel(world):
    """Masqueraded, it would be taken for its node, which may say who sent what."""
    before = world.programs.outcomes()["spoofed"]
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[world.underlay]
    with netns.socket(world.spaces["pod1"], family, socket.SOCK_DGRAM) as client:
        for port in OVERLAY_PORTS.values():
            client.sendto(b"x" * 50, (OUTSIDE[world.underlay], port))
    assert world.programs.outcomes()["spoofed"] == before + 2


@FAMILIES
def test_pods_may_use_the_tunnels_port_and_policies_hold_there(world, family):
    port, kind = OVERLAY_PORTS["vxlan"], socket.SOCK_DGRAM
    here, far = POD[1][family], REMOTE[family]
    assert world.ask("pod2", here, port, kind) == (here, POD[2][family])
    assert world.ask("outside", here, port, kind, source=(far, 0)) == (here, far)
    world.allow(OTHER)
    with pytest.raises(TimeoutError):
        world.ask("outside", here, port, kind, source=(far, 0), timeout=0.15)


@FAMILIES
def test_services_lead_into_the_tunnel(world, family):
    both = {"family": family, "protocol": Protocol.TCP}
    table = make_table([make_port("far", 80, [REMOTE[family]], **both)])
    netns.call(world.spaces["node"], lambda: world.services.apply(table))
    try:
        far = REMOTE[family]
        assert world.ask("pod1", VIP[family], 80) == (far, POD[1][family])
        assert world.ask("node", VIP[family], 80) == (far, INSIDE[family])
        # from outside the cluster, to a port of the node: with its address inside, for the answers
        client = (OUTSIDE[family], 0)
        with world.captured(INSIDE[family]) as seen:
            assert world.ask("outside", NODE[family], 30080, source=client) == (far, INSIDE[family])
        assert set(seen) == {(NODE[world.underlay], OVERLAY_ID)}
    finally:
        netns.call(world.spaces["node"], lambda: world.services.apply(make_table([])))


@FAMILIES
def test_errors_come_back_through_the_tunnel(world, family):
    with pytest.raises(ConnectionRefusedError):
        world.ask("pod1", REMOTE[family], 9, socket.SOCK_DGRAM)
    with pytest.raises(ConnectionRefusedError):
        world.ask("pod1", REMOTE[family], 9)


@FAMILIES
def test_what_is_too_big_for_the_tunnel_is_told(world, family):
    """The pod's link carries 1,500 bytes, the tunnel 50 or 70 less: the pod learns it."""
    world.run(world.spaces["pod1"], "ip", f"-{family}", "route", "flush", "cache")
    head, largest = (28, 1450) if family == 4 else (48, 1450)
    if world.underlay == 6:
        largest -= 20
    ping = ["ping", "-Mdo", "-c1", "-W1", REMOTE[family], "-s"]
    fits = netns.run(world.spaces["pod1"], [*ping, str(largest - head)])
    assert " 0% packet loss" in fits.stdout, fits.stdout
    refused = netns.run(world.spaces["pod1"], [*ping, str(largest - head + 1)])
    assert f"mtu={largest}" in refused.stdout + refused.stderr or (
        f"mtu = {largest}" in refused.stdout
    ), refused.stdout
    world.echo("outside", REMOTE[family], 8100 + family)
    with netns.socket(
        world.spaces["pod1"], socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_STREAM
    ) as stream:
        stream.settimeout(5)
        stream.connect((REMOTE[family], 8100 + family))
        stream.sendall(bytes(100_000))
        left = 100_000
        while left:
            left -= len(stream.recv(65536))


def test_what_somebody_changed_is_repaired(world):
    assert [part.verify() for part in (world.tunnels, world.policies)] == [[], []]
    tunnels, tags = (world.programs.growing[name] for name in ("tunnels", "tags"))
    tunnels.map.delete(next(iter(tunnels.read())))
    tags.map.delete(next(iter(tags.read())))
    assert world.tunnels.verify() == ["1 entries of map tunnels"]
    assert world.policies.verify() == ["1 entries of map tags"]


def test_a_device_that_comes_back_is_guarded_before_it_goes_up(world):
    world.run(world.spaces["node"], "ip", "link", "del", OVERLAY_DEVICE)
    assert world.routes.verify()
    links = world.programs.attachments()
    index = world.ifindex(OVERLAY_DEVICE)
    assert f"from_overlay-{index}-ingress" in links
    assert f"to_overlay-{index}-egress" in links
    assert world.reaches(4)
    world.send_as(OVERLAY_ID, outer=STRANGER)
    world.refuses(4)
