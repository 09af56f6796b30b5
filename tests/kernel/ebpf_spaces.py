"""Network namespaces of one test, and servers in them."""

import contextlib
import os
import re
import socket
import threading

from podwire.kernel import netns, route
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import parse_address


class Spaces:
    """Namespaces by name, with lo up; closed with their servers at the end of the test."""

    def __init__(self, names):
        self.spaces = {name: netns.create() for name in names}
        self._closing = contextlib.ExitStack()
        for fd in self.spaces.values():
            self._closing.callback(os.close, fd)
            self.batch(fd, "link set lo up")
            self.run(fd, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closing.close()

    def run(self, space, *command):
        done = netns.run(space, command, timeout_s=20)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def batch(self, space, *lines):
        """Commands of ip(8); returns when the addresses that they add take packets."""
        done = netns.run(space, ["ip", "-batch", "-"], stdin="\n".join(lines), timeout_s=20)
        assert done.returncode == 0, done.stderr
        added = re.findall(r"^addr add ([0-9a-f:]+)/", "\n".join(lines), re.M)
        if added:
            with NetlinkSocket(netns_fd=space) as sock:
                route.await_local(sock, map(parse_address, added))

    def answer(self, space, address, port, reply):
        """Send `reply(data, client's address)` for each datagram."""
        listener = self._listen(space, address, port, socket.SOCK_DGRAM)

        def loop():
            with contextlib.suppress(OSError):
                while True:
                    data, peer = listener.recvfrom(65536)
                    if peer is None:
                        return
                    listener.sendto(reply(data, peer[0]), peer)

        threading.Thread(target=loop, daemon=True).start()

    def accept(self, space, address, port, talk):
        """Call `talk(connection, client's address)` for each connection, all at the same time."""
        listener = self._listen(space, address, port, socket.SOCK_STREAM)
        listener.listen(64)

        def serve(client, peer):
            with contextlib.suppress(OSError), client:
                talk(client, peer[0])

        def loop():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=listener.accept(), daemon=True).start()

        threading.Thread(target=loop, daemon=True).start()

    def _listen(self, space, address, port, kind):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = netns.socket(self.spaces[space], family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        self._closing.callback(_stop, listener)
        return listener


def _stop(listener):
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
