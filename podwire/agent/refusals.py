"""What the eBPF data path refused, read from its ring buffer and named: `podwire bpf drops`.

Policies' refusals go to the policy room as well, which tells them as on every data path.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from podwire.agent.control import ControlServer
from podwire.agent.feed import Feed
from podwire.agent.logs import event
from podwire.datapath.ebpf.events import PASSED, WORDS, Event, EventReader
from podwire.datapath.ebpf.layout import Reason
from podwire.datapath.ebpf.programs import Programs
from podwire.net import Address, Protocol, format_address, protocol_name

log = logging.getLogger("podwire.agent.refusals")

POLICY = frozenset((Reason.POLICY, Reason.POLICY_AUDIT))
_PORTLESS = (Protocol.ICMP, Protocol.ICMPV6)
_PERIOD_S = 10.0


class Refusals:
    """Reads one node's events. `name` names addresses; `explain` is told of those of policies, and
    says why in words.
    """

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._feed = Feed()
        self._lost = 0
        self.name: Callable[[Address], str] = lambda address: ""
        self.explain: Callable[[Event], str] = lambda seen: WORDS[seen.reason]

    def serve(self, control: ControlServer, *_: object) -> None:
        """Answer `podwire bpf drops`."""
        control.stream("/v1/bpf/drops", self._feed.follow)

    async def run(self, agent: Any) -> None:
        """Read what the programs tell, until cancelled."""
        agent.metrics.registry.register(OutcomeCollector(self._programs))
        reader = EventReader(self._programs)
        loop = asyncio.get_running_loop()
        self._lost = self._count_lost()
        self._heard(reader)  # what nobody read while no agent ran
        loop.add_reader(reader.fileno(), self._heard, reader)
        try:
            while True:
                await asyncio.sleep(_PERIOD_S)
                self._tell_lost()
        finally:
            loop.remove_reader(reader.fileno())
            reader.close()

    def _heard(self, reader: EventReader) -> None:
        for seen in reader.read():
            text = self.explain(seen) if seen.reason in POLICY else WORDS[seen.reason]
            self._feed.publish(self._document(seen, text))

    def _document(self, seen: Event, text: str) -> dict[str, Any]:
        flow = seen.flow
        return {
            "time": seen.time_s,
            "reason": seen.reason.name.lower(),
            "text": text,
            "interface": _interface(seen.ifindex),
            "source": format_address(flow.source),
            "source_port": flow.source_port,
            "source_name": self.name(flow.source),
            "destination": format_address(flow.destination),
            "destination_name": self.name(flow.destination),
            "protocol": protocol_name(flow.protocol),
            "port": 0 if flow.protocol in _PORTLESS else flow.destination_port,
        }

    def _count_lost(self) -> int:
        return self._programs.outcomes().get("events_lost", 0)

    def _tell_lost(self) -> None:
        before, self._lost = self._lost, self._count_lost()
        if self._lost > before:
            event(log, logging.WARNING, "refusals were counted, but not told one by one",
                  packets=self._lost - before)  # fmt: skip


class OutcomeCollector(Collector):
    """`podwire_bpf_packets_total` by outcome: what passed, what was refused and why."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def collect(self) -> Iterable[CounterMetricFamily]:
        drops = CounterMetricFamily(
            "podwire_bpf_drops", "Packets that the eBPF data path refused", labels=["reason"]
        )
        other = CounterMetricFamily(
            "podwire_bpf_packets",
            "What else the eBPF data path did: packets forwarded, connections translated, …",
            labels=["outcome"],
        )
        for name, packets in self._programs.outcomes().items():
            reason = Reason[name.upper()]
            passed = reason in PASSED or reason is Reason.EVENTS_LOST
            (other if passed else drops).add_metric([name], packets)
        yield from (drops, other)


def _interface(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # gone since
        return str(index)
