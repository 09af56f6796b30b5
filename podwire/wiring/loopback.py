"""The loopback interface of a pod."""

from __future__ import annotations

from podwire.kernel import link
from podwire.kernel.netlink import NetlinkSocket

NAME = "lo"


def set_up(netns_fd: int, up: bool) -> None:
    with NetlinkSocket(netns_fd=netns_fd) as pod:
        pod.run(link.change(NAME, up=up))


def check(netns_fd: int) -> list[str]:
    """How the live state differs, one sentence each."""
    with NetlinkSocket(netns_fd=netns_fd) as pod:
        found = link.find(pod, NAME)
    return [] if found and found.up else ["the loopback interface is down"]
