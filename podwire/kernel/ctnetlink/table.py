"""The connection table of one network namespace: dumps that do not pile up, deletes, figures."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from podwire.errors import KernelError
from podwire.kernel import netlink, netns, sysctl
from podwire.kernel.ctnetlink import filters
from podwire.kernel.ctnetlink.ahead import read_ahead
from podwire.kernel.ctnetlink.counting import FlowKey, count_flows
from podwire.kernel.ctnetlink.entries import (
    NFGENMSG,
    Entry,
    Message,
    create_request,
    delete_request,
    parse,
)
from podwire.kernel.ctnetlink.filters import EVERYTHING, Filter

_RECEIVE_BYTES = 65536  # the kernel fills at most 32 kB of it
_PROC_STAT = Path("/proc/net/stat/nf_conntrack")
_REPEATED = frozenset({"entries"})  # the same figure on every CPU's line
_BATCH = 1024

# CTA_STATS_…; what newer kernels no longer fill in is left out
_CPU_STATS = {
    2: "found", 4: "invalid", 8: "insert", 9: "insert_failed", 10: "drop", 11: "early_drop",
    12: "error", 13: "search_restart", 14: "clash_resolve", 15: "chaintoolong",
}  # fmt: skip


class Usage(NamedTuple):
    """How full the table is."""

    used: int
    limit: int
    """nf_conntrack_max: one number for all namespaces, compared with each one's own count."""


class Table:
    """The table of a namespace (a descriptor; default: the caller's). Usable from any thread."""

    name = "kernel"

    def __init__(self, netns_fd: int | None = None) -> None:
        self._netns = os.dup(netns_fd) if netns_fd is not None else netns.current()
        self._socket = netlink.NetlinkSocket(netlink.NETFILTER, self._netns)

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        os.close(self._netns)

    @property
    def netns_fd(self) -> int:
        return self._netns

    # --- figures ----------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """Count and limit, in one message (kernels that leave the limit out: from the sysctl)."""
        request = netlink.Request(Message.GET_STATS, 0, NFGENMSG.pack(0, 0, 0), "count entries")
        found = netlink.attributes(self._socket.run(request)[0], NFGENMSG.size)
        used, limit = (int.from_bytes(found.get(kind, b""), "big") for kind in (1, 2))
        return Usage(used, limit or int(sysctl.read("net.netfilter.nf_conntrack_max", self._netns)))

    def cpu_statistics(self) -> dict[int, dict[str, int]]:
        """What `conntrack -S` prints, by CPU and name. Counters since the namespace began."""
        out: dict[int, dict[str, int]] = {}
        bodies = self._socket.dump(
            Message.GET_STATS_CPU, NFGENMSG.pack(0, 0, 0), "connection table statistics"
        )
        for body in bodies:
            _, _, cpu = NFGENMSG.unpack_from(body)
            out[cpu] = {
                _CPU_STATS[kind]: int.from_bytes(value, "big")
                for kind, value in netlink.attributes(body, NFGENMSG.size).items()
                if kind in _CPU_STATS
            }
        return out

    def statistics(self) -> dict[str, int]:
        """All counters summed over CPUs, by name, from netlink and /proc/net/stat together."""
        out = self.proc_statistics()
        totals: dict[str, int] = {}
        for counters in self.cpu_statistics().values():
            for name, value in counters.items():
                totals[name] = totals.get(name, 0) + value
        return out | totals

    def proc_statistics(self) -> dict[str, int]:
        """/proc/net/stat/nf_conntrack summed over CPUs; the header differs by kernel."""
        try:
            text = netns.call(self._netns, _PROC_STAT.read_text)
        except FileNotFoundError:
            return {}  # CONFIG_NF_CONNTRACK_PROCFS is off
        return sum_proc_statistics(text)

    # --- read -------------------------------------------------------------------------------------

    def datagrams(self, filter_: Filter = EVERYTHING) -> Iterator[bytes]:
        """The raw dump, piece by piece: whole messages, nothing else. Filtered as the kernel can.

        Each dump has a socket of its own, so that one left half read disturbs nobody.
        """
        able = filters.abilities().dump if filter_ else frozenset[str]()
        for family in filter_.families:
            kinds = filter_.kinds(family) & able
            yield from self._dump(filter_.body(family, kinds))

    def entries(self, filter_: Filter = EVERYTHING) -> Iterator[Entry]:
        """The entries that fit the filter, parsed in full."""
        for datagram in self.datagrams(filter_):
            for entry in entries_of(datagram):
                if filter_.fits(entry):
                    yield entry

    def flow_counts(self, filter_: Filter = EVERYTHING) -> Iterator[dict[FlowKey, int]]:
        """Entries by FlowKey, in portions; the filter only as far as the kernel filters."""
        return count_flows(read_ahead(self.datagrams(filter_)))

    def count(self, filter_: Filter) -> int:
        """How many entries fit; quick where the kernel filters so."""
        able = filters.abilities().dump
        if all(filter_.kinds(family) <= able for family in filter_.families):
            return sum(sum(portion.values()) for portion in self.flow_counts(filter_))
        return sum(1 for _ in self.entries(filter_))

    def _dump(self, body: bytes) -> Iterator[bytes]:
        sequence = 1
        flags = netlink.NLM_F_REQUEST | netlink.NLM_F_DUMP
        done = struct.pack("=IHHI", 20, netlink.NLMSG_DONE, 2, sequence)
        with netns.socket(
            self._netns, socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETFILTER
        ) as sock:
            sock.send(netlink.message(Message.GET, flags, sequence, body))
            while True:
                datagram = sock.recv(_RECEIVE_BYTES)
                kind = datagram[4] | datagram[5] << 8 if len(datagram) >= 16 else netlink.NLMSG_DONE
                if kind in (netlink.NLMSG_ERROR, netlink.NLMSG_DONE):
                    (code,) = struct.unpack_from("=i", datagram, 16)
                    if code:
                        raise _refused("list the connection table", -code)
                    return
                if datagram[-20:-8] == done:
                    yield datagram[:-20]
                    return
                yield datagram

    # --- change -----------------------------------------------------------------------------------

    def create(self, entries: Iterable[Entry]) -> dict[Entry, netlink.Failure]:
        """Make entries; those that the kernel refused (EEXIST: there is one already) come back."""
        requests = {create_request(entry): entry for entry in entries}
        failures = self._socket.attempt(list(requests))[1]
        return {requests[failure.request]: failure for failure in failures}

    def delete(self, filter_: Filter) -> None:
        """Delete what fits; the kernel does not tell how many (see `count`).

        In the kernel where it can filter so, else by dump and delete. Raises KernelError, and
        ValueError for a filter that leaves nothing out.
        """
        if not filter_:
            raise ValueError("a filter that fits everything")
        able = filters.abilities().delete
        for family in filter_.families:
            kinds = filter_.kinds(family)
            if kinds <= able:
                body = filter_.body(family, kinds)
                request = netlink.Request(Message.DELETE, 0, body, "delete entries by a filter")
                self._socket.run(request)
            else:
                own = filter_._replace(family=family)
                self.delete_entries(list(self.entries(own)))

    def delete_entries(self, entries: Iterable[Entry]) -> int:
        """Delete exactly these, by tuple, zone and id; how many were still there."""
        requests = [delete_request(entry) for entry in entries]
        gone = 0
        for start in range(0, len(requests), _BATCH):
            batch = requests[start : start + _BATCH]
            _, failures = self._socket.attempt(batch)
            for failure in failures:
                if failure.errno not in (errno.ENOENT, errno.EBUSY):
                    raise failure.error()
            gone += len(batch) - len(failures)
        return gone


def entries_of(datagram: bytes) -> Iterator[Entry]:
    """The entries in a piece of a dump."""
    for _, _, _, body in netlink.messages(datagram):
        entry = parse(body)
        if entry is not None:
            yield entry


def sum_proc_statistics(text: str) -> dict[str, int]:
    """The table in /proc/net/stat/nf_conntrack (hexadecimal, one line per CPU) by header name."""
    lines = text.splitlines()
    names = lines[0].split() if lines else []
    out: dict[str, int] = {}
    for line in lines[1:]:
        for name, value in zip(names, line.split(), strict=False):
            number = int(value, 16)
            out[name] = number if name in _REPEATED else out.get(name, 0) + number
    return out


def _refused(what: str, code: int) -> KernelError:
    return KernelError(f"cannot {what}: {os.strerror(code)}", errno=code)
