"""From netfilter to eBPF and back under traffic: no connection breaks, nothing is let through.

There: our maps are complete and hold the connections of the kernel's table before the first packet
is ours, so that no new connection gets the ports of one of these. Then all begin with us, and those
that the kernel has stay with it; no more of these begin, so that a second reading finds each as it
will remain. Connections with a process of the node at one end stay with netfilter
(`entries.pairs`).

Back: netfilter is told of the connections that it sees already (`announce`), and its rules are
made. Once they are complete, it is told of those that it does not see. Then we begin no more, write
what it lacks into the kernel's table, and from one packet to the next all packets are netfilter's.

A port that was just another connection's is nothing rare: a busy client comes around in seconds,
and the kernel remembers for two minutes. So what one table says of a connection is written into the
other only while nobody can begin another of the same ports there.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Set
from contextlib import contextmanager

from podwire.datapath.ebpf import entries, pinned
from podwire.datapath.ebpf.connections import DATAGRAM_S, ESTABLISHED_S, SCTP_S
from podwire.datapath.ebpf.entries import Node
from podwire.datapath.ebpf.layout import NUMBER, SETTINGS, ConnectionFlag, Phase, unmapped
from podwire.datapath.ebpf.pinned import PinnedMaps
from podwire.datapath.ebpf.programs import Programs
from podwire.kernel import address, sysctl
from podwire.kernel.ctnetlink import Entry, Status, Table, TcpState
from podwire.net import Protocol

# what it has already, and what it could not send back by another way than it came
_NOT_FOR_NETFILTER = ConnectionFlag.STACK | ConnectionFlag.DSR | ConnectionFlag.LED
_LOOSE = "net.netfilter.nf_conntrack_tcp_loose"
_FIRST = NUMBER.pack(0)
_ENDING_S = 120
_OPENING = (TcpState.SYN_SENT, TcpState.SYN_RECV)
_TRIES = 3


def join(programs: Programs, table: Table) -> list[Entry]:
    """Put programs whose maps are complete in force beside netfilter's rules, which may go then.

    Returns the kernel's entries that are ours alone now. After a process died over it: goes on.
    """
    with programs.lock:
        if programs.phase is Phase.SERVING:
            return []
        if programs.phase is not Phase.JOINING:
            programs.attach(Phase.WAITING)
            # the pods' sockets have told of their connections (Connections.adopt), but
            # not what netfilter makes of them
            programs.connections.clear()
            copied = _copy(table.entries(), programs)
            programs.connections.add({key: pair[key] for pair in copied for key in pair})
            programs.set_phase(Phase.JOINING)
        programs.growing["connections"].settle()  # nothing begins with netfilter any more
        found: list[Entry] = []
        for _ in range(2):  # what had no entry until the first time may have ended during it
            held = programs.growing["connections"].read()
            found = list(table.entries())
            programs.connections.correct(held, _copy(found, programs))
        programs.set_phase(Phase.SERVING)
        own = address.own(programs.netns_fd)
        return [entry for entry in found if entries.is_carried(entry, own)]


def _copy(found: Iterable[Entry], programs: Programs) -> Iterator[dict[bytes, bytes]]:
    """Our two entries for each of these, where we need any."""
    pods = [*programs.maps["endpoints"].items(), *programs.growing["subjects"].map.items()]
    node = Node(
        address.own(programs.netns_fd),
        frozenset(unmapped(key) for key, _ in pods),
        entries.services(programs.growing["frontends"].read()),
    )
    now_s = int(time.clock_gettime(time.CLOCK_MONOTONIC))
    return (dict(entries.pairs(entry, node, now_s)) for entry in found)


def announce(node: str, table: Table) -> None:
    """Call before netfilter's rules are made but once it tracks, while programs of `node` serve.

    Connections of the node's own processes that the programs translate pass netfilter first. It
    would take the next packet of one for its first and translate it, too, to who knows where; what
    it has an entry of is let alone, and so is what begins from now on. Raises KernelError.
    """
    own = address.own(table.netns_fd)
    with PinnedMaps(node) as maps:
        table.create(
            entry._replace(
                reply=entry.original.reversed(),
                status=entry.status & ~(Status.SRC_NAT | Status.DST_NAT),
            )
            for entry in _leaving(maps)
            if entry.original.source in own and not entries.is_over(entry)
        )


def leave(node: str, table: Table) -> int:
    """Hand over to netfilter, whose rules are complete, and remove everything of ours.

    Returns how many of the connections of `node` the kernel did not take.

    Raises KernelError, also for maps of another layout: nothing is removed then.
    """
    refused = 0
    with PinnedMaps(node) as maps:
        if _phase(maps) is not Phase.SERVING:  # a process died over it, perhaps in `_strict`
            sysctl.write({_LOOSE: 1}, table.netns_fd)
        if _phase(maps) is not Phase.WAITING:  # else netfilter carries everything already
            told = _foretell(maps, table)
            _set_phase(maps, Phase.LEAVING)
            with _strict(table):
                table.delete_entries(_untranslated(maps, table))
                refused = _make(table, list(_lacking(maps, table, told)))
                _set_phase(maps, Phase.WAITING)
    pinned.remove(node)
    return refused


def _foretell(maps: PinnedMaps, table: Table) -> set[Entry]:
    """Make entries of connections that netfilter does not see, so that it gives their ports to no
    other; which it has now.
    """
    own = address.own(table.netns_fd)
    hidden = {entry for entry in _leaving(maps) if entries.is_carried(entry, own)}
    return hidden - table.create(hidden).keys()


def _untranslated(maps: PinnedMaps, table: Table) -> list[Entry]:
    """What netfilter noted of connections of the node's processes to Services, as these look before
    we translate them. While one is there, nothing from that port is translated.
    """
    own = address.own(table.netns_fd)
    services = entries.services(dict(maps.items("frontends")))
    return [
        entry
        for entry in table.entries()
        if _is_plain(entry)
        and any(
            # an answer may have been the first packet that it saw
            direction.source in own and entries.service(direction, services)
            for direction in (entry.original, entry.reply)
        )
    ]


def _is_plain(entry: Entry) -> bool:
    """Whether its addresses and ports stay as they are."""
    return entry.reply == entry.original.reversed()


def _lacking(maps: PinnedMaps, table: Table, told: Set[Entry]) -> Iterator[Entry]:
    """Those that go on and are not netfilter's yet.

    Since it tracks, it has all that processes of the node begin, and translates them before we see
    them, unless we do it.
    """
    own = address.own(table.netns_fd)
    for entry in _leaving(maps):
        its = entry in told or (_is_plain(entry) and entry.original.source in own)
        if not its and not entries.is_over(entry):
            yield entry


@contextmanager
def _strict(table: Table) -> Generator[None]:
    """Let netfilter take no TCP packet but a SYN for the first of a connection.

    It sees those of connections whose entries are being exchanged, and must not translate them.
    """
    usual = sysctl.read(_LOOSE, table.netns_fd)
    sysctl.write({_LOOSE: 0}, table.netns_fd)
    try:
        yield
    finally:
        sysctl.write({_LOOSE: usual}, table.netns_fd)


def _leaving(maps: PinnedMaps) -> Iterator[Entry]:
    for entry, flags in entries.kernel_entries(dict(maps.items("connections"))):
        known = entry.original.protocol in entries.PROTOCOLS and entry.state != TcpState.CLOSE
        if known and not flags & _NOT_FOR_NETFILTER:
            timed = entry._replace(timeout_s=_timeout_s(entry))
            yield _grown_up(timed) if entry.state in _OPENING else timed


def _grown_up(entry: Entry) -> Entry:
    """A handshake goes on here until netfilter carries it; it takes a later packet for invalid if
    it waits for an earlier one, but not the other way round.
    """
    status = entry.status | Status.SEEN_REPLY | Status.ASSURED
    return entry._replace(state=TcpState.ESTABLISHED, status=status)


def _make(table: Table, wanted: list[Entry]) -> int:
    """Make entries in the place of any that are in their way; how many the kernel refused.

    In the way are old ones of the same connection, and what the kernel made of the packets that it
    saw behind our programs; it may do so again before ours is there.
    """
    refused = 0
    for _ in range(_TRIES):
        table.delete_entries(wanted)
        table.delete_entries(Entry(each.reply, each.reply.reversed()) for each in wanted)
        refused = len(table.create(wanted))
        if not refused:
            break
    return refused


def _timeout_s(entry: Entry) -> int:
    if entry.original.protocol == Protocol.UDP:
        return DATAGRAM_S
    if entry.original.protocol == Protocol.SCTP:
        return SCTP_S
    return ESTABLISHED_S if entry.state in (TcpState.ESTABLISHED, None) else _ENDING_S


def _phase(maps: PinnedMaps) -> Phase:
    return Phase(SETTINGS.unpack(maps["settings"].lookup(_FIRST) or bytes(SETTINGS.size))[-2])


def _set_phase(maps: PinnedMaps, phase: Phase) -> None:
    """For all programs at once; returns when no packet is under way in another phase."""
    settings = maps["settings"]
    *others, _, policies = SETTINGS.unpack(settings.lookup(_FIRST) or bytes(SETTINGS.size))
    settings.update(_FIRST, SETTINGS.pack(*others, phase, policies))
    connections = maps["connections"]
    current = connections.inner(_FIRST)
    if current is not None:  # the kernel waits for a grace period when a slot is written
        connections.update(_FIRST, NUMBER.pack(current.fd))
        current.close()
