"""ENIs as links of the node: address, route table and rules of each. As the AWS VPC CNI sets up.

A secondary ENI carries traffic of its own addresses only: they look up its table, in which the way
out is the VPC router. The primary one is the operating system's: it only gets the rule by which
answers to connections that came in on it (mark 0x80) leave by it again.

Source: aws/amazon-vpc-cni-k8s, pkg/networkutils/network.go (SetupENINetwork, SetupHostNetwork).
"""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from podwire.errors import KernelError
from podwire.kernel import address, link, route, rule
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.link import Link
from podwire.kernel.monitor import Event
from podwire.kernel.netlink import NetlinkSocket, Request
from podwire.kernel.route import TABLE_MAIN, Route
from podwire.kernel.rule import Rule
from podwire.net import Address, Prefix, host_prefix, parse_mac
from podwire.wiring import KERNEL_PROTOCOL
from podwire.wiring.interference import taken_away

# 1025-1534 are free for others.
MARKED_PRIORITY = 1024
DIVERTED_PRIORITY = 1535
FROM_ENI_PRIORITY = 32765
PRIMARY_MARK = 0x80
_PRIORITIES = (MARKED_PRIORITY, DIVERTED_PRIORITY, FROM_ENI_PRIORITY)

_LOOK_AGAIN_S = 0.05
_EVERYWHERE = Prefix(bytes(4), 0)


class Eni(Protocol):
    """What must be known of an ENI; `gateway` is the VPC router of its subnet."""

    @property
    def mac(self) -> str: ...
    @property
    def address(self) -> Address: ...
    @property
    def subnet(self) -> Prefix: ...
    @property
    def gateway(self) -> Address: ...
    @property
    def table(self) -> int: ...
    @property
    def mtu(self) -> int: ...
    @property
    def primary(self) -> bool: ...


class EniLinks:
    """The ENIs of the node's namespace (`netns_fd`; default: the caller's).

    What carries `mark` leaves by the primary one, and so does what goes to one of `diverted`.
    """

    def __init__(
        self,
        netns_fd: int | None = None,
        *,
        mark: int = PRIMARY_MARK,
        diverted: Sequence[Prefix] = (),
    ) -> None:
        self._primary_rules = [
            Rule(MARKED_PRIORITY, TABLE_MAIN, mark=mark, mask=mark, protocol=KERNEL_PROTOCOL),
            *(
                rule.to_prefix(each, DIVERTED_PRIORITY, TABLE_MAIN, KERNEL_PROTOCOL)
                for each in diverted
            ),
        ]
        self._sock = NetlinkSocket(netns_fd=netns_fd)
        self._lock = threading.Lock()
        self._enis: dict[str, Eni] = {}

    def close(self) -> None:
        self._sock.close()

    async def set_up(self, eni: Eni, timeout_s: float) -> None:
        """Wait for the link with the ENI's MAC and make it what it should be.

        Raises KernelError; ENODEV when no such link appeared in time.
        """
        deadline = time.monotonic() + timeout_s
        while (found := self._find(eni)) is None:
            if time.monotonic() >= deadline:
                text = f"the link of the ENI {eni.mac} did not appear within {timeout_s:g} s"
                raise KernelError(text, errno=errno.ENODEV)
            await asyncio.sleep(_LOOK_AGAIN_S)
        with self._lock:
            self._sock.run(*self._differences(eni, found))
            self._enis[eni.mac] = eni

    async def tear_down(self, eni: Eni) -> None:
        """Take away what `set_up` made; addresses and routes go with the link if it is gone."""
        with self._lock:
            self._enis.pop(eni.mac, None)
            found = self._find(eni)
            requests = [rule.delete(each).tolerating(errno.ENOENT) for each in self._rules(eni)]
            if found and not eni.primary:
                for each in address.dump(self._sock, link=found.index):
                    if each.address == eni.address:
                        requests.append(address.delete(each))
                gone = (errno.ESRCH,)
                wanted = _routes(eni, found.index)
                requests += [route.delete(each).tolerating(*gone) for each in reversed(wanted)]
            self._sock.run(*requests)

    def restore(self) -> list[str]:
        """Put back what somebody wiped, of every ENI whose link is there; name each repair."""
        repairs: list[str] = []
        with self._lock:
            for eni in self._enis.values():
                found = self._find(eni)
                if found is None:
                    continue
                requests = self._differences(eni, found)
                _, failures = self._sock.attempt(requests)
                failed = {failure.request.what for failure in failures}
                repairs += [each.what for each in requests if each.what not in failed]
        return repairs

    def concerns(self, event: Event) -> bool:
        """Whether a notification is a reason to `restore`."""
        if event.type == link.RTM_NEWLINK:  # IPv4 routes go silently when a link goes down
            mac = link.parse(event.body).mac.hex(":")
            return mac in self._enis
        return taken_away(event)

    def _find(self, eni: Eni) -> Link | None:
        mac = parse_mac(eni.mac)
        return next((each for each in link.dump(self._sock) if each.mac == mac), None)

    def _differences(self, eni: Eni, found: Link) -> list[Request]:
        """Empty when all is as it should be."""
        held = [each for each in rule.dump(self._sock) if each.priority in _PRIORITIES]
        requests = [rule.add(each) for each in self._rules(eni) if each not in held]
        if eni.primary:
            return requests
        if (found.mtu, found.up) != (eni.mtu, True):
            requests.insert(0, link.change(found.index, mtu=eni.mtu, up=True))
        present = address.dump(self._sock, link=found.index)
        others = [
            each
            for each in present
            if each.scope == address.SCOPE_GLOBAL and each.address != eni.address
        ]
        requests += map(address.delete, others)
        if all(each.address != eni.address for each in present):
            # Without its prefix route: the subnet is reached by the primary ENI from main.
            flags = address.F_NOPREFIXROUTE
            own = InterfaceAddress(found.index, eni.address, eni.subnet.length, flags=flags)
            requests.append(address.add(own))
        routes = route.dump(self._sock, table=eni.table)
        wanted = _routes(eni, found.index)
        requests += [route.add(each, replace=True) for each in wanted if each not in routes]
        return requests

    def _rules(self, eni: Eni) -> list[Rule]:
        if eni.primary:
            return self._primary_rules
        prefix = host_prefix(eni.address)
        return [rule.from_prefix(prefix, FROM_ENI_PRIORITY, eni.table, KERNEL_PROTOCOL)]


def _routes(eni: Eni, index: int) -> list[Route]:
    """In the ENI's table: the router on the link, then everything by it."""
    router, table = eni.gateway, eni.table
    return [
        route.direct(host_prefix(router), index, table=table, protocol=KERNEL_PROTOCOL),
        route.via(_EVERYWHERE, router, index, table=table, protocol=KERNEL_PROTOCOL),
    ]
