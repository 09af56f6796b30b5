"""The agent: assembles the rooms and runs until it is told to stop.

Start: the last known objects from disk, then the API, and the data path meanwhile; the own Node
object; the parts, which adopt what an earlier agent left; the first sync; only then the CNI
configuration, which makes the node Ready. Stop: sockets close, the kernel keeps what traffic needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any

from podwire import __version__
from podwire.agent import node as own_node
from podwire.agent import parts, report
from podwire.agent.control import ControlServer
from podwire.agent.datapaths import DataPath
from podwire.agent.endpoints import Endpoints, Health
from podwire.agent.logs import event
from podwire.agent.loop import Loop
from podwire.agent.machine import Machine
from podwire.agent.metrics import Metrics
from podwire.agent.options import Options
from podwire.agent.pods import Pods
from podwire.agent.sync import Sync
from podwire.agent.sync_metrics import SyncCollector
from podwire.agent.sysctls import Sysctls
from podwire.agent.watch import KernelWatch, Watcher
from podwire.errors import ApiError, PodwireError
from podwire.kernel.address import RTM_DELADDR
from podwire.kube import snapshot
from podwire.kube.client import Client, Selection
from podwire.kube.kubeconfig import ClusterConfig
from podwire.kube.objects import EndpointSlice, Node, Service
from podwire.kube.reflector import Reflector
from podwire.kube.store import ChangeSet, Kind, Store

log = logging.getLogger("podwire.agent")

SNAPSHOT_PERIOD_S = 30.0
CNI_COMMANDS = frozenset({"ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"})
_TRIGGER = "endpoints.kubernetes.io/last-change-trigger-time"
MACHINE_PERIOD_S = 5.0
FOLLOW_UP_PERIOD_S = 30.0


class Agent:
    """One node's daemon. `config` is its way to the API, `datapath` on its way meanwhile."""

    def __init__(self, options: Options, config: ClusterConfig, datapath: Future[DataPath]) -> None:
        self.options = options
        self._config, self._starting = config, datapath
        self.store = Store()
        self.metrics = Metrics()
        self.health = Health(timeout_s=2 * options.sync_period_s)
        self.control = ControlServer(options.run_dir / "agent.sock")
        self.started, self.started_at = time.monotonic(), time.time()
        self.kinds: tuple[Kind, ...] = parts.kinds(options)
        self._reasons: list[str] = list(options.warnings)
        self._snapshot = options.state_dir / "objects.json"
        self._objects_changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._loop: Loop | None = None
        self._pods: Pods | None = None
        self._machine = Machine(())
        self._syncs: list[Sync[Any]] = []
        self._more_reasons: list[Callable[[], list[str]]] = []
        self._ready = False
        self._restart = False
        self._alone = False  # no other data path is left
        self._waits = ""
        self._datapath = options.datapath
        self.metrics.registry.register(
            SyncCollector(
                lambda: self._syncs, lambda: (kind.__name__ for kind, _ in self.store.set_aside)
            )
        )
        self.client: Client | None = None  # while it runs

    async def run(self) -> int:
        """Until SIGTERM or SIGINT; the exit status. Raises PodwireError when it cannot start."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        for warning in self.options.warnings:
            event(log, logging.WARNING, warning)
        self.options.run_dir.mkdir(parents=True, exist_ok=True)
        self.options.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        endpoints = Endpoints(self.metrics, self.health, self.configuration)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.control.stop)
            stack.push_async_callback(endpoints.stop)
            stack.push_async_callback(self._leave_pods)
            client = self.client = await stack.enter_async_context(Client(self._config))
            await endpoints.start(
                self.options.healthz_bind_address, self.options.metrics_bind_address
            )
            known = snapshot.load(self.store, self.kinds, self._snapshot)
            self.reflector = Reflector(
                client, self._selections(), self.store, on_change=self._changed
            )
            self.control.route("/v1/status", lambda _: self.status())
            self.control.route("/v1/synced", lambda _: self.synced())
            await self.control.start()
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.reflector.run())]
                tasks.append(group.create_task(self._serve(client, known)))
                await self._stop.wait()
                await self._end_calls()
                for task in tasks:
                    task.cancel()
        event(log, logging.INFO, "stopped", node=self.options.node_name)
        return 1 if self._restart else 0

    async def _end_calls(self) -> None:
        """CNI calls under way come to their end, for which they need this loop; then no more."""
        if self._pods is not None:
            await asyncio.to_thread(self._pods.stop)

    async def _leave_pods(self) -> None:
        await self._end_calls()  # a part that failed ended us, nobody has done it yet
        if self._pods is not None:
            self._pods.close()

    def _selections(self) -> list[Kind | Selection[Any]]:
        """kube-proxy's: Services of other proxies and headless slices are none of ours."""
        filters: dict[Kind, Selection[Any]] = {
            Service: Selection(Service, label_selector="!service.kubernetes.io/service-proxy-name"),
            EndpointSlice: Selection(
                EndpointSlice, label_selector="!service.kubernetes.io/headless"
            ),
        }
        return [filters.get(kind, kind) for kind in self.kinds]

    def _changed(self) -> None:
        self._objects_changed.set()
        if self._loop is not None:
            self._loop.wake()

    async def _serve(self, client: Client, known: bool) -> None:
        datapath = await asyncio.wrap_future(self._starting)
        self._datapath = datapath.name
        node = await self._own_node()
        if not known:
            await self.reflector.wait_synced()
        built = parts.build(self.options, node, datapath)
        self._syncs = built.syncs
        self._more_reasons = built.reasons
        self._machine = Machine(built.requirements, Sysctls(self.options.state_dir))
        self._machine.require()
        for sync in self._syncs:
            if sync.path is not None:
                await asyncio.to_thread(sync.path.start)
        self._loop = Loop(
            self.store,
            self._syncs,
            verify_period_s=self.options.sync_period_s,
            before=self._before,
            after=self._after,
        )
        cni = None
        if built.cni is not None:
            cni = built.cni(self._loop, self.store, self._synced, self._stop.is_set)
            cni.observe = self._cni_called
        built.serve(self.control, self.store, self._loop)
        self._loop.wake()
        gc.disable()
        await self._loop.step()
        gc.freeze()  # what the first objects became stays: it need not be looked through
        gc.enable()
        for prepare in built.preparing:
            await prepare()
        self._ready = True
        await self._take_over(built.datapath)
        if cni is not None:
            self._pods = cni
            await asyncio.to_thread(cni.start)
        event(log, logging.INFO, "ready", node=self.options.node_name, datapath=built.datapath.name,
              parts=",".join(sync.name for sync in self._syncs), version=__version__)  # fmt: skip
        async with asyncio.TaskGroup() as group:
            group.create_task(self._loop.run())
            group.create_task(self._watch_machine())
            group.create_task(self._follow_up(built.datapath))
            group.create_task(self._save_objects())
            if "policy" in self.options.parts:
                group.create_task(
                    report.keep_reporting(client, self.options.node_name, self.store, self._settled)
                )
            watchers = [make(self._loop) for make in built.watchers]
            watchers.append(
                Watcher("api", lambda seen: seen.type == RTM_DELADDR, self._reconnect(client))
            )
            if cni is not None:
                watchers += cni.watchers()
                group.create_task(cni.guard_ports(self._repaired))
            group.create_task(KernelWatch(watchers, self._repaired).run())
            for task in built.tasks:
                group.create_task(task(self))

    async def _take_over(self, datapath: DataPath) -> None:
        """Ours may be complete: then what an earlier data path of ours or kube-proxy left goes."""
        complete = not any(sync.error for sync in self._syncs)
        try:
            self._alone = await asyncio.to_thread(datapath.take_over, complete)
            self._waits = "" if self._alone else "another data path serves until ours is complete"
        except PodwireError as error:
            self._waits = f"leftovers of another data path remain: {error}"
            event(log, logging.WARNING, "leftovers remain", error=error)

    async def _follow_up(self, datapath: DataPath) -> None:
        """What could not be done at the start, or must wait for connections to end."""
        settled = False
        while not (self._alone and settled):
            await asyncio.sleep(FOLLOW_UP_PERIOD_S)
            if not self._alone:
                await self._take_over(datapath)
            else:
                settled = await asyncio.to_thread(datapath.settle)

    @staticmethod
    def _reconnect(client: Client) -> Callable[[], Awaitable[list[str]]]:
        """Connections from an address that is gone would hang until they time out."""

        async def reconnect() -> list[str]:
            await client.reconnect()
            return []

        return reconnect

    async def _own_node(self) -> Node:
        """The own Node object, with what the parts need of it."""
        told = time.monotonic()
        while True:
            node = self.store.get(Node, ("", self.options.node_name))
            missing = parts.missing(self.options, node)
            if node is not None and not missing:
                return node
            if time.monotonic() - told > 10:
                told = time.monotonic()
                event(log, logging.WARNING, "waiting", node=self.options.node_name, missing=missing)
            self._objects_changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._objects_changed.wait(), 1)

    def _synced(self) -> bool:
        """Whether the store has shown the API's state since the start."""
        return all(self.reflector.synced.values())

    def _before(self, changes: ChangeSet) -> None:
        now = time.time()
        for family in ("IPv4", "IPv6"):
            self.metrics.last_queued.labels(family).set(now)
        services, slices = len(changes.of(Service)), len(changes.of(EndpointSlice))
        self.metrics.service_changes.inc(services)
        self.metrics.endpoint_changes.inc(slices)
        self.metrics.service_pending.set(services)
        self.metrics.endpoint_pending.set(slices)

    def _after(self, changes: ChangeSet, began: float) -> None:
        now = time.time()
        self.health.last_updated = now
        own = changes.of(Node).get(("", self.options.node_name))
        if own is not None:
            self.health.node_eligible = own_node.eligible(own.new)
            if parts.must_restart(self.options, own.old, own.new):
                event(log, logging.WARNING, "the node's podCIDRs changed: starting again")
                self._restart = True
                self._stop.set()
        for family in ("IPv4", "IPv6"):
            self.metrics.sync_duration.labels(family).observe(now - began)
            self.metrics.last_sync.labels(family).set(now)
        self.metrics.service_pending.set(0)
        self.metrics.endpoint_pending.set(0)
        for family, trigger in triggers(changes):
            if trigger >= self.started_at:  # as kube-proxy: older ones were waiting for us
                self.metrics.network_programming.labels(family).observe(max(0.0, now - trigger))
        for sync in self._syncs:
            if sync.name == "policy" and not sync.kinds.isdisjoint(changes):
                self.metrics.policy_duration.observe(sync.last_duration_s)

    def _settled(self) -> bool:
        """Whether the kernel holds all that is known."""
        return self._loop is not None and not self._loop.queued_since

    def _repaired(self, part: str, count: int) -> None:
        self.metrics.repairs.labels(part).inc(count)

    def _cni_called(self, command: str, code: int, seconds: float) -> None:
        known = command if command in CNI_COMMANDS else "unknown"  # labels come from a bounded set
        self.metrics.cni_duration.labels(known, str(code)).observe(seconds)

    async def _watch_machine(self) -> None:
        while True:
            await asyncio.sleep(MACHINE_PERIOD_S)
            assert self._loop is not None
            self.health.queued_since = self._loop.queued_since
            if not self._loop.queued_since:
                self.health.last_updated = time.time()
            try:
                self._machine.watch()
            except PodwireError as error:
                event(log, logging.ERROR, "a requirement cannot be restored", error=error)

    async def _save_objects(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_PERIOD_S)
            if self._objects_changed.is_set():
                self._objects_changed.clear()
                try:
                    content = snapshot.encode(self.store, self.kinds)
                    await asyncio.to_thread(snapshot.write, content, self._snapshot)
                except OSError as error:
                    event(log, logging.WARNING, "objects not saved", error=error)

    # --- what people ask --------------------------------------------------------------------------

    def configuration(self) -> dict[str, object]:
        """The options in force, for /configz."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name in Options.__dataclass_fields__
            for value in (getattr(self.options, name),)
            if name != "conntrack"
        }

    def synced(self) -> dict[str, Any]:
        """How far the kernel follows the API: the newest version known of each kind, and whether
        any of it still waits to be programmed.
        """
        versions = {
            kind.__name__: max(
                (int(o.metadata.resource_version or 0) for o in self.store.all(kind).values()),
                default=0,
            )
            for kind in self.kinds
        }
        return {
            "waiting": not self._ready or self._loop is None or bool(self._loop.queued_since),
            "versions": versions,
        }

    def status(self) -> dict[str, Any]:
        """For `podwire status`."""
        reasons = [*self._reasons, *filter(None, [self._waits])]
        if not self._ready:
            reasons.append("starting: waiting for the API or the own Node object")
        states = self.reflector.states
        reasons += [
            f"{kind.__name__}: {state.error}" for kind, state in states.items() if state.error
        ]
        reasons += [f"{sync.name}: {sync.error}" for sync in self._syncs if sync.error]
        reasons += [reason for reasons_of in self._more_reasons for reason in reasons_of()]
        return {
            "node": self.options.node_name,
            "version": __version__,
            "uptime_s": time.monotonic() - self.started,
            "healthy": self._ready and not any(sync.error for sync in self._syncs),
            "reasons": reasons,
            "summary": f"{self._datapath} data path, {self.options.wiring} wiring, "
            f"{self.options.routing} routing",
            "objects": {kind.__name__: len(self.store.all(kind)) for kind in self.kinds},
            "parts": {sync.name: sync.status() for sync in self._syncs},
            "set_aside": [
                {"object": f"{kind.__name__} {'/'.join(filter(None, key))}", "reason": reason}
                for (kind, key), reason in self.store.set_aside.items()
            ],
            "machine": self._machine.status(),
        }


def triggers(changes: ChangeSet) -> Iterator[tuple[str, float]]:
    """IP family of each changed EndpointSlice that says when its cause was, and when (Unix, s)."""
    for change in changes.of(EndpointSlice).values():
        text = change.new.metadata.annotations.get(_TRIGGER, "") if change.new else ""
        if text and change.new is not None:
            with contextlib.suppress(ValueError):
                moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
                yield change.new.address_type, moment.timestamp()


def cleanup(options: Options) -> int:
    """Remove all that podwire left in this namespace's kernel; the exit status."""
    failed = False
    for name, path in parts.all_paths(options):
        try:
            path.cleanup()
        except (PodwireError, ApiError) as error:
            failed = True
            event(log, logging.ERROR, "cleanup failed", part=name, error=error)
    return 1 if failed else 0
