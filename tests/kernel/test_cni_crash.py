"""SIGKILL at any moment: no address, link or rule is leaked, and no confirmed pod is lost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from podwire.cni.plan import NodeConfig
from podwire.datapath.nftables.spoof import TABLE
from podwire.kernel import link, neighbour, netns
from podwire.kernel.netlink import NetlinkSocket
from podwire.kernel.nftables import BRIDGE, NfTables, Set
from podwire.net import parse_prefix
from podwire.wiring import KERNEL_PROTOCOL, veth
from tests.conformance.cni_node import Namespace, Node

ROUNDS = 200
PODS = 12
CONFIG = json.dumps({"cniVersion": "1.1.0", "name": "net", "type": "podwire"})
DEFAULTS = NodeConfig(pod_cidrs=(parse_prefix("10.77.0.0/24"),), default_gateway=True, hairpin=True)


class World:
    """A node whose server dies a lot, and what its runtime was told about each pod."""

    def __init__(self) -> None:
        self.node = Node(lambda: DEFAULTS, guarded=True)
        self.pods = [Namespace(f"pod{i}") for i in range(PODS)]
        self.generation = [0] * PODS
        self.confirmed: dict[int, dict[str, Any]] = {}
        self.sock = NetlinkSocket(netns_fd=self.node.namespace.fd)
        self.nft = NfTables(self.node.namespace.fd)

    def close(self) -> None:
        self.sock.close()
        self.nft.close()
        self.node.close()
        for pod in self.pods:
            pod.close()

    def begin(self, command: str, index: int) -> subprocess.Popen[str]:
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"c{index}-{self.generation[index]}",
            "CNI_NETNS": self.pods[index].path,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(self.node.plugins),
            "PODWIRE_CNI_SOCKET": str(self.node.socket),
        }
        with netns.entered(self.node.namespace.fd):
            shim = subprocess.Popen(
                [self.node.plugins / "podwire"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert shim.stdin
        shim.stdin.write(CONFIG)
        shim.stdin.close()
        return shim

    def finish(self, shim: subprocess.Popen[str]) -> tuple[int, str]:
        assert shim.stdout
        output = shim.stdout.read()
        shim.stdout.close()
        return shim.wait(timeout=30), output

    def host_ends(self) -> set[str]:
        pairs = link.dump(self.sock, kind="veth")
        return {each.name for each in pairs if veth.is_host_ifname(each.name)}

    def going(self) -> set[str]:
        state = self.node.state()
        try:
            return {name for _, name in state.removals()}
        finally:
            state.close()

    def recorded(self) -> dict[str, list[str]]:
        state = self.node.state()
        try:
            return {
                known.host_ifname: [each.address for each in known.addresses]
                for known in state.attachments()
            }
        finally:
            state.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    try:
        yield made
    finally:
        made.close()


@pytest.mark.timeout(180)
def test_killed_at_random_points(world: World) -> None:
    dice = random.Random(os.environ.get("PODWIRE_SEED", "7"))
    world.node.start()
    for _ in range(ROUNDS):
        index = dice.randrange(PODS)
        command = "DEL" if index in world.confirmed else "ADD"
        shim = world.begin(command, index)
        deadly = dice.random() < 0.7
        if deadly:
            time.sleep(dice.uniform(0, 0.006))
            world.node.kill()
        status, output = world.finish(shim)
        if deadly:
            world.node.start()
            # The kernel holds what is recorded and what a DEL left to the start had silenced.
            recorded, going = set(world.recorded()), world.going()
            assert recorded <= world.host_ends() <= recorded | going
        _learn(world, command, index, status, output)
        _confirmed_pods_are_there(world)
    for index in list(world.confirmed):
        assert world.finish(world.begin("DEL", index)) == (0, "")
    world.node.stop()
    world.node.start()
    _nothing_is_left(world)


def _learn(world: World, command: str, index: int, status: int, output: str) -> None:
    """What a runtime makes of an answer: only an ADD that was confirmed is a pod."""
    if command == "ADD" and status == 0:
        world.confirmed[index] = json.loads(output)
    elif command == "ADD":
        assert json.loads(output)["code"] == 11
        assert world.finish(world.begin("DEL", index)) == (0, "")
        _renew(world, index)
    else:
        known = world.confirmed.pop(index)
        if status:  # tried again, as the kubelet does
            assert json.loads(output)["code"] == 11
            assert world.finish(world.begin("DEL", index)) == (0, "")
        name = known["interfaces"][1]["name"]
        assert name not in world.recorded()
        _renew(world, index)


def _renew(world: World, index: int) -> None:
    """The sandbox ends, the next one is another."""
    world.pods[index].close()
    world.pods[index] = Namespace(f"pod{index}")
    world.generation[index] += 1


def _confirmed_pods_are_there(world: World) -> None:
    ends, recorded = world.host_ends(), world.recorded()
    names = {result["interfaces"][1]["name"] for result in world.confirmed.values()}
    assert names <= ends
    assert names <= set(recorded)
    given = [address for name in recorded for address in recorded[name]]
    assert len(given) == len(set(given))


def _nothing_is_left(world: World) -> None:
    assert world.host_ends() == set()
    assert world.recorded() == {}
    strays = [each for each in neighbour.dump(world.sock) if each.protocol == KERNEL_PROTOCOL]
    assert strays == []
    for name in ("ports", "macs", "ipv4", "ipv6"):
        assert world.nft.elements(Set(BRIDGE, TABLE, name)) == []
    assert [each.name for each in link.dump(world.sock)] == ["lo", "cni0"]


def test_del_without_an_agent_is_worked_off_by_the_next(world: World) -> None:
    world.node.start()
    status, output = world.finish(world.begin("ADD", 0))
    assert status == 0, output
    world.node.kill()
    assert world.finish(world.begin("DEL", 0)) == (0, "")
    assert world.finish(world.begin("DEL", 1)) == (0, "")
    assert len(world.recorded()) == 1
    world.node.start()
    assert world.recorded() == {}
    assert list((world.node.folder / "run" / "cni-deletes").iterdir()) == []
    status, output = world.finish(world.begin("ADD", 1))
    assert status == 0, output


def test_a_confirmed_pod_outlives_the_agent(world: World) -> None:
    world.node.start()
    first = world.finish(world.begin("ADD", 0))
    second = world.finish(world.begin("ADD", 1))
    world.node.kill()
    to = json.loads(second[1])["ips"][0]["address"].split("/")[0]
    ping = ["ping", "-c1", "-i0.2", "-w5", to]
    assert netns.run(world.pods[0].fd, ping, timeout_s=10).returncode == 0
    world.node.start()
    assert world.finish(world.begin("ADD", 0)) == first
    assert netns.run(world.pods[0].fd, ping, timeout_s=10).returncode == 0
