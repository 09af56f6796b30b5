"""A world of real packets: one node in a namespace, and what is around it in another.

Packets enter by the pod side (`cbr0`), the uplink (`eth0`) or a raw socket on the node. They are
seen where they leave by one of the two links, and (by nflog, after all other hooks) where they are
delivered to the node itself. One topology serves all cases; a case brings its node addresses, its
configuration and a fresh data path.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import struct
import time
from dataclasses import dataclass

from podwire.datapath import Part
from podwire.kernel import link, netlink, netns, route, sysctl
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket
from podwire.kernel.nftables import NfTables
from podwire.net import Protocol, parse_address
from podwire.services import ServiceTable
from podwire.services.stale import Flow, StaleFlows
from tests.conformance import service_packets as packets
from tests.conformance.service_cases import (
    MASQUERADED,
    POD_SIDE,
    UPLINK,
    Cluster,
    Probe,
    Seen,
)
from tests.conformance.service_packets import Wire
from tests.conformance.service_parts import parts_of

_SENTINEL = {4: "198.18.77.77", 16: "fd00:ffff::77"}
"""Somewhere beyond the uplink that no case knows."""
_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33
_PACKET_IGNORE_OUTGOING = 23
_LOG_GROUP = 7
_BURST = 200
"""Packets sent before looking: a busy kernel drops what is beyond `netdev_max_backlog` (1,000)."""
_SYSCTLS = {
    "net.ipv4.ip_forward": 1,
    "net.ipv6.conf.all.forwarding": 1,
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
    "net.ipv4.conf.all.send_redirects": 0,
    "net.ipv4.conf.default.send_redirects": 0,
    "net.ipv4.icmp_ratemask": 0,
    "net.ipv6.icmp.ratemask": "255",
    "net.ipv6.conf.default.accept_dad": 0,
}
_OBSERVER = f"""
table inet conformance {{
  chain input {{
    type filter hook input priority 300; policy accept;
    log group {_LOG_GROUP} snaplen 400
  }}
}}
"""


@dataclass
class _Connection:
    probe: Probe
    number: int
    seen: Seen
    packet: bytes
    left_by: str
    sequence: int
    acknowledged: int = 0


class Net:
    """See `tests.conformance.service_proxy.World`. A context manager; needs root."""

    def __init__(self, datapath: str) -> None:
        self._datapath = datapath
        self._close = contextlib.ExitStack()
        self._part: Part[ServiceTable] | None = None
        self._empty: ServiceTable | None = None
        self._table: ServiceTable | None = None
        self._number = 0
        self._connections: dict[str, _Connection] = {}
        self._configured: list[str] = []

    def __enter__(self) -> Net:
        try:
            self._build()
        except BaseException:
            self._close.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._close.close()

    # --- topology ---------------------------------------------------------------------------------

    def _build(self) -> None:
        self.node, self._around = netns.create(), netns.create()
        for fd in (self.node, self._around):
            self._close.callback(os.close, fd)
        self._parts = parts_of(self._datapath, self.node)
        self._close.callback(self._parts.close)
        sysctl.write(_SYSCTLS, self.node)
        sysctl.write({"net.ipv6.conf.default.disable_ipv6": 1}, self._around)
        with NetlinkSocket(netns_fd=self.node) as sock:
            sock.run(
                link.add_veth(End(POD_SIDE), End("pods", self._around)),
                link.add_veth(End(UPLINK), End("world", self._around)),
            )
        self._ip("link set lo up")
        for name in (POD_SIDE, UPLINK):
            self._ip(
                f"link set {name} arp off addrgenmode none up",
                f"addr add {MASQUERADED[4]}/32 dev {name}",
                f"addr add {MASQUERADED[16]}/128 dev {name} nodad",
            )
        self._ip(f"route add default dev {UPLINK}", f"route add ::/0 dev {UPLINK}")
        _ip_batch(self._around, ["link set pods up", "link set world up"])
        self._frames = {name: self._frame_socket(name) for name in ("pods", "world")}
        self.nft = NfTables(self.node)
        self._close.callback(self.nft.close)
        self.nft.run(_OBSERVER)
        self._log = self._log_socket()
        self._raw = {
            4: netns.socket(self.node, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
            16: netns.socket(self.node, socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW),
        }
        self._conntrack = netns.socket(
            self.node, socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETFILTER
        )
        for sock in (*self._raw.values(), self._conntrack):
            self._close.callback(sock.close)
        self._macs = {"pods": self._mac(POD_SIDE), "world": self._mac(UPLINK)}
        # On one CPU packets are worked off in the order they were sent, so that a sentinel that
        # has come through says that those before it have.
        allowed = os.sched_getaffinity(0)
        self._close.callback(os.sched_setaffinity, 0, allowed)
        os.sched_setaffinity(0, {min(allowed)})
        self._await_links()

    def _await_links(self) -> None:
        """A link drops what it is given until a worker of the kernel has noticed its carrier."""
        for _ in range(100):
            with contextlib.suppress(TimeoutError):
                self._observe({}, wait_s=0.5)
                return
        raise TimeoutError("the links do not come up")

    def _ip(self, *commands: str) -> None:
        _ip_batch(self.node, commands)

    def _mac(self, name: str) -> bytes:
        with NetlinkSocket(netns_fd=self.node) as sock:
            found = link.find(sock, name)
        assert found
        return found.mac

    def _frame_socket(self, name: str) -> socket.socket:
        sock = netns.socket(self._around, socket.AF_PACKET, socket.SOCK_RAW)
        self._close.callback(sock.close)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 32 << 20)
        sock.setsockopt(263, _PACKET_IGNORE_OUTGOING, 1)
        sock.bind((name, _ETH_P_ALL))
        sock.setblocking(False)
        return sock

    def _log_socket(self) -> socket.socket:
        sock = netns.socket(self.node, socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETFILTER)
        self._close.callback(sock.close)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 32 << 20)
        bind = netlink.attr(1, struct.pack(">B", 1))  # NFULA_CFG_CMD: NFULNL_CFG_CMD_BIND
        copy = netlink.attr(2, struct.pack(">IBx", 400, 2))  # NFULA_CFG_MODE: copy packets
        at_once = netlink.attr(5, struct.pack(">I", 1))  # NFULA_CFG_QTHRESH
        body = struct.pack(">BBH", 0, 0, _LOG_GROUP) + bind + copy + at_once
        sock.send(struct.pack("=IHHII", 16 + len(body), 4 << 8 | 1, 5, 1, 0) + body)
        answer = sock.recv(4096)
        assert struct.unpack_from("=i", answer, 16)[0] == 0
        sock.setblocking(False)
        return sock

    # --- a case -----------------------------------------------------------------------------------

    def begin(self, cluster: Cluster, family: str) -> None:
        self.end()
        self._configured = [
            f"addr add {_text(address)}/{len(address) * 8} dev lo{' nodad' * (len(address) == 16)}"
            for address in cluster.node.addresses
        ]
        if cluster.pod_cidr:
            self._configured.append(f"route add {cluster.pod_cidr} dev {POD_SIDE}")
        self._ip(*self._configured)
        with NetlinkSocket(netns_fd=self.node) as sock:
            assert route.await_local(sock, cluster.node.addresses, 10)
        self._size = 4 if family == "IPv4" else 16
        self._part = self._parts.make(cluster.config)
        self._empty = cluster.compiler.table
        for requirement in self._part.requirements:
            sysctl.write({requirement.sysctl: requirement.value}, self.node)
        self._part.start()
        self._table = None
        self.apply(self._empty)

    def end(self) -> list[str]:
        left: list[str] = []
        if self._part is not None and self._empty is not None:
            left = self._parts.take_away(self._part, self._empty)
            self._part = None
        undo = [
            command.replace(" add ", " del ").replace(" nodad", "") for command in self._configured
        ]
        self._configured = []
        if undo:
            self._ip(*undo)
            self.forget()
        return left

    def apply(self, table: ServiceTable) -> None:
        assert self._part
        self._part.apply(table)
        self._part.flush()
        stale = StaleFlows(table.delta(self._table).ports.values(), table.settings)
        self._table = table
        if stale and self._connections:
            self._delete_stale(stale)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def forget(self) -> None:
        """Empty the node's connection table."""
        self._connections.clear()
        connections = getattr(self._part, "connections", None)
        if connections is not None:  # the data path keeps its own
            connections.clear()
            return
        body = struct.pack(">BBH", 0, 0, 0)
        head = struct.pack("=IHHII", 16 + len(body), 1 << 8 | 2, 5, 1, 0)
        self._conntrack.send(head + body)
        assert struct.unpack_from("=i", self._conntrack.recv(4096), 16)[0] == 0

    def _delete_stale(self, stale: StaleFlows) -> None:
        listed = netns.run(self.node, ["conntrack", "-L", "-p", "udp"]).stdout
        for line in listed.splitlines():
            said = re.findall(r"(src|dst|sport|dport)=(\S+)", line)
            (_, source), (_, destination), (_, sport), (_, dport) = said[:4]
            (_, reply_source), _, (_, reply_sport), _ = said[4:8]
            flow = Flow(
                parse_address(destination),
                int(dport),
                parse_address(reply_source),
                int(reply_sport),
            )
            if flow in stale:
                command = ["conntrack", "-D", "-p", "udp", "-s", source, "-d", destination]
                netns.run(self.node, [*command, "--sport", sport, "--dport", dport])

    # --- packets ----------------------------------------------------------------------------------

    def connect(self, probes: list[Probe]) -> list[Seen]:
        seen: list[Seen] = []
        for first in range(0, len(probes), _BURST):
            numbered = dict(enumerate(probes[first : first + _BURST], self._number + 1))
            self._number += len(numbered)
            for number, probe in numbered.items():
                self._send_first(probe, number)
            found = self._observe(numbered)
            seen += [self._judge(probe, found.get(number)) for number, probe in numbered.items()]
        return seen

    def open(self, label: str, probe: Probe) -> Seen:
        self._number += 1
        number = self._number
        self._send_first(probe, number)
        found = self._observe({number: probe}).get(number)
        seen = self._judge(probe, found)
        packet, place = found[:2] if found else (b"", "")
        self._connections[label] = _Connection(probe, number, seen, packet, place, number)
        return seen

    def proceed(self, label: str) -> Seen:
        connection = self._connections[label]
        probe = connection.probe
        self._number += 1
        number = self._number
        if probe.protocol == Protocol.TCP:
            packet = self._segment(connection, packets.ACK | packets.PSH, number)
        else:
            ports = (probe.source_port, probe.destination_port)
            packet = packets.first(probe.source, probe.destination, probe.protocol, ports, number)
        self._send(probe.origin, packet)
        return self._judge(probe, self._observe({number: probe}).get(number))

    def reply(self, label: str) -> tuple[tuple[str, int], tuple[str, int]]:
        connection = self._connections[label]
        got = packets.parse(connection.packet)
        self._number += 1
        number = self._number
        ports = (got.destination_port, got.source_port)
        ends = (got.destination, got.source)
        if got.protocol == Protocol.TCP:
            flags, sequence = packets.SYN | packets.ACK, number << 8
            tag = packets.marker(number)
            answer = packets.tcp(*ends, ports, flags, sequence, connection.sequence + 1, tag)
        else:
            answer = packets.first(*ends, Protocol(got.protocol), ports, number)
        self._inject(connection.left_by, answer)
        back, _ = self._observe({number: connection.probe})[number]
        seen = packets.parse(back)
        if got.protocol == Protocol.TCP:
            connection.sequence += 1
            connection.acknowledged = (number << 8) + 1
            self._number += 1
            acknowledgement = self._segment(connection, packets.ACK, self._number)
            self._send(connection.probe.origin, acknowledgement)
            self._observe({self._number: connection.probe})
        return (
            (seen.source, seen.source_port),
            (seen.destination, seen.destination_port),
        )

    def icmp_error(self, label: str) -> tuple[str, tuple[str, int], tuple[str, int]]:
        connection = self._connections[label]
        got = packets.parse(connection.packet)
        error = packets.icmp_port_unreachable(connection.packet, got.destination, got.source)
        self._inject(connection.left_by, error)
        back, _ = self._observe({connection.number: connection.probe}, errors=True)[
            connection.number
        ]
        delivered = packets.parse(back)
        inner = delivered.quoted
        return (
            delivered.destination,
            (inner.source, inner.source_port),
            (inner.destination, inner.destination_port),
        )

    def _segment(self, connection: _Connection, flags: int, number: int) -> bytes:
        probe = connection.probe
        ports = (probe.source_port, probe.destination_port)
        numbers = (connection.sequence, connection.acknowledged)
        tag = packets.marker(number)
        return packets.tcp(probe.source, probe.destination, ports, flags, *numbers, tag)

    def _send_first(self, probe: Probe, number: int) -> None:
        ports = (probe.source_port, probe.destination_port)
        packet = packets.first(probe.source, probe.destination, probe.protocol, ports, number)
        self._send(probe.origin, packet)

    def _send(self, origin: str, packet: bytes) -> None:
        if origin != "host":
            self._inject("pods" if origin == "pod" else "world", packet)
            return
        size = 4 if packet[0] >> 4 == 4 else 16
        with contextlib.suppress(PermissionError):  # how the kernel tells of a drop on output
            self._raw[size].sendto(packet, (packets.parse(packet).destination, 0))

    def _inject(self, place: str, packet: bytes) -> None:
        kind = packets.ETHERTYPES[4 if packet[0] >> 4 == 4 else 16]
        frame = self._macs[place] + b"\x02\0\0\0\0\1" + struct.pack(">H", kind) + packet
        self._frames[place].send(frame)

    # --- observation ------------------------------------------------------------------------------

    def _observe(
        self, probes: dict[int, Probe], *, errors: bool = False, wait_s: float = 20
    ) -> dict[int, tuple[bytes, str]]:
        """What became of each marked packet: the packet as it was last seen, and where.

        Refusals count only for packets that were seen nowhere else (`errors`: refusals only).
        Everything sent before has been worked off when three sentinels have come through.
        """
        sentinels = self._send_sentinels()
        found: dict[int, tuple[bytes, str]] = {}
        refused: dict[int, tuple[bytes, str]] = {}
        by_ends = {
            (probe.source, probe.source_port, probe.destination, probe.destination_port): number
            for number, probe in probes.items()
        }
        deadline = time.monotonic() + wait_s
        while sentinels:
            if time.monotonic() > deadline:
                raise TimeoutError(f"lost: {', '.join(sentinels.values())}")
            for packet, place in self._captured():
                wire = packets.parse(packet)
                number = packets.find_marker(packet)
                if number is None and wire.is_error:
                    number = by_ends.get(wire.answered)
                if number in sentinels:
                    del sentinels[number]
                elif number in probes:
                    (refused if wire.is_error else found)[number] = (packet, place)
        return refused if errors else {**refused, **found}

    def _send_sentinels(self) -> dict[int, str]:
        numbers: dict[int, str] = {}
        for origin, source, destination in (
            ("pod", "198.18.77.1", _SENTINEL[4]),
            ("external", "198.18.77.2", _SENTINEL[4]),
            ("host", MASQUERADED[4], MASQUERADED[4]),
        ):
            self._number += 1
            numbers[self._number] = origin
            ports = (9, 9)
            self._send(
                origin, packets.first(source, destination, Protocol.UDP, ports, self._number)
            )
        return numbers

    def _captured(self) -> list[tuple[bytes, str]]:
        """Packets seen since the last call, with the place; waits a little for the first."""
        select.select([*self._frames.values(), self._log], [], [], 0.1)
        out: list[tuple[bytes, str]] = []
        for place, sock in self._frames.items():
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = sock.recv(2048)
                    if frame[12:14] in (b"\x08\0", b"\x86\xdd"):
                        out.append((frame[14:], place))
        with contextlib.suppress(BlockingIOError):
            while True:
                out += [(packet, "node") for packet in _logged(self._log.recv(1 << 17))]
        return out

    def _judge(self, probe: Probe, found: tuple[bytes, str] | None) -> Seen:
        if found is None:
            return Seen("drop")
        wire = packets.parse(found[0])
        if wire.is_error:
            return Seen("reject")
        there = (probe.destination, probe.destination_port)
        at = (wire.destination, wire.destination_port)
        if probe.protocol in (Protocol.ICMP, Protocol.ICMPV6):
            there, at = (probe.destination, 0), (wire.destination, 0)
        if parse_address(there[0]) == parse_address(at[0]) and there[1] == at[1]:
            if wire.source != probe.source:
                return Seen("accept, but masqueraded")
            return Seen("accept")
        return Seen("dnat", _endpoint(wire), wire.source)


def _endpoint(wire: Wire) -> str:
    host = f"[{wire.destination}]" if ":" in wire.destination else wire.destination
    return f"{host}:{wire.destination_port}"


def _logged(data: bytes) -> list[bytes]:
    """The packets of one nflog datagram."""
    out: list[bytes] = []
    offset = 0
    while offset + 20 <= len(data):
        length, kind = struct.unpack_from("=IH", data, offset)
        if kind == 4 << 8:  # NFULNL_MSG_PACKET
            payload = netlink.attributes(data[offset : offset + length], 20).get(9)
            if payload:
                out.append(payload)
        offset += (length + 3) & ~3
    return out


def _ip_batch(fd: int, commands: list[str] | tuple[str, ...]) -> None:
    done = netns.run(fd, ["ip", "-batch", "-"], stdin="\n".join(commands) + "\n")
    if done.returncode:
        raise RuntimeError(f"ip: {done.stderr.strip()} in {commands}")


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
