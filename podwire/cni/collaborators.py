"""What the life of an attachment is made with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from podwire.cni.plan import NodeConfig
from podwire.ipam.pool import AddressPool, Cursor
from podwire.ipam.state import State
from podwire.net import Address
from podwire.wiring import Attachment, Key, Wiring
from podwire.wiring.firewall import ForwardFirewall
from podwire.wiring.hostports import HostPortRules
from podwire.wiring.masquerade import MasqueradeRules
from podwire.wiring.meters import Meters

ADD_DEADLINE_S = 30.0


def boot_time() -> float:
    """Seconds since boot: the same clock before and after a restart of the agent."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SpoofGuard(Protocol):
    """Drops what leaves a pod with a source that is not its own."""

    def bind(self, host_ifname: str, mac: bytes, addresses: Sequence[Address]) -> None:
        """From now on the host end passes only these sources."""
        ...

    def unbind(self, host_ifname: str) -> None:
        """The link is gone or going."""
        ...

    def flush(self) -> None:
        """Make the kernel forget what was unbound; may wait for a grace period."""
        ...

    def restore(self, bindings: Mapping[str, tuple[bytes, Sequence[Address]]]) -> None:
        """Make the kernel hold these bindings and no others."""
        ...


class CursorPool(AddressPool, Protocol):
    """What of a pool is kept on disk besides the attachments."""

    def cursors(self, pool: str) -> list[Cursor]: ...
    def rest_until(self) -> float: ...


@dataclass(kw_only=True)
class Collaborators:
    """The rooms below, and what the agent decides.

    `admit` is called when the link is there and returns when the pod's policies are in place, or
    raises CniError; `dismiss` hears of every pod that was admitted and is gone (perhaps twice).
    `node` gives the defaults of the moment. `now` is the pool's clock.
    """

    state: State
    pool: CursorPool
    wirings: Mapping[str, Wiring]
    meters: Meters
    host_ports: HostPortRules
    masquerade: MasqueradeRules
    firewall: ForwardFirewall
    guard: SpoofGuard | None = None
    admit: Callable[[Attachment], None] = lambda _: None
    dismiss: Callable[[Attachment], None] = lambda _: None
    node: Callable[[], NodeConfig] = NodeConfig
    now: Callable[[], float] = boot_time
    add_deadline_s: float = ADD_DEADLINE_S

    def wiring(self, attachment: Attachment) -> Wiring:
        """The one that made the attachment's link."""
        return self.wirings[attachment.wiring]


def follow_mac(collaborators: Collaborators, part: Key, mac: bytes) -> None:
    """The interface of a chained `part` has another MAC now: what was made for the old one, by
    the attachment that the interface is of, follows, and CHECK knows it."""
    for known in collaborators.state.attachments():
        if known.key[:3] != part[:3] or not known.wiring or known.mac == mac:
            continue
        moved = msgspec.structs.replace(known, mac=mac)
        collaborators.wiring(known).renew(moved)
        if collaborators.guard and guarded(moved):
            collaborators.guard.bind(moved.host_ifname, *binding(moved))
        collaborators.state.add(moved, [], collaborators.now())


def guarded(made: Attachment) -> bool:
    """Whether a pod's port is watched: on a bridge, and something is known to check."""
    return made.bridge is not None and bool(made.addresses or made.bridge.check_mac)


def binding(made: Attachment) -> tuple[bytes, list[Address]]:
    return made.mac, [each.address for each in made.addresses]
