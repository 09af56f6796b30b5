"""The data paths: which there are, which parts each has, and what is left of those not in use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

from podwire.agent import ebpf, handover
from podwire.agent.carry import Carry
from podwire.agent.logs import event
from podwire.agent.options import PARTS, Options
from podwire.datapath import Part
from podwire.datapath.ebpf.nodes import NodesPart as EbpfNodesPart
from podwire.datapath.ebpf.policy import PolicyPart as EbpfPolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart as EbpfServicesPart
from podwire.datapath.iptables.nodes import NodesPart as IptablesNodesPart
from podwire.datapath.iptables.policy import PolicyPart as IptablesPolicyPart
from podwire.datapath.iptables.services import ServicesPart as IptablesServicesPart
from podwire.datapath.nftables.nodes import NodesPart as NftablesNodesPart
from podwire.datapath.nftables.policy import PolicyPart as NftablesPolicyPart
from podwire.datapath.nftables.services import ServicesPart as NftablesServicesPart
from podwire.errors import KernelError, Unsupported
from podwire.kernel.ctnetlink import Entry, Table
from podwire.kernel.ctnetlink.filters import abilities
from podwire.kernel.iptables import FLAVOURS, Flavour, detect_flavour, installed
from podwire.nodes import RouteTable
from podwire.policy import PolicyTable
from podwire.services import ProxyConfig, ServiceTable

log = logging.getLogger("podwire.agent.datapaths")

BRIDGE = "cni0"


class Removable(Protocol):
    """Something in the kernel that podwire made and can take away whole."""

    def cleanup(self) -> None: ...


class DataPath:
    """The one that this agent runs."""

    def __init__(self, options: Options) -> None:
        """Raises Unsupported, with what the machine lacks for the one that is asked for."""
        self._options = options
        self.name = options.datapath
        self.programs: Programs | None = None
        self._flavour: Flavour | None = None
        if self.name == "auto":
            self.programs, lacks = _automatic(options)
            self.name = "nftables" if lacks else "ebpf"
            if lacks:
                event(log, logging.INFO, "nftables serves: eBPF is not to be had", lacks=lacks)
        elif self.name == "ebpf":
            lacks = ebpf.unavailable()
            if lacks:
                raise Unsupported(f"--datapath ebpf: this machine lacks {lacks}")
            self.programs = ebpf.make_programs(options)
        elif self.name == "iptables":
            self._flavour = detect_flavour()
        if self.programs is None:
            ebpf.announce(options)
            abilities()  # to end flows with: found out now, not while a client waits

    def abandon(self) -> None:
        """Let go of it; programs that serve go on. Raises KernelError."""
        if self.programs is not None:
            self.programs.abandon()

    def nodes(self) -> Part[RouteTable]:
        if self.programs is not None:
            return EbpfNodesPart(self.programs, masquerade=self._options.masquerade)
        if self.name == "iptables":
            return IptablesNodesPart(flavour=self._flavour, masquerade=self._options.masquerade)
        return NftablesNodesPart(masquerade=self._options.masquerade)

    def services(self, config: ProxyConfig) -> Part[ServiceTable]:
        if self.programs is not None:
            balancing = ebpf.balancing(self._options)
            return EbpfServicesPart(config, programs=self.programs, balancing=balancing)
        if self.name == "iptables":
            return IptablesServicesPart(config, flavour=self._flavour)
        return NftablesServicesPart(config)

    def policy(self) -> Part[PolicyTable]:
        if self.programs is not None:
            return EbpfPolicyPart(programs=self.programs)
        bridged = self._options.wiring == "bridge" and "cni" in self._options.parts
        bridge = BRIDGE if bridged else None
        if self.name == "iptables":
            return IptablesPolicyPart(bridge=bridge, flavour=self._flavour)
        return NftablesPolicyPart(bridge=bridge)

    def take_over(self, complete: bool) -> bool:
        """Serve alone from now on: what an earlier data path of ours or kube-proxy left goes.

        False: as long as ours is not `complete`, theirs stays in force. Raises KernelError.
        """
        found = handover.predecessors() if self.programs is not None else []
        if not complete and (found or self.programs is None):
            return False
        carried: list[Entry] = []
        if self.programs is not None:
            carried = ebpf.take_over(self.programs, found)
            if found:
                Carry().begin()
        if not complete:
            return False
        for name, leftover in self._others():
            leftover.cleanup()
            event(log, logging.DEBUG, "no other data path is left", part=name)
        if "services" in self._options.parts:
            handover.remove_kube_proxy()
        if carried:
            with Table() as table:
                table.delete_entries(carried)
        return True

    def settle(self) -> bool:
        """Let go of what is only for connections from before; whether all has ended."""
        return Carry().end()

    def _others(self) -> Iterator[tuple[str, Removable]]:
        """Parts of the data paths that do not run."""
        wanted = {
            "services": "services" in self._options.parts,
            "policy": "policy" in self._options.parts,
            "masquerade": "nodes" in self._options.parts,
        }
        for path, name, part in leftovers(self._options, hand_over=True):
            if path != self.name and wanted.get(name, all(wanted.values())):
                yield f"{path} {name}", part


def _automatic(options: Options) -> tuple[Programs | None, str]:
    """The eBPF programs, or what keeps this machine from them.

    Where an earlier agent's programs work, failing to load ours is raised: they go on working.
    """
    lacks = _unfit(options) or ebpf.unavailable()
    if lacks:
        return None, lacks
    working = Programs(options.node_name).folder.exists()
    try:
        return ebpf.make_programs(options), ""
    except KernelError as error:
        if working:
            raise
        return None, f"programs that load here: {error}"


def _unfit(options: Options) -> str:
    """What of these options eBPF does not serve, or ""."""
    if options.parts != PARTS:
        return "pods of its own (--only)"
    return "routed wiring (--wiring routed)" if options.wiring != "routed" else ""


def leftovers(options: Options, *, hand_over: bool = False) -> Iterator[tuple[str, str, Removable]]:
    """Data path, name and part of all that an agent of this node may have left in the kernel.

    `hand_over`: netfilter's rules are complete, so connections of eBPF's go on there.
    """
    yield "nftables", "services", NftablesServicesPart(ProxyConfig())
    yield "nftables", "policy", NftablesPolicyPart(bridge=BRIDGE)
    yield "nftables", "masquerade", NftablesNodesPart()
    for flavour in FLAVOURS:
        if installed(flavour):
            yield "iptables", "services", IptablesServicesPart(ProxyConfig(), flavour=flavour)
            yield "iptables", "policy", IptablesPolicyPart(bridge=BRIDGE, flavour=flavour)
            yield "iptables", "masquerade", IptablesNodesPart(flavour=flavour)
            break  # each removes what either flavour holds
    yield "ebpf", "programs", ebpf.Pins(options, hand_over=hand_over)
    yield "ebpf", "connections from before", Carry()
