"""Fixtures for tests that touch the real kernel, and a detector of what they leave behind.

Anything of a test's that others can see (a named namespace, a link in the machine's namespace, a
pinned eBPF object, a run directory) carries `run_prefix` in its name. Anonymous namespaces end with
their descriptors.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from podwire.kernel import link, netns
from podwire.kernel.netlink import NetlinkSocket

# A busy machine is no failure.
# CI judges the change at hand: the same examples every time. Everywhere else new ones are tried.
settings.register_profile("podwire", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("podwire")

RUN_PREFIX = f"pwt{os.getpid()}"
_PLACES = ("/run/netns", "/sys/fs/bpf", "/sys/fs/cgroup/unified", "/run/podwire/lab")
_NEEDS_ROOT = ("kernel", "lab", "conformance")
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.path.relative_to(_HERE)
        if os.geteuid() != 0 and file.parts[0] in _NEEDS_ROOT:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        # what one worker runs: tests of a file share what it takes long to build, suites of cases
        # share nothing and are long themselves
        alone = file.parts[0] == "conformance"
        item.add_marker(pytest.mark.xdist_group(item.nodeid if alone else str(file)))


def _leftovers() -> list[str]:
    found = [
        str(entry)
        for place in _PLACES
        if os.path.isdir(place)
        for entry in Path(place).iterdir()
        if entry.name.startswith(RUN_PREFIX)
    ]
    names = (name for _, name in socket.if_nameindex())
    return found + [f"link {name}" for name in names if name.startswith(RUN_PREFIX)]


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    """Fail the test that leaves something of this run visible, or its thread in another namespace.

    Every other fixture is set up later, so this one looks when they have cleaned up.
    """
    before = os.stat("/proc/thread-self/ns/net").st_ino
    yield
    assert os.stat("/proc/thread-self/ns/net").st_ino == before, (
        "the thread is in another namespace"
    )
    assert _leftovers() == []


@pytest.fixture
def run_prefix() -> str:
    """What the names of visible things begin with (at most 10 characters: links have 15)."""
    return RUN_PREFIX


@pytest.fixture
def make_netns() -> Iterator[Callable[[], int]]:
    """A factory of anonymous namespaces with lo up; each is a descriptor, closed after the test."""
    made: list[int] = []

    def make() -> int:
        fd = netns.create()
        made.append(fd)
        with NetlinkSocket(netns_fd=fd) as sock:
            sock.run(link.change("lo", up=True))
        return fd

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def netns_fd(make_netns: Callable[[], int]) -> int:
    """One anonymous namespace."""
    return make_netns()


def present(sock: NetlinkSocket, name: str) -> link.Link:
    """The link of that name, which must be there."""
    found = link.find(sock, name)
    assert found, f"no link {name}"
    return found


@pytest.fixture
def sock(netns_fd: int) -> Iterator[NetlinkSocket]:
    """A netlink socket in `netns_fd`."""
    with NetlinkSocket(netns_fd=netns_fd) as socket_:
        yield socket_
