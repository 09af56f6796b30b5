"""The zone on sockets: UDP and TCP, wherever they are bound."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Any

from podwire.kube.reflector import Reflector
from podwire.lab.dns.zone import Zone

_TCP_IDLE_S = 10.0
_MAX_CONNECTIONS = 256


class DnsServer:
    """Answers on bound sockets (of any namespace); TCP sockets need not listen yet."""

    def __init__(
        self, zone: Zone, udp: Sequence[socket.socket], tcp: Sequence[socket.socket]
    ) -> None:
        self._zone = zone
        self._udp = udp
        self._tcp = tcp
        self._transports: list[asyncio.BaseTransport] = []
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for sock in self._udp:
            transport, _ = await loop.create_datagram_endpoint(
                lambda: _Datagrams(self._zone), sock=sock
            )
            self._transports.append(transport)
        for sock in self._tcp:
            self._servers.append(await asyncio.start_server(self._serve, sock=sock))

    async def stop(self) -> None:
        for transport in self._transports:
            transport.close()
        for server in self._servers:
            server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        if len(self._connections) >= _MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        try:
            while True:
                async with asyncio.timeout(_TCP_IDLE_S):
                    (size,) = struct.unpack("!H", await reader.readexactly(2))
                    packet = await reader.readexactly(size)
                answer = self._zone.answer(packet, udp=False)
                if not answer:
                    return
                writer.write(struct.pack("!H", len(answer)) + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, TimeoutError, ConnectionError):
            return  # the client is done, or has been silent for too long
        finally:
            self._connections.discard(task)
            writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, zone: Zone) -> None:
        self._zone = zone
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if self._transport and (answer := self._zone.answer(data)):
            self._transport.sendto(answer, addr)


async def follow(zone: Zone, reflector: Reflector) -> None:
    """Keep the zone like the reflector's store, whose changes nobody else may take."""
    while True:
        reflector.changed.clear()
        zone.update(reflector.store.take())
        await reflector.changed.wait()
