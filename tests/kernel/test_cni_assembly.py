"""CNI on a node of our own: routed pods from the host's pool, bridged pods behind the guard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from podwire.cni.assembly import assemble
from podwire.cni.lifecycle import Lifecycle
from podwire.cni.plan import NodeConfig
from podwire.cni.protocol import Call, parse_call
from podwire.datapath.nftables.spoof import SpoofGuard
from podwire.ipam.state import State
from podwire.kernel import address, netns, rule
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import parse_address, parse_prefix
from podwire.wiring.routed import RoutedWiring
from tests.conftest import present
from tests.traffic import udp_source

CIDRS = (parse_prefix("10.244.1.0/24"), parse_prefix("fd10::/64"))


class Runtime:
    """Calls the plugin as a container runtime does, without the program in between."""

    def __init__(self, node: int, state: State, wiring: str) -> None:
        self.node = node
        self.guard = SpoofGuard(node)
        self.guard.start()
        with netns.entered(node):
            self.lifecycle: Lifecycle = assemble(
                state,
                node=lambda: NodeConfig(pod_cidrs=CIDRS, wiring=wiring, default_gateway=True),
                guard=self.guard if wiring == "bridge" else None,
                wirings={"routed": RoutedWiring()},
            )

    def call(self, command: str, pod: str, fd: int, before: Any = None) -> Call:
        config = {"cniVersion": "1.1.0", "name": "podwire", "type": "podwire"}
        if before:
            config["prevResult"] = before
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"id-{pod}",
            "CNI_NETNS": "/run/netns/any",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/opt/cni/bin",
            "CNI_ARGS": f"K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};IgnoreUnknown=1",
        }
        return parse_call("podwire", environment, json.dumps(config).encode(), fd)

    def add(self, pod: str, fd: int) -> dict[str, Any]:
        with netns.entered(self.node):
            return self.lifecycle.add(self.call("ADD", pod, fd))

    def check(self, pod: str, fd: int, before: Any) -> None:
        with netns.entered(self.node):
            self.lifecycle.check(self.call("CHECK", pod, fd, before))

    def delete(self, pod: str, fd: int) -> None:
        with netns.entered(self.node):
            self.lifecycle.delete(self.call("DEL", pod, fd))

    def stop(self) -> None:
        self.lifecycle.stop()
        self.guard.close()


def addresses(result: dict[str, Any]) -> list[str]:
    return [each["address"].split("/")[0] for each in result["ips"]]


@pytest.mark.parametrize("wiring", ["routed", "bridge"])
def test_a_pods_life(wiring: str, tmp_path: Path, make_netns: Callable[[], int]) -> None:
    node, one, two = make_netns(), make_netns(), make_netns()
    state = State(tmp_path / "podwire.db")
    runtime = Runtime(node, state, wiring)
    try:
        first, second = runtime.add("one", one), runtime.add("two", two)
        assert runtime.add("one", one) == first
        for source, to in zip(addresses(first), addresses(second), strict=True):
            assert udp_source(one, two, to) == source
        runtime.check("one", one, first)
        host_end = first["interfaces"][-2]["name"]
        assert host_end.startswith("eni" if wiring == "routed" else "pw")
        _a_false_source_is_dropped(one, two, addresses(second)[0])
        runtime.delete("one", one)
        runtime.delete("one", one)
        assert udp_source(one, two, addresses(second)[0], wait_s=0.3) == ""
        # the agent starts anew and finds the other pod as it left it
        runtime.stop()
        runtime = Runtime(node, state, wiring)
        with netns.entered(node):
            runtime.lifecycle.reconcile()
        runtime.check("two", two, second)
        assert runtime.guard.verify() == []
        if wiring == "bridge":
            assert runtime.guard.status() == {"ports": 1}
        with NetlinkSocket(netns_fd=node) as sock:
            assert {each.priority for each in rule.dump(sock)} == {0, 32766, 32767}
    finally:
        runtime.stop()
        state.close()


def _a_false_source_is_dropped(pod: int, other: int, to: str) -> None:
    false = "10.244.1.77"
    with NetlinkSocket(netns_fd=pod) as sock:
        own = InterfaceAddress(present(sock, "eth0").index, parse_address(false), 32)
        sock.run(address.add(own))
        assert udp_source(pod, other, to, source=false, wait_s=0.3) == ""
        sock.run(address.delete(own))
