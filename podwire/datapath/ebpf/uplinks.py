"""Services at the driver (XDP): on the links that carry the node's own addresses.

`native` is for drivers that run XDP, and an error where one does not; `best-effort` goes on without
it there; `generic` runs the program in the stack, which any link can, and gains nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from podwire.datapath.ebpf.programs import Programs
from podwire.errors import KernelError
from podwire.kernel import address, link
from podwire.kernel.monitor import LOST, Event
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import Address

log = logging.getLogger(__name__)

_EVENTS = (link.RTM_NEWLINK, link.RTM_DELLINK, address.RTM_NEWADDR, address.RTM_DELADDR)
ACCELERATIONS = ("disabled", "native", "best-effort", "generic")


class Uplinks:
    """Keeps the program on the uplinks of a node, and on no other link."""

    def __init__(self, programs: Programs, acceleration: str) -> None:
        self._programs = programs
        self._acceleration = acceleration
        self._addresses: frozenset[Address] = frozenset()
        self._refusals: dict[int, str] = {}
        """Why a link does without, by its index."""

    def follow(self, addresses: Iterable[Address]) -> None:
        """From now on these are the node's own addresses. Raises KernelError."""
        known, self._addresses = self._addresses, frozenset(addresses)
        if self._addresses != known:
            self.sync()

    def sync(self) -> list[str]:
        """Look at links and addresses again; what was changed, one sentence each."""
        programs, generic = self._programs, self._acceleration == "generic"
        with programs.lock:
            wanted = self._find() if self._acceleration != "disabled" else {}
            found = programs.accelerated()
            changes: list[str] = []
            for ifindex, in_stack in found.items():
                if ifindex not in wanted or in_stack != generic:
                    programs.decelerate(ifindex)
                    changes.append(f"XDP left interface {ifindex}")
            for ifindex, name in wanted.items():
                if found.get(ifindex) != generic and self._attach(ifindex, name, generic):
                    changes.append(f"XDP runs on {name}")
            self._refusals = {i: why for i, why in self._refusals.items() if i in wanted}
            if not wanted and self._acceleration != "disabled":
                self._refusals[0] = "no link carries an address of the Node object"
            return changes

    @staticmethod
    def concerns(event: Event) -> bool:
        """Whether uplinks may be others after this."""
        return event == LOST or event.type in _EVENTS

    @property
    def problems(self) -> list[str]:
        """What the status says: links that were to be accelerated, and are not."""
        if self._acceleration == "best-effort":
            return []  # one line in the log said it
        return [f"--lb-acceleration {self._acceleration}: {why}" for why in self._refusals.values()]

    def _find(self) -> dict[int, str]:
        with NetlinkSocket(netns_fd=self._programs.netns_fd) as netlink:
            indexes = {
                each.link for each in address.dump(netlink) if each.address in self._addresses
            }
        links = self._programs.dump_links()
        return {index: links[index].name for index in sorted(indexes) if index in links}

    def _attach(self, ifindex: int, name: str, generic: bool) -> bool:
        try:
            self._programs.accelerate(ifindex, generic=generic)
        except KernelError as error:
            if ifindex not in self._refusals:
                log.warning("no XDP on %s: %s", name, error)
            self._refusals[ifindex] = f"no XDP on {name}: {error}"
            return False
        self._refusals.pop(ifindex, None)
        return True
