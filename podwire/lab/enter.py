"""Becoming a process of a node or of a pod.

A node is a network, mount, host name and cgroup namespace: its own /sys/fs/bpf, and its own cgroup
as the root of the cgroup tree, so that a program on it sees what it would see on a real node.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from podwire.kernel import netns
from podwire.lab import cgroups, mounts
from podwire.lab.state import LabDir

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
