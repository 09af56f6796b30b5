"""The links of one node: made, pinned, found again, and given new programs in place."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Mapping
from pathlib import Path

from podwire.datapath.ebpf import pinned
from podwire.errors import KernelError
from podwire.kernel import netns
from podwire.kernel.bpf import AttachType, Link, Program, pins
from podwire.kernel.link import Link as Interface

_LOOPBACK = 1
_HAVE_PORTS = ("bridge", "bond", "team")
_SOCKET_HOOKS = {
    f"{hook.lower()}{family}": AttachType[f"{hook}{family}"]
    for hook in ("CONNECT", "SENDMSG", "RECVMSG", "GETPEERNAME")
    for family in (4, 6)
}
_TCX = {"ingress": AttachType.TCX_INGRESS, "egress": AttachType.TCX_EGRESS}


class Attachments:
    """Links by the name of their pin: program, interface (or ``cgroup``), direction.

    `find` gives a loaded program by its name in C, or None. Until `adopt`, nothing is attached and
    what an earlier process attached is left alone; pods are remembered.
    """

    def __init__(
        self, node: str, netns_fd: int | None, find: Callable[[str], Program | None]
    ) -> None:
        self._node = node
        self._netns_fd = netns_fd
        self._find = find
        self._pods: set[int] = set()
        self.links: dict[str, Link] = {}
        self.active = False

    def adopt(self) -> None:
        """Open the pinned links and put our programs into all of them, each in one step."""
        for path in pinned.link_paths(self._node):
            link = self.links.pop(path.name, None) or pins.open_link(path)
            if link is None:
                continue
            name = path.name.split("-")[0]
            program = self._find(name)
            if link.info.target == 0 or program is None:
                link.close()
                path.unlink(missing_ok=True)
                continue
            link.update(program)
            self.links[path.name] = link
            if name == "from_pod":
                self._pods.add(link.info.target)
        self.active = True
        for ifindex in self._pods:  # a process that died may have left both ingress programs
            self._detach(f"from_network-{ifindex}-ingress")

    def add_pod(self, ifindex: int) -> None:
        """The host's end of a pod's veth is to be treated as one."""
        self._pods.add(ifindex)
        if self.active:
            self._attach_interface(ifindex)

    def sync(self, present: Mapping[int, Interface], gone: Callable[[int], None]) -> list[int]:
        """Attach to interfaces that are new and let go of those that are gone; the new ones.

        An interface may be gone again before its turn comes. `gone` is told of pods'.
        """
        for name in list(self.links):
            if self.links[name].info.target == 0:
                self._detach(name)
                program, index, *_ = name.split("-")
                if program == "from_pod":
                    self._pods.discard(int(index))
                    gone(int(index))
        # one that XDP is on already (`attach_driver`) is as new to these programs as any
        new = [index for index in present if f"from_node-{index}-egress" not in self.links]
        for index in new:
            try:
                self._attach_interface(index, has_ports=present[index].kind in _HAVE_PORTS)
            except KernelError as error:
                if error.errno != errno.ENODEV:
                    raise
        return new

    def attach_sockets(self, cgroup: Path) -> None:
        for name, where in _SOCKET_HOOKS.items():
            pin = f"{name}-cgroup"
            if pin not in self.links:
                self._keep(pin, Link.cgroup(self._program(name), str(cgroup), where))

    def attach_overlay(self, ifindex: int) -> None:
        """Ahead of and behind the programs of every interface."""
        try:
            self._attach_tcx("from_overlay", ifindex, "ingress", first=True)
            self._attach_tcx("to_overlay", ifindex, "egress")
        except KernelError as error:
            if error.errno != errno.ENODEV:
                raise

    def attach_driver(self, ifindex: int, *, generic: bool) -> None:
        """XDP. Raises KernelError, from the driver too (EOPNOTSUPP)."""
        name = f"from_driver-{ifindex}-{'generic' if generic else 'native'}"
        if not self.active and (pinned.folder(self._node) / "links" / name).exists():
            return  # it is adopted with the others
        with netns.entered(self._netns_fd):
            link = Link.xdp(self._program("from_driver"), ifindex, generic=generic)
        self._keep(name, link)

    def detach_driver(self, ifindex: int) -> None:
        for kind in ("generic", "native"):
            self._detach(f"from_driver-{ifindex}-{kind}")

    def drivers(self) -> dict[int, bool]:
        """Interfaces that run XDP; whether in the stack (generic)."""
        names = [name.split("-") for name in self.links if name.startswith("from_driver-")]
        return {int(ifindex): kind == "generic" for _, ifindex, kind in names}

    def close(self) -> None:
        """Let go of descriptors; what is pinned goes on working."""
        for link in self.links.values():
            link.close()
        self.links = {}
        self.active = False

    def _program(self, name: str) -> Program:
        found = self._find(name)
        if found is None:
            raise pinned.another_version(f"program {name}")
        return found

    def _attach_interface(self, ifindex: int, *, has_ports: bool = False) -> None:
        """What came in by a port was seen there; on the interface that has it, it looks new."""
        ingress = "from_pod" if ifindex in self._pods else "from_network"
        if ifindex != _LOOPBACK and not has_ports:
            self._attach_tcx(ingress, ifindex, "ingress")
            for other in {"from_pod", "from_network"} - {ingress}:
                self._detach(f"{other}-{ifindex}-ingress")
        self._attach_tcx("from_node", ifindex, "egress")

    def _attach_tcx(
        self, program: str, ifindex: int, direction: str, *, first: bool = False
    ) -> None:
        name = f"{program}-{ifindex}-{direction}"
        if name not in self.links:
            with netns.entered(self._netns_fd):
                link = Link.tcx(self._program(program), ifindex, _TCX[direction], first=first)
            self._keep(name, link)

    def _keep(self, name: str, link: Link) -> None:
        try:
            pins.pin(link, pins.directory(self._node, "links") / name)
        except BaseException:
            link.close()
            raise
        self.links[name] = link

    def _detach(self, name: str) -> None:
        link = self.links.pop(name, None)
        if link:
            # at once, so that another may come here; without, the kernel does it some time later
            with contextlib.suppress(KernelError):
                link.detach()
            link.close()
            (pinned.folder(self._node) / "links" / name).unlink(missing_ok=True)
