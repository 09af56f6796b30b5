"""The runtime process: a worker per pod, their reports, answers for the command line."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from podwire.agent.control import ControlServer, Query
from podwire.agent.logs import event
from podwire.errors import ApiError, ConfigError, KernelError, PodwireError
from podwire.kernel import netns
from podwire.kube.objects import EndpointSlice, Namespace, Service
from podwire.kube.store import Change, ChangeSet, Store
from podwire.lab import echo
from podwire.lab.dns import DnsServer, Zone
from podwire.lab.runtime import balancer, cni, sandbox
from podwire.lab.runtime.api import Api
from podwire.lab.runtime.balancer import Balancer
from podwire.lab.runtime.nodes import NodeHost, Watcher
from podwire.lab.runtime.objects import Pod, TargetService
from podwire.lab.runtime.pods import PodWorker, now_text
from podwire.lab.runtime.status import node_object, node_ready, pod_status
from podwire.lab.state import LabDir, Node

log = logging.getLogger("podwire.lab.runtime")

KINDS = (Namespace, Service, EndpointSlice, TargetService, Pod)
REPORTERS = 16  # status updates under way at once
REPORT_RETRY_S = 1.0
NOT_READY_RETRY_S = 0.5


class Runtime:
    """All kubelets of a lab."""

    def __init__(self, lab: LabDir) -> None:
        self.lab = lab
        self._api = Api(lab)
        self._nodes: dict[str, NodeHost] = {}
        self._workers: dict[str, PodWorker] = {}  # by uid
        self._services: dict[str, dict[str, TargetService]] = {}  # by namespace, name
        self._store = Store()
        self._zone = Zone()
        self._outside = echo.Identity("", "outside", "outside")
        self._balancer = Balancer(lab)
        self._dirty: dict[str, PodWorker] = {}
        self._sending: set[str] = set()
        self._reports: asyncio.Queue[str] = asyncio.Queue()
        self._visitor = ThreadPoolExecutor(1, "sandbox")  # visits pod namespaces, makes new ones
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """Serve until the process ends."""
        self._watcher = Watcher(lambda path: self._spawn(self._configuration_changed(path)))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._read_nodes()))
        control = ControlServer(self.lab.runtime_socket)
        control.route("/v1/logs", self._answer_logs)
        control.route("/v1/summary", self._answer_summary)
        await control.start()
        async with self._api:
            await self._serve_outside()
            await self._read_nodes()
            for _ in range(REPORTERS):
                self._spawn(self._report_loop())
            first = True
            async for changes in self._api.watch(self._store, KINDS):
                self._take(changes)
                if first:
                    self._spawn(self._remove_orphans())
                    first = False

    def _spawn(self, work: Any) -> None:
        """Run in the background; what fails is logged."""

        async def run() -> None:
            try:
                await work
            except (PodwireError, OSError) as error:
                event(log, logging.ERROR, "failed", error=error)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_outside(self) -> None:
        """An echo server in the outside world, so that pods have somebody to ask there."""
        servers = echo.Servers(self._outside)
        fd = netns.open_path(self.lab.netns("outside"))
        try:
            for protocol, sock in sandbox.listen(fd, (("TCP", 80), ("UDP", 80))):
                await servers.serve(protocol, sock)
        finally:
            os.close(fd)

    # --- nodes ------------------------------------------------------------------------------------

    async def _read_nodes(self) -> None:
        """Follow lab.json: register new nodes, re-register changed ones, drop those that went."""
        nodes = self.lab.read().nodes
        for name in set(self._nodes) - set(nodes):
            await self._drop_node(name)
        for name, node in nodes.items():
            known = self._nodes.get(name)
            if known is None:
                self._nodes[name] = known = NodeHost(self.lab, node)
                self._watcher.add(known.conf_dir)
                await self._register(node)
                self._spawn(self._look(known))
            elif known.node != node:
                known.node = node
                await self._register(node)
                for worker in self._workers.values():
                    if worker.node is known:
                        worker.node_changed()
        self._balance()

    async def _register(self, node: Node) -> None:
        await self._api.register(node_object(node.name, node.addresses, node.pod_cidrs))

    async def _drop_node(self, name: str) -> None:
        """A node was taken away: its pods end with it, as after a machine's death."""
        gone = self._nodes.pop(name)
        for worker in [w for w in self._workers.values() if w.node is gone]:
            worker.abandon()
            await self.remove(worker.pod)
        await self._api.remove_node(name)
        gone.close()

    async def _configuration_changed(self, directory: Path) -> None:
        for node in self._nodes.values():
            if node.conf_dir == directory:
                await self._look(node)

    async def _look(self, node: NodeHost) -> None:
        """Report whether the node's network is ready; ask again while its plugins say no."""
        while self._nodes.get(node.name) is node:
            ready, why = await node.look()
            reason = "KubeletReady" if ready else "KubeletNotReady"
            if ready is not node.reported:
                node.reported = ready
                status = node_ready(ready, reason, why, now_text())
                await self._api.node_status(node.name, status)
            if ready or node.network is None:
                return
            await asyncio.sleep(NOT_READY_RETRY_S)

    # --- what the API says ------------------------------------------------------------------------

    def _take(self, changes: ChangeSet) -> None:
        """Everybody's share of what changed; Services before pods, which listen for them."""
        self._zone.update(changes)
        if changes.of(Service) or changes.of(EndpointSlice):
            self._balance()
        for service in changes.of(TargetService).values():
            self._service_changed(service)
        for pod in changes.of(Pod).values():
            self._pod_changed(pod)

    async def _remove_orphans(self) -> None:
        """End sandboxes of pods that were deleted while no runtime ran."""
        for path in self.lab.netns("").glob("pod-*"):
            uid = path.name.removeprefix("pod-")
            if uid in self._workers:
                continue
            gone = cni.Sandbox(uid.replace("-", ""), str(path), "", "", uid, {})
            for node in self._nodes.values():
                await node.ready.wait()
                assert node.network is not None
                await node.run(functools.partial(node.plugins.delete, node.network, gone))
            await self.visit(functools.partial(netns.remove_named, path))

    def _balance(self) -> None:
        """Bring the load balancer's routes up to date."""
        services, slices = self._store.all(Service), self._store.all(EndpointSlice)
        nodes = {name: host.node for name, host in self._nodes.items()}
        try:
            self._balancer.apply(balancer.wanted(services.values(), slices.values(), nodes))
        except KernelError as error:
            event(log, logging.ERROR, "load balancer routes not changed", error=error)

    def _service_changed(self, change: Change[TargetService]) -> None:
        service = change.new
        if service is None:
            assert change.old is not None
            del self._services[change.old.key[0]][change.old.key[1]]
            return
        namespace, name = service.key
        self._services.setdefault(namespace, {})[name] = service
        for worker in self._workers.values():
            if service.selects(worker.pod):
                worker.serve_more()

    def _pod_changed(self, change: Change[Pod]) -> None:
        old, new = change
        gone = old and (new is None or new.metadata.uid != old.metadata.uid)
        if old and gone and old.metadata.uid in self._workers:
            self._workers[old.metadata.uid].end()
        if new is None:
            return
        uid = new.metadata.uid
        if (worker := self._workers.get(uid)) is not None:
            worker.update(new)
        elif (node := self._nodes.get(new.spec.node_name)) is not None:
            if new.finished and not new.metadata.deletion_timestamp:
                return
            self._workers[uid] = worker = PodWorker(self, node, new)
            worker.task.add_done_callback(functools.partial(self._ended, uid))

    def _ended(self, uid: str, task: asyncio.Task[None]) -> None:
        worker = self._workers.pop(uid)
        self._dirty.pop(uid, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            event(log, logging.ERROR, "pod worker failed", pod=worker, error=repr(error))

    # --- what workers need ------------------------------------------------------------------------

    def services_of(self, namespace: str) -> list[TargetService]:
        return list(self._services.get(namespace, {}).values())

    def report(self, worker: PodWorker) -> None:
        """Send the pod's status soon; several changes become one, and one is sent at a time."""
        uid = worker.pod.metadata.uid
        if uid not in self._dirty:
            self._dirty[uid] = worker
            if uid not in self._sending:
                self._reports.put_nowait(uid)

    async def _report_loop(self) -> None:
        while True:
            uid = await self._reports.get()
            worker = self._dirty.pop(uid, None)
            if worker is None:
                continue
            self._sending.add(uid)
            try:
                await self._api.pod_status(
                    worker.pod, pod_status(worker.pod, worker.state, now_text())
                )
            except ApiError as error:
                event(log, logging.WARNING, "status not taken", pod=worker, error=error)
                await asyncio.sleep(REPORT_RETRY_S)
                self._dirty[uid] = worker
            finally:
                self._sending.discard(uid)
            if uid in self._dirty:
                self._reports.put_nowait(uid)

    def dns_server(self, udp: Sequence[socket.socket], tcp: Sequence[socket.socket]) -> DnsServer:
        return DnsServer(self._zone, udp, tcp)

    async def remove(self, pod: Pod) -> None:
        """The pod has ended: take its object away."""
        await self._api.remove_pod(pod)

    async def visit(self, call: Callable[[], Any]) -> Any:
        """Run a blocking call that visits pod namespaces."""
        return await asyncio.get_running_loop().run_in_executor(self._visitor, call)

    # --- the command line -------------------------------------------------------------------------

    def _answer_logs(self, query: Query) -> list[dict[str, Any]]:
        identities = [self._outside, *(w.identity for w in self._workers.values())]
        for identity in identities:
            if (identity.namespace, identity.pod) == (query.get("namespace"), query.get("pod")):
                return [entry._asdict() for entry in identity.log]
        raise ConfigError(f"no pod {query.get('namespace')}/{query.get('pod')} runs here")

    def _answer_summary(self, _query: Query) -> dict[str, Any]:
        workers = self._workers.values()
        waiting = [
            f"{worker}: {worker.state.message or worker.state.waiting}"
            for worker in workers
            if worker.state.phase == "Pending"
        ]
        return {
            "pods": len(workers),
            "running": sum(w.state.phase == "Running" for w in workers),
            "waiting": waiting,
            "nodes": {name: node.ready.is_set() for name, node in self._nodes.items()},
        }
