"""Whichever step of ADD fails, those before it are undone and nothing is left."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from podwire.cni.assembly import assemble
from podwire.cni.lifecycle import Lifecycle
from podwire.cni.plan import NodeConfig
from podwire.cni.protocol import TRY_AGAIN, CniError
from podwire.cni.server import CniServer
from podwire.cni.wire import Frame
from podwire.datapath.nftables.spoof import TABLE, SpoofGuard
from podwire.errors import KernelError
from podwire.ipam.state import State
from podwire.kernel import link, netns
from podwire.kernel.netlink import NetlinkSocket
from podwire.kernel.nftables import BRIDGE, NfTables, Set
from podwire.net import parse_prefix
from podwire.wiring.hostports import HostPortRules
from podwire.wiring.meters import Meters

CONFIG = {
    "cniVersion": "1.1.0",
    "name": "net",
    "type": "podwire",
    "ipMasq": True,
    "runtimeConfig": {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}],
        "bandwidth": {"egressRate": 8000000, "egressBurst": 800000},
    },
}
DEFAULTS = NodeConfig(pod_cidrs=(parse_prefix("10.79.0.0/24"),), default_gateway=True)


def refuse(*_: object, **__: object) -> Any:
    raise KernelError("cannot do it: the test refuses")


class World:
    def __init__(self, node: int, folder: Path) -> None:
        self.node = node
        self.state = State(folder / "podwire.db")
        self.guard = SpoofGuard(node)
        self.guard.start()
        self.admitted: Callable[[], None] = lambda: None
        with netns.entered(node):
            self.lifecycle: Lifecycle = assemble(
                self.state,
                node=lambda: DEFAULTS,
                guard=self.guard,
                admit=lambda _: self.admitted(),
            )
            self.server = CniServer(folder, self.lifecycle)

    def add(self, pod: int) -> tuple[int, dict[str, Any]]:
        environment = {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": "c1",
            "CNI_NETNS": "/run/netns/any",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/opt/cni/bin",
        }
        frame = Frame("podwire", environment, json.dumps(CONFIG).encode(), pod)
        with netns.entered(self.node):
            status, output = self.server.handle(frame)
        return status, json.loads(output)

    def left(self, pod: int) -> list[str]:
        """Links, records, addresses and elements of pods. The bridge is the node's and stays."""
        found: list[str] = []
        for fd in (self.node, pod):
            with NetlinkSocket(netns_fd=fd) as sock:
                found += [each.name for each in link.dump(sock) if each.kind not in ("", "bridge")]
        found += [str(known.key) for known in self.state.attachments()]
        with NfTables(self.node) as nft:
            found += [str(e.key) for e in nft.elements(Set(BRIDGE, TABLE, "ports"))]
        listed = netns.run(self.node, ["nft", "list", "ruleset"]).stdout
        return found + [line for line in listed.splitlines() if "10.79.0." in line]

    def close(self) -> None:
        self.lifecycle.stop()
        self.guard.close()
        self.state.close()


@pytest.fixture
def world(tmp_path: Path, make_netns: Callable[[], int]) -> Iterator[World]:
    made = World(make_netns(), tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (SpoofGuard, "bind"),
        (HostPortRules, "add"),
        (HostPortRules, "_forget_flows"),
        (Meters, "_shape_egress"),
        (State, "add"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_failed_step_undoes_the_others(
    owner: type,
    method: str,
    world: World,
    make_netns: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pod = make_netns()
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, refuse)
        status, error = world.add(pod)
        assert (status, error["code"]) == (1, 100)
        assert "the test refuses" in error["msg"]
    assert world.left(pod) == []
    status, result = world.add(pod)
    assert status == 0, result
    assert result["ips"][0]["gateway"] == "10.79.0.1"


def test_policies_that_are_not_in_place_keep_the_pod_out(
    world: World, make_netns: Callable[[], int]
) -> None:
    def not_yet() -> None:
        raise CniError(TRY_AGAIN, "the pod's policies are not in place")

    pod = make_netns()
    world.admitted = not_yet
    status, error = world.add(pod)
    assert (status, error["code"]) == (1, 11)
    assert world.left(pod) == []


def test_a_full_disk_is_a_reason_to_try_again(
    world: World, make_netns: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    pod = make_netns()
    with monkeypatch.context() as patch:
        patch.setattr(State, "add", full)
        status, error = world.add(pod)
    assert (status, error["code"]) == (1, 11)
    assert "disk is full" in error["msg"]
    assert world.left(pod) == []


def test_an_add_has_a_deadline(world: World, make_netns: Callable[[], int]) -> None:
    pod = make_netns()
    world.lifecycle._with.add_deadline_s = 0.0
    status, error = world.add(pod)
    assert (status, error["code"]) == (1, 11)
    assert "did not finish within 0 s" in error["msg"]
    assert world.left(pod) == []
