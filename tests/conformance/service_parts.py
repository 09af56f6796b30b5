"""The Services part of a data path, by name: `nftables`, `iptables-legacy`, `ebpf-maglev+xdp`.

Behind the dash: a flavour of iptables, or options of eBPF (`maglev`; `xdp`: generic).
"""

from __future__ import annotations

import importlib
import socket

from podwire.datapath import Part
from podwire.datapath.ebpf.balancing import Balancing
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart as EbpfServicesPart
from podwire.kernel import netns
from podwire.net import format_address
from podwire.services import ProxyConfig, ServiceTable
from tests.conformance.service_cases import UPLINK


def make_part(datapath: str, config: ProxyConfig, node: int) -> Part[ServiceTable]:
    """For the network namespace `node`."""
    room, _, word = datapath.partition("-")
    if room == "ebpf" and word:
        return _Optioned(config, node, word.split("+"))
    options = {"flavour": word} if word else {}
    return importlib.import_module(f"podwire.datapath.{room}.services").ServicesPart(
        config, node, **options
    )


class _Optioned(EbpfServicesPart):
    """eBPF as the agent runs it with further options."""

    def __init__(self, config: ProxyConfig, node: int, words: list[str]) -> None:
        self._mine = Programs(netns_fd=node)
        self._node = node
        self._xdp = "xdp" in words
        balancing = Balancing("maglev", 251) if "maglev" in words else Balancing()
        super().__init__(config, programs=self._mine, balancing=balancing)

    def start(self) -> None:
        super().start()
        if self._xdp:
            self._uplink = netns.call(self._node, lambda: socket.if_nametoindex(UPLINK))
            self._mine.accelerate(self._uplink, generic=True)

    def apply(self, table: ServiceTable) -> None:
        """XDP sends nothing to an endpoint whose MAC is not known yet."""
        if self._xdp:
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

    def cleanup(self) -> None:
        if self._xdp:
            self._mine.decelerate(self._uplink)
        super().cleanup()

    def close(self) -> None:
        self._mine.close()
