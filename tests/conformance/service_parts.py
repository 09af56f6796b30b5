"""The Services part of a data path, by name: `nftables`, `iptables-legacy`, `ebpf-maglev+xdp`.

Behind the dash: a flavour of iptables, or options of eBPF (`maglev`; `xdp`: generic).
"""

from __future__ import annotations

import importlib
import socket
from typing import Protocol

from podwire.datapath import Part
from podwire.datapath.ebpf.balancing import Balancing
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart as EbpfServicesPart
from podwire.kernel import netns
from podwire.net import format_address
from podwire.services import ProxyConfig, ServiceTable
from tests.conformance.service_cases import UPLINK


class Parts(Protocol):
    """Makes a part for each case, in one network namespace."""

    def make(self, config: ProxyConfig) -> Part[ServiceTable]: ...

    def take_away(self, part: Part[ServiceTable], empty: ServiceTable) -> list[str]:
        """The case is over; what is left of it though `empty` is all that should hold."""
        ...

    def close(self) -> None: ...


def parts_of(datapath: str, node: int) -> Parts:
    """For the network namespace `node`."""
    room, _, word = datapath.partition("-")
    return EbpfParts(node, word.split("+")) if room == "ebpf" else _NetfilterParts(room, word, node)


class _NetfilterParts:
    """Rules are made anew for each case."""

    def __init__(self, room: str, flavour: str, node: int) -> None:
        self._room = importlib.import_module(f"podwire.datapath.{room}.services")
        self._options = {"flavour": flavour} if flavour else {}
        self._node = node

    def make(self, config: ProxyConfig) -> Part[ServiceTable]:
        return self._room.ServicesPart(config, self._node, **self._options)

    def take_away(self, part: Part[ServiceTable], empty: ServiceTable) -> list[str]:
        part.cleanup()
        part.close()
        return []

    def close(self) -> None:
        pass


class EbpfParts:
    """Programs are loaded once, which is most of a case's time, and maps emptied after each case.

    What a case leaves in them is its failure, and the next one gets new ones.
    """

    def __init__(self, node: int, words: list[str]) -> None:
        self._programs = Programs(netns_fd=node)
        self._node = node
        self._xdp = "xdp" in words
        self._balancing = Balancing("maglev", 251) if "maglev" in words else Balancing()

    def make(self, config: ProxyConfig) -> Part[ServiceTable]:
        kind = _Accelerated if self._xdp else EbpfServicesPart
        return kind(config, self._node, programs=self._programs, balancing=self._balancing)

    def take_away(self, part: Part[ServiceTable], empty: ServiceTable) -> list[str]:
        try:
            part.apply(empty)
            part.flush()
            left = [*part.verify(), *self._remains()]
        except Exception as error:
            left = [f"cannot be emptied: {error!r}"]
        if left:
            self._programs.cleanup()
        return [f"left behind: {what}" for what in left]

    def _remains(self) -> list[str]:
        """Entries that the programs made of themselves."""
        self._programs.connections.clear()
        maps = self._programs.maps
        maps["affinities"].delete_batch([key for key, _ in maps["affinities"].items()])
        return [f"hits of {key.hex()}" for key, _ in maps["hits"].items()]

    def close(self) -> None:
        self._programs.cleanup()


class _Accelerated(EbpfServicesPart):
    """With XDP at the uplink."""

    def __init__(
        self, config: ProxyConfig, node: int, *, programs: Programs, balancing: Balancing
    ) -> None:
        super().__init__(config, programs=programs, balancing=balancing)
        self._node, self._mine = node, programs

    def start(self) -> None:
        super().start()
        uplink = netns.call(self._node, lambda: socket.if_nametoindex(UPLINK))
        if uplink not in self._mine.accelerated():
            self._mine.accelerate(uplink, generic=True)

    def apply(self, table: ServiceTable) -> None:
        """XDP sends nothing to an endpoint whose MAC is not known yet."""
        here = {b for port in table.ports.values() for b in port.on_node}
        far = {b[:-2] for port in table.ports.values() for b in port.cluster if b not in here}
        lines = [
            f"neigh replace {format_address(a)} lladdr 02:00:00:00:00:fe nud permanent"
            f" dev {UPLINK}\n"
            for a in far
        ]
        done = netns.run(self._node, ["ip", "-batch", "-"], stdin="".join(lines))
        assert done.returncode == 0, done.stderr
        super().apply(table)
