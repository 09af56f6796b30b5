"""What eBPF tells of policies: who denied, how often, also after a flood and a restart."""

import socket
import time

import pytest

from podwire.datapath.ebpf.events import EVENTS_PER_SECOND
from podwire.datapath.ebpf.layout import Reason
from podwire.kernel import netns
from podwire.net import Protocol, format_address
from tests.kernel.ebpf_policies import CLOSED, Node1, policy
from tests.kernel.ebpf_world import NEEDS_EBPF, POD, World

pytestmark = NEEDS_EBPF

OPEN_80 = {**CLOSED, "ingress": [{"ports": [{"port": 80}]}]}
CAGED = {"podSelector": {"matchLabels": {"app": "client"}}, "policyTypes": ["Egress"]}


@pytest.fixture(scope="module")
def world():
    with World() as made:
        made.serve("pod1", POD[1][4], 80)
        yield made


@pytest.fixture
def node(world):
    made = Node1(world)
    made.reader.read()
    yield made
    made.reader.close()
    made.part.cleanup()


def knock(world, port, connects=False):
    seen = world.observe("pod2", POD[1][4], port, tries=1, timeout=3 if connects else 0.1)
    assert (seen == {(POD[1][4], POD[2][4])}) is connects


def flood(world, count, port=9):
    with netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_DGRAM) as client:
        for _ in range(count):
            client.sendto(b"x", (POD[1][4], port))


def test_a_denial_names_policy_rule_and_ends(world, node):
    node.enforce(policy("closed", CLOSED))
    knock(world, 80)
    (drop,) = node.told()
    assert drop | {"time": 0, "source_port": 0} == {
        "time": 0,
        "verdict": "deny",
        "source": POD[2][4],
        "source_port": 0,
        "source_name": "x/two",
        "destination": POD[1][4],
        "destination_name": "x/one",
        "protocol": "TCP",
        "port": 80,
        "direction": "ingress",
        "policies": ["NetworkPolicy x/closed"],
        "reason": "ingress denied: no rule of NetworkPolicy x/closed allows it",
    }
    assert node.counts() == {("deny", "ingress", "closed"): 1}


def test_audit_passes_and_is_told(world, node):
    node.enforce(policy("closed", CLOSED, **{"podwire.dev/audit": "true"}))
    knock(world, 80, connects=True)
    (drop,) = node.told()
    assert (drop["verdict"], drop["policies"]) == ("audit", ["NetworkPolicy x/closed"])
    assert node.counts() == {("audit", "ingress", "closed"): 1}


def test_what_is_allowed_is_counted_by_the_policy_that_allows(world, node):
    node.enforce(policy("web", OPEN_80))
    for _ in range(3):
        knock(world, 80, connects=True)
    assert node.counts() == {("allow", "ingress", "web"): 3}
    assert node.told() == []


def test_a_flood_is_told_in_part_and_counted_whole(world, node):
    node.enforce(policy("caged", CAGED))
    before, began = node.lost(), time.monotonic()
    flood(world, 1000)
    seconds = int(time.monotonic() - began) + 2  # of the clock, begun ones too
    told = node.told()
    assert node.counts() == {("deny", "egress", "caged"): 1000}
    assert 0 < len(told) <= seconds * EVENTS_PER_SECOND
    assert {drop["direction"] for drop in told} == {"egress"}
    assert len(told) + node.lost() - before == 1000


def test_no_process_blames_the_wrong_policy_for_what_an_earlier_one_did(world, node):
    node.enforce(policy("a", CLOSED), policy("b", CAGED))
    flood(world, 3)
    node.stop()  # with the events in the ring
    node.start()
    # other names before, so that whoever numbers in order would number otherwise
    node.enforce(policy("0", OPEN_80), policy("b", CAGED))
    told = node.told()
    assert [drop["policies"] for drop in told] == [["NetworkPolicy x/b"]] * 3
    assert node.counts() == {("deny", "egress", "b"): 3}, "counts go on, those of the gone go"
    node.enforce(policy("c", CAGED))
    flood(world, 1)
    assert node.counts() == {("deny", "egress", "c"): 1}


def test_what_a_policy_that_is_gone_did_is_blamed_on_nobody(world, node):
    node.enforce(policy("closed", CLOSED))
    flood(world, 1)
    node.enforce()
    (drop,) = node.told()
    assert (drop["verdict"], drop["policies"]) == ("deny", [])
    assert drop["reason"] == "the policies have changed since"


def test_other_refusals_are_told_with_their_flow(world, node):
    node.enforce()
    spoofed = "10.244.0.78"
    world.batch(world.spaces["pod2"], f"addr add {spoofed}/32 dev eth0")
    with netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind((spoofed, 5555))
        client.sendto(b"x", (POD[1][4], 9))
    world.batch(world.spaces["pod2"], f"addr del {spoofed}/32 dev eth0")
    (event,) = [e for e in node.reader.read() if e.reason is Reason.SPOOFED]
    assert (format_address(event.flow.source), event.flow.source_port) == (spoofed, 5555)
    assert (event.ifindex, event.flow.protocol) == (world.ifindex("pod2"), Protocol.UDP)


def test_a_reader_goes_on_when_programs_are_replaced(world, node):
    node.enforce(policy("closed", CLOSED))
    node.part._programs.reload()
    flood(world, 1)
    assert node.reader._ring.wait(2)
    assert len(node.told()) == 1
