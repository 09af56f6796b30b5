"""sysctls and attributes of a pod's interface, changed after the link is there."""

from __future__ import annotations

from collections.abc import Mapping

from podwire.errors import KernelError
from podwire.kernel import link, sysctl
from podwire.kernel.link import IFF_ALLMULTI, IFF_PROMISC, Link
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import parse_mac

Value = str | int


def set_sysctls(values: Mapping[str, str], netns_fd: int) -> None:
    """Inside the pod only. Raises KernelError."""
    sysctl.write(values, netns_fd)


def check_sysctls(values: Mapping[str, str], netns_fd: int) -> list[str]:
    """How the live state differs, one sentence each."""
    problems: list[str] = []
    for name, wanted in values.items():
        found = sysctl.read(name, netns_fd)
        if found.split() != wanted.split():
            problems.append(f"Tuning configured value of {name} is {wanted}, current is {found}")
    return problems


def change(wanted: Mapping[str, Value], ifname: str, netns_fd: int) -> dict[str, Value]:
    """Change the interface (`mac` as hex text, `mtu`, `promisc`, `allmulti`, `tx_queue_length`).

    Returns what it had before, for `change` to bring back. Raises KernelError; then nothing is
    changed.
    """
    with NetlinkSocket(netns_fd=netns_fd) as pod:
        before = link.find(pod, ifname)
        if before is None:
            raise KernelError(f"there is no interface {ifname} in the pod")
        saved = {name: _read(before, name) for name in wanted}
        try:
            _apply(pod, before, wanted)
        except KernelError:
            _apply(pod, before, saved)
            raise
    return saved


def check(wanted: Mapping[str, Value], ifname: str, netns_fd: int) -> list[str]:
    """How the live state differs, one sentence each."""
    with NetlinkSocket(netns_fd=netns_fd) as pod:
        found = link.find(pod, ifname)
    if found is None:
        return [f"{ifname} is missing in the pod"]
    return [
        f"Tuning configured value of {name} is {value}, current is {_read(found, name)}"
        for name, value in wanted.items()
        if _read(found, name) != value
    ]


def _read(found: Link, name: str) -> Value:
    match name:
        case "mac":
            return found.mac.hex(":")
        case "mtu":
            return found.mtu
        case "promisc":
            return int(bool(found.flags & IFF_PROMISC))
        case "allmulti":
            return int(bool(found.flags & IFF_ALLMULTI))
        case _:
            return found.tx_queue_length


def _apply(pod: NetlinkSocket, found: Link, wanted: Mapping[str, Value]) -> None:
    get = wanted.get
    length = get("tx_queue_length")
    pod.run(
        link.change(
            found.index,
            mac=parse_mac(str(get("mac", ""))),
            mtu=int(get("mtu", 0)),
            promisc=bool(wanted["promisc"]) if "promisc" in wanted else None,
            allmulti=bool(wanted["allmulti"]) if "allmulti" in wanted else None,
            tx_queue_length=None if length is None else int(length),
        )
    )
