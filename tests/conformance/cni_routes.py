"""Cases of routes between nodes: three nodes on one segment, each kept by its routing Part.

What a case says of `each_node` holds on every node for every other one.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

from podwire.kernel.monitor import Group, Monitor
from podwire.kube.objects import Metadata, Node, NodeAddress, NodeSpec, NodeStatus
from podwire.kube.store import Store
from podwire.net import format_address
from podwire.nodes import OVERLAY_DEVICES, RouteCompiler
from podwire.nodes.table import RouteTable, Routing
from podwire.wiring.routes import NodeRoutes
from tests.conformance.cni_actions import Skip
from tests.conformance.cni_case import Case, fill
from tests.conformance.cni_live import Live
from tests.conformance.cni_node import Namespace
from tests.conformance.cni_state import state
from tests.conformance.cni_vocabulary import by_namespace

BASE_MTU = 1600
DEVICE = OVERLAY_DEVICES["vxlan"]
_GROUPS = [Group.LINK, Group.NEIGHBOUR, Group.IPV4_ROUTE, Group.IPV4_ADDRESS]
_LOOK_S = 0.05


def is_about_routes(case: Case) -> bool:
    return case.plugin.startswith("flannel")


class _Member:
    """A node: its namespace, its Part, and the thread that watches as the agent's does."""

    def __init__(self, number: int, switch: Namespace, routing: Routing) -> None:
        self.name, self.number = f"n{number}", number
        self.namespace = Namespace(self.name)
        self.ip, self.cidr = f"192.168.7.{number}", f"10.244.{number}.0/24"
        run = self.namespace.run
        end = f"link add eth0 mtu {BASE_MTU} type veth peer name p{number} mtu {BASE_MTU}"
        run("ip", *end.split(), "netns", switch.name)
        switch.run("ip", "link", "set", f"p{number}", "master", "br0", "up")
        for command in (f"address add {self.ip}/24 dev eth0", "link set eth0 up"):
            run("ip", *command.split())
        self.part = NodeRoutes(self.namespace.fd)
        self.compiler = RouteCompiler(self.name, routing)
        self.table: RouteTable | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._monitor = Monitor(_GROUPS, self.namespace.fd)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def apply(self, table: RouteTable) -> None:
        with self._lock:
            self.table = table
            self.part.apply(table)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._monitor.close()
        self.part.close()
        self.namespace.close()

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK_S):
            if any(map(self.part.concerns, self._monitor.drain())):
                with self._lock:
                    self.part.verify()

    @property
    def values(self) -> dict[str, str]:
        """What another node's case calls its peer's."""
        table = self.table
        mac = table.tunnel_mac.hex(":") if table else ""
        tunnel = sorted(table.tunnel_addresses, key=len) if table else []
        return {
            "PEER_POD_CIDR": self.cidr,
            "PEER_NODE_IP": self.ip,
            "PEER_VTEP_MAC": mac,
            "PEER_VTEP_IP": format_address(tunnel[0]) if tunnel else "",
            "VXLAN_DEV": DEVICE,
            "BASE_MTU": str(BASE_MTU),
        }


class RouteRun:
    """One case; `execute` gives what is not as expected."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._routing: Routing = "vxlan" if "vxlan" in case.plugin.lower() else "direct"
        self._switch = Namespace("switch")
        self._switch.run("ip", "link", "add", "br0", "type", "bridge")
        self._switch.run("ip", "link", "set", "br0", "up")
        self._store = Store()
        self._members: list[_Member] = []
        self._removed: list[_Member] = []
        self._deleted = 0.0
        self._repaired_after: float | None = None

    def close(self) -> None:
        for member in [*self._members, *self._removed]:
            member.close()
        self._switch.close()

    def execute(self) -> list[str]:
        for step in self._case.steps:
            if "action" not in step:
                raise Skip("cases of routes are told in words here")
            for part in re.split(r"[;,]\s*|\s+(?:and|then)\s+", step["action"]):
                self._act(part.strip().lower())
        expect = self._case.document.get("expect") or {}
        deadline = time.monotonic() + 3
        while (problems := list(self._differences(expect))) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return problems

    def _act(self, text: str) -> None:
        started = re.match(r"start (\d+) nodes", text)
        waited = re.match(r"wait (?:for )?([\d.]+) ?s", text)
        if started:
            for number in range(1, int(started[1]) + 1):
                self._members.append(_Member(number, self._switch, self._routing))
                self._put(self._members[-1])
            self._apply()
        elif re.match(r"(delete|remove) (one|a) (route|neighbou?r|fdb entry|entry)", text):
            self._delete_by_hand(text)
        elif waited:
            self._await_repair(float(waited[1]))
        elif re.match(r"(remove|delete|stop) (one|a) (node|peer)", text):
            gone = self._members.pop()
            self._removed.append(gone)
            self._store.remove(Node, ("", gone.name))
            self._apply()
        elif re.search(r"new (vtep )?mac|returns|comes back", text):
            self._come_back(self._members[1])
        else:
            raise Skip(f"no means to: {text}")

    def _put(self, member: _Member) -> None:
        address = NodeAddress(type="InternalIP", address=member.ip)
        self._store.put(
            Node(
                metadata=Metadata(name=member.name),
                spec=NodeSpec(pod_cidrs=[member.cidr]),
                status=NodeStatus(addresses=[address]),
            )
        )

    def _apply(self) -> None:
        changes = self._store.take()
        for member in self._members:
            member.apply(member.compiler.update(changes))

    def _come_back(self, member: _Member) -> None:
        """With another address, of which the tunnel's MAC is made."""
        old, member.ip = member.ip, f"192.168.7.1{member.number}"
        member.namespace.run("ip", "address", "add", f"{member.ip}/24", "dev", "eth0")
        member.namespace.run("ip", "address", "del", f"{old}/24", "dev", "eth0")
        member.namespace.run("ip", "address", "replace", f"{member.ip}/24", "dev", "eth0")
        self._put(member)
        self._apply()

    def _delete_by_hand(self, text: str) -> None:
        one, peer = self._members[0], self._members[1]
        if "route" in text:
            command = ["ip", "route", "del", peer.cidr]
        elif "neigh" in text:
            command = ["ip", "neigh", "del", peer.values["PEER_VTEP_IP"], "dev", DEVICE]
        else:
            command = ["bridge", "fdb", "del", peer.values["PEER_VTEP_MAC"], "dev", DEVICE]
        one.namespace.run(*command)
        self._deleted = time.monotonic()

    def _await_repair(self, longest_s: float) -> None:
        expect = self._case.document.get("expect") or {}
        while time.monotonic() < self._deleted + longest_s:
            if not list(self._on_each_node(expect)):
                self._repaired_after = time.monotonic() - self._deleted
                return
            time.sleep(_LOOK_S)

    def _differences(self, expect: dict[str, Any]) -> Iterator[str]:
        yield from self._on_each_node(expect)
        if "repaired_within_s" in expect:
            after = self._repaired_after
            if after is None or after > expect["repaired_within_s"]:
                yield f"repaired after {after} s"
        if "withdrawn_for" in expect and not self._removed:
            yield "no node was removed"
        for gone in self._removed:
            for member in self._members:
                text = Live(member.namespace).text("ip", "route") + Live(member.namespace).text(
                    "bridge", "fdb"
                )
                if gone.cidr in text or f"dst {gone.ip} " in text:
                    yield f"{member.name} still knows the way to {gone.name}"

    def _on_each_node(self, expect: dict[str, Any]) -> Iterator[str]:
        for member in self._members:
            live = {"host": Live(member.namespace)}
            for peer in self._members:
                if peer is member:
                    continue
                for what, wanted in by_namespace(expect).items():
                    if not isinstance(wanted, dict):
                        continue
                    here = {key.replace("each_node", "host"): each for key, each in wanted.items()}
                    filled = fill({what: here}, peer.values)
                    for wrong in state(filled, live):
                        yield f"{member.name} to {peer.name}: {wrong}"
