"""Bandwidth of a pod: token buckets on the host end of its pair and on an ifb link.

What the pod receives leaves the host end and is shaped there. What it sends comes in on it and is
redirected to an ifb link of its own, which shapes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Collection

from podwire.errors import KernelError
from podwire.kernel import link, tc
from podwire.kernel.netlink import NetlinkSocket
from podwire.wiring import HostLink, Key, Meter

_IFB_PREFIX = "bwp"
_IFB_LENGTH = 15


def ifb_name(key: Key) -> str:
    """The name of the ifb link of an attachment; two interfaces of one pod have two."""
    digest = hashlib.sha1("\0".join(key[:3]).encode()).hexdigest()
    return _IFB_PREFIX + digest[: _IFB_LENGTH - len(_IFB_PREFIX)]


def _bytes_of(bits: int) -> int:
    return max(1, bits // 8)


class Meters:
    """The meters of one namespace (`netns_fd`; default: the caller's)."""

    def __init__(self, netns_fd: int | None = None) -> None:
        self._host = NetlinkSocket(netns_fd=netns_fd)

    def close(self) -> None:
        self._host.close()

    def add(self, meter: Meter) -> HostLink | None:
        """Shape; returns the ifb link if egress is limited. Raises KernelError; then nothing is
        left."""
        host_end = self._find(meter.host_ifname)
        limits = meter.limits
        with contextlib.ExitStack() as undo:
            undo.callback(self.remove, meter)
            if limits.ingress_rate:
                self._shape(host_end, limits.ingress_rate, limits.ingress_burst)
            ifb = None
            if limits.egress_rate:
                ifb = self._shape_egress(meter, host_end)
            undo.pop_all()
        return ifb

    def host_end(self, ifname: str, netns_fd: int) -> str:
        """The host's end of a pod's veth link. Raises KernelError."""
        with NetlinkSocket(netns_fd=netns_fd) as pod:
            inside = link.find(pod, ifname)
        if inside is None or inside.kind != "veth":
            raise KernelError(f"there is no veth link {ifname} in the pod", errno=errno.ENODEV)
        found = link.find(self._host, inside.link)
        if found is None or found.kind != "veth":
            raise KernelError(f"the host end of {ifname} is not on this host", errno=errno.ENODEV)
        return found.name

    def remove(self, meter: Meter) -> None:
        """Take the limits away; what is gone already is no error."""
        if meter.ifb:
            self._host.run(link.delete(meter.ifb).tolerating(errno.ENODEV))
        host_end = link.find(self._host, meter.host_ifname)
        if host_end is None:
            return
        ours = [q for q in tc.dump(self._host, host_end.index) if q.kind in ("tbf", "ingress")]
        self._host.attempt([tc.delete_qdisc(qdisc) for qdisc in ours])

    def check(self, meter: Meter) -> list[str]:
        """How the live state differs, one sentence each."""
        limits = meter.limits
        wanted = (
            (meter.host_ifname, limits.ingress_rate, limits.ingress_burst),
            (meter.ifb, limits.egress_rate, limits.egress_burst),
        )
        problems: list[str] = []
        for name, rate, burst in wanted:
            if not rate:
                continue
            found = link.find(self._host, name)
            buckets = tc.dump(self._host, found.index) if found else []
            bucket = next((each for each in buckets if each.kind == "tbf"), None)
            if bucket is None:
                problems.append(f"{name} has no token bucket")
            elif (bucket.rate_bytes_s, bucket.burst_bytes) != (_bytes_of(rate), _bytes_of(burst)):
                problems.append(f"{name} is limited to {bucket.rate_bytes_s * 8} bit/s, not {rate}")
        if meter.ifb and not problems:
            host_end, ifb = self._find(meter.host_ifname), self._find(meter.ifb)
            if ifb.index not in tc.redirections(self._host, host_end.index):
                problems.append(f"what comes in on {host_end.name} is not redirected to {ifb.name}")
        return problems

    def reconcile(self, meters: Collection[Meter]) -> None:
        """Remove the ifb links of no meter."""
        known = {meter.ifb for meter in meters}
        strays = [
            link.delete(each.index).tolerating(errno.ENODEV)
            for each in link.dump(self._host, kind="ifb")
            if each.name.startswith(_IFB_PREFIX)
            and len(each.name) == _IFB_LENGTH
            and each.name not in known
        ]
        if strays:
            self._host.run(*strays)

    def _find(self, name: str) -> link.Link:
        found = link.find(self._host, name)
        if found is None:
            raise KernelError(f"there is no link {name}", errno=errno.ENODEV)
        return found

    def _shape(self, target: link.Link, rate: int, burst: int) -> None:
        self._host.run(tc.add_token_bucket(target.index, _bytes_of(rate), _bytes_of(burst)))

    def _shape_egress(self, meter: Meter, host_end: link.Link) -> HostLink:
        end = link.End(meter.ifb, mtu=host_end.mtu)
        self._host.run(link.delete(meter.ifb).tolerating(errno.ENODEV), link.add_ifb(end, up=True))
        ifb = self._find(meter.ifb)
        self._shape(ifb, meter.limits.egress_rate, meter.limits.egress_burst)
        self._host.run(
            tc.add_ingress(host_end.index).tolerating(errno.EEXIST),
            tc.redirect_ingress(host_end.index, ifb.index),
        )
        return HostLink(ifb.name, ifb.mac, ifb.mtu)
