"""The connection table in the agent: sampled, attributed, answered for, exported, kept clean.

Sampling costs one netlink message. Reading the whole table costs a second for a few hundred
thousand entries, so it is done rarely: at most a fiftieth of the time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from typing import Any

from podwire.agent.conntrack_metrics import ConntrackCollector
from podwire.agent.control import ControlServer, Query
from podwire.agent.logs import event
from podwire.agent.options import ConntrackOptions, Options
from podwire.agent.sysctls import Sysctls
from podwire.conntrack import facts, names, sizing
from podwire.conntrack.attribution import Tally
from podwire.conntrack.inspector import PRESSURE, Inspector
from podwire.conntrack.names import Names
from podwire.conntrack.source import Source
from podwire.errors import ApiError, KernelError, PodwireError
from podwire.kernel import address
from podwire.kernel.ctnetlink import Table
from podwire.kube.client import STRATEGIC_PATCH, Client
from podwire.kube.objects import Node
from podwire.kube.store import Store
from podwire.services import ServiceTable

log = logging.getLogger("podwire.agent.conntrack")

SAMPLE_PERIOD_S = 5.0
TALLY_PERIOD_S = 15.0
TALLY_SHARE = 50  # a reading is followed by a pause this many times as long
NAMES_SHARE = 20  # names are good for this many times as long as they took to gather
_BATCH = 200
_PREFIX = "net.netfilter.nf_conntrack_"
_PRESSURE_ENDS = PRESSURE - 0.05  # so that a table that hovers does not flap


class ConntrackRoom:
    """All about the connection table of one agent, in the agent's own namespace.

    `own` is the data path's own table, where it has one: it is then what is shown, unless a query
    asks for ``source=kernel``.
    """

    def __init__(
        self,
        options: Options,
        services: Callable[[], ServiceTable | None],
        own: Source | None = None,
    ) -> None:
        self._options, self._services = options, services
        self._names, self._names_until = Names(), 0.0
        self._store: Store | None = None
        self._kernel = Inspector(Table(), lambda: self._names)
        self.inspector = Inspector(own, lambda: self._names) if own else self._kernel
        self.collector = ConntrackCollector(self._kernel, self.inspector)
        self.tally: Tally | None = None
        self.pressure = False
        self._told: bool | None = None  # what the Node's condition says
        self._refusals: list[str] = []

    # --- start ------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Set what kube-proxy's configuration asks for; what cannot be is told in the status."""
        sysctls = Sysctls(self._options.state_dir)
        self._refusals = apply_options(self._options.conntrack, sysctls)
        for refusal in self._refusals:
            event(log, logging.WARNING, refusal)

    def serve(self, control: ControlServer, store: Store, _: object) -> None:
        """Answer `podwire conntrack`."""
        self._store = store

        def status(query: Query) -> dict[str, Any]:
            return self._asked(query).status()

        def top(query: Query) -> dict[str, Any]:
            return self._asked(query).top(query)

        def advise(query: Query) -> dict[str, Any]:
            return self._kernel.apply() if query.get("apply") else self._kernel.advise()

        def flush(query: Query) -> dict[str, Any]:
            return self._asked(query).flush(query)

        for answer in (status, top, advise, flush):
            control.route(f"/v1/conntrack/{answer.__name__}", self._in_thread(answer))
        control.stream("/v1/conntrack/ls", lambda q: self._rows(self._asked(q).ls(q), _BATCH))
        control.stream("/v1/conntrack/watch", self._watch)

    def _asked(self, query: Query) -> Inspector:
        return self._kernel if query.get("source") == "kernel" else self.inspector

    def _in_thread(self, answer: Callable[[Query], dict[str, Any]]) -> Callable[[Query], Any]:
        async def handler(query: Query) -> dict[str, Any]:
            self.refresh_names()
            return await asyncio.to_thread(answer, query)

        return handler

    async def _watch(self, query: Query) -> AsyncIterator[dict[str, Any]]:
        gone = threading.Event()
        try:
            async for row in self._rows(self._asked(query).watch(query, gone.is_set), 1):
                yield row
        finally:
            gone.set()

    async def _rows(
        self, rows: Iterator[dict[str, Any]], batch: int
    ) -> AsyncIterator[dict[str, Any]]:
        """Rows made in a thread, so many at a time; an error is the last row."""
        self.refresh_names()
        while True:
            try:
                some = await asyncio.to_thread(lambda: list(islice(rows, batch)))
            except PodwireError as error:
                yield {"error": str(error)}
                return
            for row in some:
                yield row
            if len(some) < batch:
                return
            self.refresh_names()

    # --- run --------------------------------------------------------------------------------------

    async def run(self, client: Client | None) -> None:
        """Sample, read and judge until cancelled; `client` sets the Node's condition."""
        tally_at = 0.0
        while True:
            try:
                await asyncio.to_thread(self.inspector.sample)
                self._judge()
                if client is not None and self._told is not self.pressure:
                    await self._set_condition(client)
                if time.monotonic() >= tally_at:
                    self.refresh_names()
                    began = time.monotonic()
                    self.tally = await asyncio.to_thread(self.inspector.tally)
                    took_s = time.monotonic() - began
                    tally_at = began + max(TALLY_PERIOD_S, TALLY_SHARE * took_s)
                    ports = facts.settings().local_ports
                    await asyncio.to_thread(self.collector.show, self.tally, ports)
            except KernelError as error:
                event(log, logging.ERROR, "the connection table cannot be read", error=error)
            await asyncio.sleep(SAMPLE_PERIOD_S)

    def reasons(self) -> list[str]:
        """What is wrong, for `podwire status`."""
        found = list(self._refusals)
        last = self.inspector.history.last
        if self.pressure and last is not None:
            found.append(
                f"the connection table is {100 * last.used / last.limit:.0f} % full "
                f"({last.used} of {last.limit}): podwire conntrack top, podwire conntrack advise"
            )
        return found

    def _judge(self) -> None:
        last = self.inspector.history.last
        if last is None or not last.limit:
            return
        full = last.used / last.limit
        if not self.pressure and full >= PRESSURE:
            self.pressure = True
            full_in_s = self.inspector.history.forecast().full_in_s
            event(log, logging.WARNING, "the connection table is nearly full", used=last.used,
                  limit=last.limit, full_in_s=full_in_s)  # fmt: skip
        elif self.pressure and full < _PRESSURE_ENDS:
            self.pressure = False
            event(log, logging.INFO, "the connection table has room again", used=last.used)

    async def _set_condition(self, client: Client) -> None:
        """Tell it in the Node's status; again later where the API does not answer."""
        last = self.inspector.history.last
        assert last is not None
        condition = node_condition(self.pressure, last.used, last.limit, time.time())
        try:
            await client.patch(
                Node, self._options.node_name, {"status": {"conditions": [condition]}},
                style=STRATEGIC_PATCH, subresource="status",
            )  # fmt: skip
            self._told = self.pressure
        except ApiError as error:
            event(log, logging.WARNING, "condition not set", error=error)

    def refresh_names(self) -> None:
        """Pods, nodes and Services as they are now; in the main thread, where the store lives."""
        if time.monotonic() < self._names_until or self._store is None:
            return
        began = time.monotonic()
        self._names = names.from_store(
            self._store, self._services(), address.own(), self._options.node_name
        )
        now = time.monotonic()
        self._names_until = now + NAMES_SHARE * (now - began)


def node_condition(pressure: bool, used: int, limit: int, now_s: float) -> dict[str, str]:
    """The Node condition `ConntrackPressure`, set when it changes and at the agent's start."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s))
    return {
        "type": "ConntrackPressure",
        "status": "True" if pressure else "False",
        "reason": "TableNearlyFull" if pressure else "TableHasRoom",
        "message": f"{used} of {limit} entries of the connection table are in use",
        "lastHeartbeatTime": moment,
        "lastTransitionTime": moment,
    }


def apply_options(
    options: ConntrackOptions, sysctls: Sysctls, cores: int | None = None
) -> list[str]:
    """Set the sysctls as kube-proxy does; what could not be set, and why.

    Source: kubernetes cmd/kube-proxy/app/conntrack.go, server_linux.go.
    """
    refusals: list[str] = []
    wanted: dict[str, int | None] = {
        "tcp_timeout_established": options.tcp_established_timeout_s,
        "tcp_timeout_close_wait": options.tcp_close_wait_timeout_s,
        "udp_timeout": options.udp_timeout_s,
        "udp_timeout_stream": options.udp_stream_timeout_s,
        "tcp_be_liberal": 1 if options.tcp_be_liberal else None,
    }
    limit = 0
    if options.max_per_core:
        limit = sizing.kube_proxy_limit(
            cores or facts.cores(), options.max_per_core, options.min or 0
        )
    if limit and (reason := facts.settings().refusal) and facts.settings().limit != limit:
        refusals.append(f"nf_conntrack_max stays {facts.settings().limit}, not {limit}: {reason}")
    elif limit:
        wanted["max"] = limit
        buckets = facts.settings().buckets
        if buckets < limit // 4:
            wanted["buckets"] = limit // 4
    for name, value in wanted.items():
        try:
            if value is not None:
                sysctls.set(_PREFIX + name, str(value))
        except KernelError as error:
            refusals.append(str(error))
    return refusals
