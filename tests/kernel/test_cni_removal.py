"""Links of deleted pods go in the background, and never a living one's."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from podwire.cni.plan import NodeConfig
from podwire.datapath.nftables.spoof import TABLE
from podwire.kernel import netns
from podwire.kernel.nftables import BRIDGE, NfTables, Set
from podwire.net import parse_prefix
from tests.conformance.cni_live import Live
from tests.conformance.cni_node import Namespace, Node

CONFIG = json.dumps({"cniVersion": "1.1.0", "name": "net", "type": "podwire"})
DEFAULTS = NodeConfig(pod_cidrs=(parse_prefix("10.78.0.0/24"),), default_gateway=True)


@pytest.fixture
def node() -> Iterator[Node]:
    with Node(lambda: DEFAULTS, guarded=True) as made:
        made.start()
        yield made


@pytest.fixture
def pods() -> Iterator[list[Namespace]]:
    made = [Namespace("pod"), Namespace("pod")]
    try:
        yield made
    finally:
        for each in made:
            each.close()


def call(node: Node, command: str, pod: Namespace, container: str) -> str:
    environment = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": pod.path,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(node.plugins),
    }
    done = node.call("podwire", environment, CONFIG)
    assert done.returncode == 0, done.stdout
    return done.stdout


def nothing_waits(node: Node) -> None:
    state = node.state()
    deadline = time.monotonic() + 10
    while state.removals():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    state.close()


def gateway_answers(pod: Namespace, within_s: int = 10) -> bool:
    # With -w ping goes on until one is answered: a port that comes up may lose the first.
    ping = ["ping", "-c1", "-i0.2", f"-w{within_s}", "10.78.0.1"]
    return netns.run(pod.fd, ping, timeout_s=2 * within_s).returncode == 0


@pytest.mark.parametrize(("again", "fresh"), [("same", False), ("other", False), ("same", True)])
def test_a_new_link_outlives_the_removal_of_the_old_one(
    node: Node, pods: list[Namespace], again: str, fresh: bool
) -> None:
    call(node, "ADD", pods[0], "same")
    call(node, "DEL", pods[0], "same")
    pod = pods[fresh]
    result = json.loads(call(node, "ADD", pod, again))
    nothing_waits(node)
    assert gateway_answers(pod)
    name = result["interfaces"][1]["name"]
    assert Live(node.namespace).link(name)
    with NfTables(node.namespace.fd) as nft:
        ports = [
            each.key.rstrip(b"\0").decode() for each in nft.elements(Set(BRIDGE, TABLE, "ports"))
        ]
    assert ports == [name]


def test_a_deleted_pod_is_cut_off_at_once_and_its_link_goes_later(
    node: Node, pods: list[Namespace]
) -> None:
    pod = pods[0]
    call(node, "ADD", pod, "c")
    assert gateway_answers(pod)
    call(node, "DEL", pod, "c")
    assert not gateway_answers(pod, within_s=1)
    nothing_waits(node)
    assert [each["ifname"] for each in Live(node.namespace).links] == ["lo", "cni0"]
    assert [each["ifname"] for each in Live(pod).links] == ["lo"]
