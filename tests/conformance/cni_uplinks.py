"""An ENI-style daemon: routed pods with addresses on two uplinks, each with its route table.

The first addresses are those of the second uplink, whose pods need both rules.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from podwire.cni.assembly import assemble, restored_pool
from podwire.cni.lifecycle import Lifecycle
from podwire.cni.plan import NodeConfig
from podwire.ipam.pool import Cursor, Demand, Pool
from podwire.ipam.ranges import make_range
from podwire.ipam.state import State
from podwire.kernel.route import TABLE_MAIN
from podwire.net import Address, Prefix, parse_address, parse_prefix
from podwire.wiring import Attachment, Key, PodAddress
from podwire.wiring.eni import EniLinks
from podwire.wiring.routed import RoutedWiring
from tests.conformance.cni_node import Namespace, Node

POOL = "*uplinks"
MTU = 9001
TABLES = {"10.20.1.0/28": 2, "10.20.0.0/28": TABLE_MAIN}
_MACS = ("02:00:00:00:20:00", "02:00:00:00:20:01")


class _Uplink(NamedTuple):
    mac: str
    address: Address
    subnet: Prefix
    gateway: Address
    table: int
    mtu: int = MTU
    primary: bool = False


_SECOND = _Uplink(
    _MACS[1],
    parse_address("10.20.1.14"),
    parse_prefix("10.20.1.0/24"),
    parse_address("10.20.1.1"),
    table=2,
)


def add_uplinks(node: Node) -> None:
    """Two links to a router that takes everything; the primary one is set up as a system would."""
    router = Namespace("router")
    node.also_closes(router)
    host = node.namespace
    for number, mac in enumerate(_MACS):
        name = f"uplink{number}"
        end = f"link add {name} address {mac} mtu {MTU} type veth peer name {name}"
        host.run("ip", *end.split(), "mtu", str(MTU), "netns", router.name)
        router.run("ip", "link", "set", name, "up")
        router.run("ip", "address", "add", f"10.20.{number}.1/24", "dev", name)
    host.run("ip", "address", "add", "10.20.0.14/24", "dev", "uplink0")
    host.run("ip", "link", "set", "uplink0", "up")
    host.run("ip", "route", "add", "default", "via", "10.20.0.1")
    node.table_of = table_of


def table_of(address: str) -> str:
    """In iproute2's words."""
    for cidr, table in TABLES.items():
        if ipaddress.ip_address(address) in ipaddress.ip_network(cidr):
            return "main" if table == TABLE_MAIN else str(table)
    return ""


def two_uplinks(state: State, now: Callable[[], float]) -> Lifecycle:
    """For the node's namespace, which has the uplinks."""
    asyncio.run(EniLinks().set_up(_SECOND, timeout_s=1))
    return assemble(
        state,
        node=lambda: NodeConfig(wiring="routed", pool=POOL, mtu=MTU),
        pool=_Addresses(restored_pool(state, now)),
        wirings={"routed": _Wiring()},
        now=now,
    )


class _Wiring(RoutedWiring):
    def attach(self, attachment: Attachment, netns_fd: int) -> Attachment:
        first = ipaddress.ip_address(attachment.addresses[0].address)
        table = next(t for cidr, t in TABLES.items() if first in ipaddress.ip_network(cidr))
        return super().attach(msgspec.structs.replace(attachment, route_table=table), netns_fd)


class _Addresses:
    """The host's pool, which asks for no ranges: both uplinks' are one set."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        ranges = [make_range(cidr) for cidr in TABLES]
        self._sets = (tuple(ranges),)

    def allocate(self, owner: Key, demand: Demand) -> Sequence[PodAddress]:
        return self._pool.allocate(owner, Demand(demand.pool, self._sets, demand.requested))

    def cancel(self, owner: Key) -> None:
        self._pool.cancel(owner)

    def release(self, owner: Key) -> None:
        self._pool.release(owner)

    def cursors(self, pool: str) -> list[Cursor]:
        return self._pool.cursors(pool)

    def rest_until(self) -> float:
        return self._pool.rest_until()
