"""Namespaces and sysctls: nobody is left in the wrong one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from podwire.errors import KernelError
from podwire.kernel import link, netns, sysctl
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket


def here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def test_entered_comes_back_also_after_an_error(netns_fd: int) -> None:
    before = here()

    def fail() -> None:
        assert here() == netns.inode(netns_fd) != before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        netns.call(netns_fd, fail)
    assert here() == before
    assert netns.call(netns_fd, here) == netns.inode(netns_fd)


def test_threads_do_not_disturb_each_other(make_netns: Callable[[], int]) -> None:
    fds = [make_netns() for _ in range(4)]

    def visit(fd: int) -> bool:
        return all(netns.call(fd, here) == netns.inode(fd) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(visit, fds))


def test_a_named_namespace(tmp_path: Path) -> None:
    path = tmp_path / "pod"
    fd = netns.create_named(path)
    try:
        with pytest.raises(FileExistsError):
            netns.create_named(path)
        again = netns.open_path(path)
        assert netns.inode(again) == netns.inode(fd) == path.stat().st_ino
        os.close(again)
    finally:
        netns.remove_named(path)
        os.close(fd)
    assert not path.exists()
    netns.remove_named(path)


def test_what_is_no_namespace(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="cannot open the network namespace") as caught:
        netns.open_path(tmp_path / "absent")
    assert caught.value.errno == errno.ENOENT
    with (
        open(__file__) as file,
        pytest.raises(KernelError, match="cannot enter"),
        netns.entered(file.fileno()),
    ):
        pass


def test_a_child_runs_inside(sock: NetlinkSocket, netns_fd: int) -> None:
    sock.run(link.add_bridge(End("inside0")))
    done = netns.run(netns_fd, ["ip", "-o", "link"])
    assert (done.returncode, "inside0" in done.stdout) == (0, True)
    assert netns.run(netns_fd, ["cat"], stdin="hello").stdout == "hello"


def test_sysctls(sock: NetlinkSocket, netns_fd: int) -> None:
    sock.run(link.add_bridge(End("br0.100")))
    name = f"net.ipv4.conf.{sysctl.interface('br0.100')}.rp_filter"
    assert name == "net.ipv4.conf.br0/100.rp_filter"
    before = sysctl.read("net.ipv4.ip_forward")
    sysctl.write({name: 2, "net.ipv4.ip_forward": "1"}, netns_fd)
    assert sysctl.read(name, netns_fd) == "2"
    assert sysctl.read("net.ipv4.ip_forward", netns_fd) == "1"
    assert sysctl.read("net.ipv4.ip_forward") == before
    with pytest.raises(KernelError, match=r"read the sysctl net\.absent: No such file"):
        sysctl.read("net.absent", netns_fd)
    with pytest.raises(KernelError, match=r"set to x the sysctl net\.ipv4\.ip_forward"):
        sysctl.write({"net.ipv4.ip_forward": "x"}, netns_fd)
