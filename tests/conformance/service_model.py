"""A world without packets: the evaluator, with an affinity memory and a connection table."""

from __future__ import annotations

from itertools import count

from podwire.net import Protocol, parse_address
from podwire.services import Packet, Resolution, ServiceTable, format_backend
from podwire.services.stale import Flow, StaleFlows
from tests.conformance.service_cases import (
    MASQUERADED,
    POD_SIDE,
    UPLINK,
    Cluster,
    Probe,
    Seen,
    parse_end,
)

_INTERFACES = {"pod": POD_SIDE, "external": UPLINK, "host": ""}


class Model:
    """Answers probes as the evaluator does, taking every backend in turn."""

    def begin(self, cluster: Cluster, family: str) -> None:
        self._table: ServiceTable = cluster.compiler.table
        self._turn = count()
        self._now = 0.0
        self._affinity: dict[tuple[object, ...], tuple[bytes, float]] = {}
        self._connections: dict[str, tuple[Probe, Seen]] = {}

    def end(self) -> list[str]:
        return []

    def apply(self, table: ServiceTable) -> None:
        stale = StaleFlows(table.delta(self._table).ports.values(), table.settings)
        self._table = table
        for label, (probe, seen) in list(self._connections.items()):
            if probe.protocol != Protocol.UDP or seen.verdict != "dnat":
                continue
            source, port = parse_end(seen.endpoint)
            flow = Flow(
                parse_address(probe.destination),
                probe.destination_port,
                parse_address(source),
                port,
            )
            if flow in stale:
                self._connections[label] = (probe, self._first(probe))

    def wait(self, seconds: float) -> None:
        self._now += seconds

    def forget(self) -> None:
        self._connections.clear()

    def connect(self, probes: list[Probe]) -> list[Seen]:
        return [self._first(probe) for probe in probes]

    def open(self, label: str, probe: Probe) -> Seen:
        self._connections[label] = (probe, self._first(probe))
        return self._connections[label][1]

    def proceed(self, label: str) -> Seen:
        probe, seen = self._connections[label]
        return seen if seen.verdict == "dnat" else self.open(label, probe)

    def reply(self, label: str) -> tuple[tuple[str, int], tuple[str, int]]:
        probe = self._connections[label][0]
        return (probe.destination, probe.destination_port), (probe.source, probe.source_port)

    def icmp_error(self, label: str) -> tuple[str, tuple[str, int], tuple[str, int]]:
        destination, source = self.reply(label)
        return source[0], source, destination

    def resolve(self, probe: Probe) -> Resolution:
        """What the evaluator says of a probe."""
        return self._table.resolve(
            Packet(
                parse_address(probe.source),
                parse_address(probe.destination),
                probe.protocol,
                probe.destination_port,
                _INTERFACES[probe.origin],
            )
        )

    def possible(self, probe: Probe) -> list[Seen]:
        """All that may come of a probe."""
        said = self.resolve(probe)
        if said.verdict != "dnat":
            return [Seen(said.verdict)]
        return [self._seen(probe, said, backend) for backend in said.backends]

    def _first(self, probe: Probe) -> Seen:
        said = self.resolve(probe)
        if said.verdict != "dnat":
            return Seen(said.verdict)
        return self._seen(probe, said, self._choose(parse_address(probe.source), said))

    def _seen(self, probe: Probe, said: Resolution, backend: bytes) -> Seen:
        masqueraded = MASQUERADED[len(backend) - 2]
        source = masqueraded if said.masquerades(backend) else probe.source
        return Seen("dnat", format_backend(backend), source)

    def _choose(self, client: bytes, said: Resolution) -> bytes:
        key = (client, said.service)
        kept, until = self._affinity.get(key, (b"", 0.0))
        forgotten = not said.affinity_timeout_s or self._now >= until
        if kept not in said.backends or forgotten:
            kept = said.backends[next(self._turn) % len(said.backends)]
        if said.affinity_timeout_s:
            self._affinity[key] = (kept, self._now + said.affinity_timeout_s)
        return kept
