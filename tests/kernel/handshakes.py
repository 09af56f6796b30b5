"""TCP by hand: packets are sent when a test says so, and followed to where they arrive."""

import itertools
import select
import socket
import struct
import time
from typing import NamedTuple

from podwire.kernel import netns
from podwire.net import format_address
from tests.conformance.service_packets import ACK, PSH, SYN, tcp

FIN = 1
# before conntrack, which would take a connection that is reset for ended
_QUIET = """
add table inet quiet
add chain inet quiet out { type filter hook output priority -400; }
add rule inet quiet out tcp flags & rst == rst drop
"""
PATIENCE_S = 2.0  # what is delivered arrives in microseconds, but may have to wait for a CPU


class Arrived(NamedTuple):
    """A segment where it was taken in."""

    space: str
    source: str
    source_port: int
    destination_port: int
    sequence: int


class Wire:
    """Raw sockets in namespaces, which answer nothing by themselves; close it."""

    def __init__(self, world, spaces):
        self._receivers, self._senders = {}, {}
        for name in spaces:
            space = world.spaces[name]
            world.run(space, "nft", _QUIET)
            for family in (socket.AF_INET, socket.AF_INET6):
                receiver = netns.socket(space, family, socket.SOCK_RAW, socket.IPPROTO_TCP)
                receiver.setblocking(False)
                self._receivers[receiver] = name
                sender = netns.socket(space, family, socket.SOCK_RAW, socket.IPPROTO_RAW)
                self._senders[name, family] = sender

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for each in (*self._receivers, *self._senders.values()):
            each.close()

    def send(self, space, source, destination, flags, sequence, acknowledged):
        """The segment as it arrives somewhere, or None. Ends are ``(address, port)``."""
        ports = source[1], destination[1]
        packet = tcp(source[0], destination[0], ports, flags, sequence, acknowledged, bytes(8))
        family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
        self._senders[space, family].sendto(packet, (destination[0], 0))
        deadline = time.monotonic() + PATIENCE_S
        while (left := deadline - time.monotonic()) > 0:
            for receiver in select.select(list(self._receivers), [], [], left)[0]:
                found = self._read(receiver)
                if found.sequence == sequence:
                    return found
        return None

    def _read(self, receiver):
        packet, peer = receiver.recvfrom(2000)
        source = peer[0].split("%")[0]
        if receiver.family == socket.AF_INET:  # IPv6 comes without its header
            source, packet = format_address(packet[12:16]), packet[(packet[0] & 15) * 4 :]
        source_port, destination_port, sequence = struct.unpack_from(">HHI", packet)
        return Arrived(self._receivers[receiver], source, source_port, destination_port, sequence)


class Dialogue:
    """One connection from ``(address, port)`` in a namespace to `target`.

    `servers` are the addresses of who may answer, by namespace, and all at port 80. `wrong` tells
    of the first packet that did not arrive where it should.
    """

    _numbers = itertools.count(1_000_000, 10_000)

    def __init__(self, wire, name, client, target, servers):
        self.name, self.target = name, target
        self._wire, self._addresses = wire, servers
        self._space, self.client = client
        self._sequence = next(self._numbers)
        self._answers = self._sequence + 5_000
        self._server = self._peer = None
        self.stages = [self.open, self.accept, self.confirm, self.answer]
        self.wrong = ""

    @property
    def ends(self):
        """As they look to the server."""
        return self._server, self._peer

    def advance(self, when):
        """Send the next packet of the handshake."""
        self.stages.pop(0)(when)

    def finish(self):
        """What is left of the handshake, and more from both ends."""
        while self.stages:
            self.advance("the end")
        self.ask("the end")
        self.answer("the end")

    def close(self):
        self._from_client("closing", ACK | FIN)
        self._sequence += 1
        self._from_server("closing", ACK | FIN)
        self._answers += 1
        self._from_client("closed", ACK)

    def open(self, when):
        found = self._send(self._space, self.client, self.target, SYN, self._sequence, 0)
        if found is None or found.space not in self._addresses or found.destination_port != 80:
            self._fail("SYN", when, found)
            return
        self._server = found.space
        self._peer = found.source, found.source_port
        self._sequence += 1

    def accept(self, when):
        self._from_server(when, SYN | ACK)
        self._answers += 1

    def confirm(self, when):
        self._from_client(when, ACK)

    def ask(self, when):
        self._sequence += 1  # a byte that is lost on the way, to tell packets apart
        self._from_client(when, ACK | PSH)

    def answer(self, when):
        self._answers += 1
        self._from_server(when, ACK | PSH)

    def _from_client(self, when, flags):
        if not self.wrong:
            ends = self.client, self.target
            found = self._send(self._space, *ends, flags, self._sequence, self._answers)
            if found is None or (found.space, *found[1:3]) != (self._server, *self._peer):
                self._fail(f"client's {flags:#x}", when, found)

    def _from_server(self, when, flags):
        if not self.wrong:
            ends = (self._addresses[self._server], 80), self._peer
            found = self._send(self._server, *ends, flags, self._answers, self._sequence)
            wanted = (self._space, *self.target, self.client[1])
            if found is None or found[:4] != wanted:
                self._fail(f"server's {flags:#x}", when, found)

    def _send(self, space, source, destination, flags, sequence, acknowledged):
        return self._wire.send(space, source, destination, flags, sequence, acknowledged)

    def _fail(self, what, when, found):
        self.wrong = f"{self.name} from {self.client[1]}: {what} at {when} became {found}"
