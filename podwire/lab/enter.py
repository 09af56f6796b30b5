"""Becoming a process of a node or of a pod.

A node is a network, mount, host name and cgroup namespace: its own /sys/fs/bpf, and its own cgroup
as the root of the cgroup tree, so that a program on it sees what it would see on a real node.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from podwire.errors import ConfigError
from podwire.kernel import netns
from podwire.lab import cgroups, files, mounts
from podwire.lab.state import LabDir, Process

BPF_FILE_SYSTEM = Path("/sys/fs/bpf")


@dataclass(frozen=True)
class NodeNamespaces:
    """Descriptors that keep a node's namespaces alive; children of the holder inherit them."""

    net: int
    mount: int
    uts: int
    cgroup: int

    def enter(self) -> None:
        """Move this process, which must have one thread. Its files are the node's from here on."""
        mounts.setns(self.cgroup, mounts.CLONE_NEWCGROUP)
        mounts.setns(self.uts, mounts.CLONE_NEWUTS)
        mounts.setns(self.net, mounts.CLONE_NEWNET)
        mounts.setns(self.mount, mounts.CLONE_NEWNS)

    def close(self) -> None:
        for fd in (self.net, self.mount, self.uts, self.cgroup):
            os.close(fd)


def make_node_namespaces(lab: LabDir, node: str) -> NodeNamespaces:
    """Make the mount, host name and cgroup namespaces that go with a node's network namespace.

    A child makes them and waits while this process opens them.
    """
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(done_write)
            _become_node(lab, node)
            os.write(ready_write, b"+")
            os.read(done_read, 1)
        except BaseException as error:
            os.write(ready_write, f"-{error}".encode())
        finally:
            os._exit(0)
    try:
        os.close(ready_write)
        os.close(done_read)
        answer = os.read(ready_read, 4096).decode()
        if not answer.startswith("+"):
            raise RuntimeError(f"cannot make the namespaces of node {node}: {answer[1:]}")
        return NodeNamespaces(
            netns.open_path(lab.netns(f"node-{node}")),
            *(
                os.open(f"/proc/{child}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
                for kind in ("mnt", "uts", "cgroup")
            ),
        )
    finally:
        os.close(ready_read)
        os.close(done_write)
        os.waitpid(child, 0)


def _become_node(lab: LabDir, node: str) -> None:
    root, cgroup = cgroups.root(), cgroups.of_node(lab.name, node)
    cgroups.join(cgroup)
    mounts.unshare(mounts.CLONE_NEWNS | mounts.CLONE_NEWUTS | mounts.CLONE_NEWCGROUP)
    mounts.receive_only()
    if root is not None and cgroup is not None:
        mounts.bind(cgroup, root)
    if BPF_FILE_SYSTEM.is_dir():
        mounts.mount("bpf", BPF_FILE_SYSTEM)
    socket.sethostname(node)


@dataclass(frozen=True)
class Place:
    """Where a program can run: `enter` in a child before exec, or in a process that will exec.

    `files` are bound over the machine's own in a mount namespace of its own.
    """

    lab: LabDir
    hostname: str
    netns: Path
    node: str = ""
    agent: Process | None = None  # of the node, whose namespaces a program on the node shares
    files: Mapping[str, str] = field(default_factory=dict[str, str])  # path: text

    def enter(self) -> None:
        """Move this process, which must have one thread. Raises KernelError, OSError."""
        fd = netns.open_path(self.netns)
        cgroups.join(cgroups.of_node(self.lab.name, self.node or "control"))
        if self.agent is not None:
            others = {"cgroup": mounts.CLONE_NEWCGROUP, "mnt": mounts.CLONE_NEWNS}
            opened = [
                (os.open(f"/proc/{self.agent.pid}/ns/{kind}", os.O_RDONLY), flag)
                for kind, flag in others.items()
            ]
            for other, flag in opened:
                mounts.setns(other, flag)
        netns.enter(fd)
        mounts.unshare(mounts.CLONE_NEWUTS | (mounts.CLONE_NEWNS if self.files else 0))
        socket.sethostname(self.hostname)
        if self.files:
            mounts.receive_only()
        for target, text in self.files.items():
            _cover(self.lab, Path(target), text)


def _cover(lab: LabDir, target: Path, text: str) -> None:
    """Bind a file with that text over `target`; a file that the machine lacks cannot be covered."""
    if not target.exists():
        return
    fd, name = tempfile.mkstemp(prefix="exec-", dir=lab.path)
    try:
        os.write(fd, text.encode())
        os.fchmod(fd, 0o644)
        mounts.bind(Path(name), target.resolve())
    finally:
        os.close(fd)
        os.unlink(name)  # the mount keeps it


def place_of_pod(lab: LabDir, pod: Mapping[str, Any], dns_servers: Sequence[str]) -> Place:
    """Where a pod's containers are. Raises ConfigError while it has no network."""
    meta, spec, status = pod["metadata"], pod["spec"], pod["status"]
    name, namespace = meta["name"], meta["namespace"]
    host_network = bool(spec.get("hostNetwork"))
    path = lab.netns(f"node-{spec.get('nodeName')}" if host_network else f"pod-{meta['uid']}")
    if not status.get("podIP") or not path.exists():
        raise ConfigError(f"pod {namespace}/{name} has no network (it is {status.get('phase')})")
    addresses = [entry["ip"] for entry in status.get("podIPs", ())]
    hostname = spec["nodeName"] if host_network else files.hostname(name, spec)
    machine = Path("/etc/resolv.conf")
    text = machine.read_text() if machine.exists() else ""
    return Place(
        lab,
        hostname,
        path,
        node=spec["nodeName"],
        files={
            "/etc/resolv.conf": files.resolv_conf(spec, namespace, dns_servers, text),
            "/etc/hosts": files.hosts(name, namespace, spec, addresses),
            "/etc/hostname": f"{hostname}\n",
        },
    )
