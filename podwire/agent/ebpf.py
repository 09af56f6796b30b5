"""The eBPF data path in the agent: programs that all parts share, and the links of pods."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from podwire.agent.carry import Carry
from podwire.agent.logs import event
from podwire.agent.options import Options
from podwire.datapath.ebpf import pinned, takeover
from podwire.datapath.ebpf.balancing import Balancing
from podwire.datapath.ebpf.layout import Phase
from podwire.datapath.ebpf.pods import EbpfPods, PodLink
from podwire.datapath.ebpf.programs import Programs, missing
from podwire.datapath.ebpf.uplinks import Uplinks
from podwire.errors import KernelError, Unsupported
from podwire.kernel.bpf import features
from podwire.kernel.ctnetlink import Entry, Table
from podwire.net import Address
from podwire.wiring import Attachment

if TYPE_CHECKING:
    from podwire.agent.pods import Gate

log = logging.getLogger("podwire.agent.ebpf")


def unavailable() -> str:
    """What this kernel or machine lacks for the eBPF data path, or ""."""
    return ", ".join(missing())


def make_programs(options: Options) -> Programs:
    """The node's programs, pinned under its name; sockets of the whole node get Services.

    All parts are switched on at once: an agent that starts over a running one would else replace
    its programs by some that do not judge yet. Where none run, `take_over` attaches them.
    """
    programs = Programs(options.node_name, cgroup=features.has_cgroup2())
    words = {"services": "services", "policy": "policy", "cni": "pods"}
    wanted = [word for part, word in words.items() if part in options.parts]
    if options.masquerade and "nodes" in options.parts:
        wanted.append("masquerade")
    if options.routing == "vxlan" and "nodes" in options.parts:
        wanted.append("overlay")
    programs.enable(*wanted, attach=False)
    return programs


def balancing(options: Options) -> Balancing:
    """How Services are balanced."""
    return Balancing(options.lb_algorithm, options.maglev_table_size, options.lb_mode)


def make_uplinks(programs: Programs, options: Options, addresses: Iterable[Address]) -> Uplinks:
    """XDP where it was asked for, and gone where it was before. Raises Unsupported."""
    uplinks = Uplinks(programs, options.lb_acceleration)
    uplinks.follow(addresses)
    if options.lb_acceleration == "native" and uplinks.problems:
        raise Unsupported(f"{uplinks.problems[0]} (best-effort goes on without)")
    return uplinks


def take_over(programs: Programs, predecessors: Sequence[str]) -> list[Entry]:
    """Put programs whose maps are complete in force; `predecessors` serve in netfilter until then.

    Returns entries of the kernel's table that may go after the predecessors.
    """
    if not predecessors or programs.phase is Phase.SERVING:
        if programs.phase is not Phase.SERVING:
            programs.attach(Phase.SERVING)
        return []
    with Table(programs.netns_fd) as table:
        return takeover.join(programs, table)


def pinned_nodes(options: Options, netns_fd: int | None = None) -> list[str]:
    """Nodes whose pins are this agent's to remove: its own under any name, and those of namespaces
    that are gone.
    """
    own, cookie = pinned.folder(options.node_name).name, pinned.netns_cookie(netns_fd)
    return [
        name
        for name in pinned.nodes()
        if name == own or pinned.owner(name) == cookie or pinned.is_abandoned(name)
    ]


def announce(options: Options) -> None:
    """Before another data path makes its rules: see `takeover.announce`."""
    for node in pinned_nodes(options):
        try:
            Carry().track()
            with Table() as table:
                takeover.announce(node, table)
        except KernelError as error:
            event(log, logging.WARNING, "connections of the node may break", error=error)


class Pins:
    """What eBPF left on this node: to be removed, or handed over to netfilter."""

    def __init__(self, options: Options, *, hand_over: bool) -> None:
        self._options = options
        self._hand_over = hand_over

    def cleanup(self) -> None:
        """Raises KernelError."""
        for node in pinned_nodes(self._options):
            if self._hand_over and not pinned.is_abandoned(node):
                self._leave(node)
            pinned.remove(node)
            event(log, logging.INFO, "removed the eBPF data path", node=node)

    def _leave(self, node: str) -> None:
        try:
            with Table() as table:
                refused = takeover.leave(node, table)
        except KernelError as error:
            event(log, logging.WARNING, "connections through Services end with eBPF", error=error)
            return
        if refused:
            event(log, logging.WARNING, "connections that netfilter did not take", count=refused)


class EbpfGate:
    """A pod's link is known to the programs before its policies are, and forgotten with it."""

    def __init__(self, programs: Programs, inner: Gate | None) -> None:
        self._pods = EbpfPods(programs)
        self._inner = inner

    def restore(self, attachments: Sequence[Attachment]) -> None:
        self._pods.start()
        self._pods.replace(_link(each) for each in attachments if each.wiring == "routed")
        if self._inner is not None:
            self._inner.restore(attachments)

    def admit(self, attachment: Attachment) -> None:
        self._pods.add(_link(attachment))
        if self._inner is not None:
            self._inner.admit(attachment)

    def dismiss(self, attachment: Attachment) -> None:
        self._pods.remove(attachment.host_ifindex)
        if self._inner is not None:
            self._inner.dismiss(attachment)


def _link(attachment: Attachment) -> PodLink:
    return PodLink(
        attachment.host_ifindex,
        attachment.host_mac,
        attachment.mac,
        tuple(each.address for each in attachment.addresses),
        attachment.netns,
    )
