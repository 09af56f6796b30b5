"""How full the maps of the eBPF data path are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from podwire.agent.logs import event
from podwire.datapath.ebpf.fill import Fill, Pressure, measure
from podwire.datapath.ebpf.programs import Programs

log = logging.getLogger("podwire.agent.ebpf")

FILL_PERIOD_S = 5.0


class MapWatch(Collector):
    """Maps that have a limit: told in the status, the log and metrics before they reach it."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._pressure = Pressure()
        self._fills: list[Fill] = []

    def reasons(self) -> list[str]:
        """One sentence for each map that is nearly full. The connection table has its own."""
        return [str(fill) for name, fill in self._pressure.full.items() if name != "connections"]

    async def run(self, agent: Any) -> None:
        """Measure again and again, until cancelled."""
        agent.metrics.registry.register(self)
        while True:
            self._fills = await asyncio.to_thread(measure, self._programs)
            for fill in self._pressure.see(self._fills):
                event(log, logging.WARNING, "a map is nearly full", map=fill.name, held=fill.held,
                      room=fill.room)  # fmt: skip
            await asyncio.sleep(FILL_PERIOD_S)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        share = GaugeMetricFamily(
            "podwire_bpf_map_fill", "Share of a map's limit that is taken", labels=["map"]
        )
        entries = GaugeMetricFamily(
            "podwire_bpf_map_entries", "Entries of a map that has a limit", labels=["map"]
        )
        for fill in self._fills:
            share.add_metric([fill.name], fill.share)
            entries.add_metric([fill.name], fill.held)
        yield from (share, entries)
