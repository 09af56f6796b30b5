"""One pod's life on its node: namespace, network, containers, readiness, end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from podwire.agent.logs import event
from podwire.errors import PodwireError
from podwire.kernel import netns
from podwire.lab import echo
from podwire.lab.dns import DnsServer
from podwire.lab.runtime import cni, probes, sandbox
from podwire.lab.runtime.nodes import NodeHost
from podwire.lab.runtime.objects import Pod, TargetService, served_ports
from podwire.lab.runtime.status import PodState
from podwire.lab.state import LabDir

log = logging.getLogger("podwire.lab.runtime")

HEALTHY_ANNOTATION = "lab.podwire.dev/healthy"  # "false": /healthz and so the probes answer 503
DNS_PORT = 53
LINGER_S = 0.5  # a deleted pod serves on while Services and routes forget it
JOB_S = 1.0  # how long the containers of a Job's pod take
RETRY_FIRST_S, RETRY_MOST_S = 0.05, 5.0


def now_text() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Host(Protocol):
    """What a pod needs from the runtime around it."""

    lab: LabDir

    def services_of(self, namespace: str) -> list[TargetService]: ...
    def report(self, worker: PodWorker) -> None: ...
    def dns_server(
        self, udp: Sequence[socket.socket], tcp: Sequence[socket.socket]
    ) -> DnsServer: ...
    async def remove(self, pod: Pod) -> None: ...
    async def visit(self, call: Callable[[], Any]) -> Any: ...


class PodWorker:
    """Runs one pod. `update` brings a new version of the object, `end` ends it."""

    def __init__(self, host: Host, node: NodeHost, pod: Pod) -> None:
        self.pod = pod
        self.node = node
        self.state = PodState(host_addresses=node.node.addresses, started=now_text())
        self.state.container_id = pod.metadata.uid.replace("-", "")
        self.identity = echo.Identity(pod.metadata.namespace, pod.metadata.name, node.name)
        self._host = host
        self._servers = echo.Servers(self.identity)
        self._dns: DnsServer | None = None
        self._ports: set[tuple[str, int]] = set()
        self._netns_fd: int | None = None
        self._network: cni.NetworkList | None = None  # with which ADD was called
        self._adding: asyncio.Future[Any] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = asyncio.Event()
        self._linger_s = 0.0
        self._gone = False  # the object is gone from the API
        self.update(pod)
        self.task = asyncio.create_task(self._run())

    # --- from outside ---------------------------------------------------------------------------

    def update(self, pod: Pod) -> None:
        """A new version of the object."""
        self.pod = pod
        self.identity.healthy = pod.metadata.annotations.get(HEALTHY_ANNOTATION) != "false"
        if pod.metadata.deletion_timestamp and not self._ending.is_set():
            grace = pod.metadata.deletion_grace_period_seconds
            wanted = max(LINGER_S, pod.pre_stop_s)
            self._linger_s = wanted if grace is None else min(wanted, grace)
            self._ending.set()
        elif self.state.phase == "Running":
            self.serve_more()

    def end(self) -> None:
        """The object is gone: no lingering."""
        self._gone = True
        self._linger_s = 0.0
        self._ending.set()

    def abandon(self) -> None:
        """The node is gone, and the pod's network with it: nothing is left to take away."""
        self._network = None
        self.end()

    def node_changed(self) -> None:
        """The node has other addresses."""
        self.state.host_addresses = self.node.node.addresses
        if self.pod.spec.host_network and self.state.addresses:
            self.state.addresses = self.node.node.addresses
        if self.state.phase != "Pending":
            self._host.report(self)

    def serve_more(self) -> None:
        """A Service or the labels changed: listen on target ports that are new."""
        ports = self._wanted_ports() - self._ports
        if ports and self.state.phase == "Running":
            self._ports |= ports
            self._background(self._serve(ports))

    # --- life ------------------------------------------------------------------------------------

    async def _run(self) -> None:
        start = asyncio.create_task(self._start())
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait({start, ending}, return_when=asyncio.FIRST_COMPLETED)
        if start.done() and not start.cancelled() and (error := start.exception()) is not None:
            event(log, logging.ERROR, "pod failed to start", pod=self, error=error)
            self.state.waiting, self.state.message = "CreateContainerError", str(error)
            self._host.report(self)
        elif start.done() and self.pod.completes:
            await asyncio.wait({ending}, timeout=JOB_S)
            if not self._ending.is_set():
                await self._complete()
        await ending
        start.cancel()
        await asyncio.wait({start})
        if self.state.phase == "Running" and self._linger_s:
            await asyncio.sleep(self._linger_s)
        await self._stop()
        if not self._gone:
            await self._host.remove(self.pod)

    async def _start(self) -> None:
        self._ports = self._wanted_ports()
        if self.pod.spec.host_network:
            self._netns_fd = os.dup(self.node.netns_fd)
            self.state.addresses = self.node.node.addresses
        else:
            path = self._host.lab.netns(f"pod-{self.pod.metadata.uid}")
            self._netns_fd = await self._host.visit(functools.partial(sandbox.create, path))
            await self._connect()
        await self._serve(self._ports)
        self.state.phase = "Running"
        self.state.running = now_text()
        self.state.message = ""
        for container in self.pod.containers:
            if container.readiness_probe is None or not self.state.addresses:
                self.state.ready.add(container.name)
        self._host.report(self)
        self._start_probes()

    async def _connect(self) -> None:
        """CNI ADD, again and again with growing pauses, as the kubelet does."""
        delay = RETRY_FIRST_S
        while True:
            await self.node.ready.wait()
            assert self.node.network is not None
            self._network = self.node.network
            add = functools.partial(self.node.plugins.add, self._network, self.sandbox())
            self._adding = asyncio.ensure_future(self.node.run(add))
            try:
                result = await asyncio.shield(self._adding)
            except cni.CniError as error:
                event(log, logging.WARNING, "ADD failed", pod=self, code=error.code, error=error)
                self.state.message = str(error)
                if delay > 8 * RETRY_FIRST_S:  # a short wait is not worth a status
                    self._host.report(self)
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_MOST_S)
            else:
                self.state.addresses = [ip["address"].partition("/")[0] for ip in result["ips"]]
                return

    def sandbox(self) -> cni.Sandbox:
        """What the CNI plugin is told of this pod."""
        meta = self.pod.metadata
        mappings = [
            {
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": port.protocol.lower(),
                **({"hostIP": port.host_ip} if port.host_ip else {}),
            }
            for container in self.pod.containers
            for port in container.ports
            if port.host_port
        ]
        capabilities: dict[str, object] = {"portMappings": mappings} if mappings else {}
        bandwidth = _bandwidth(meta.annotations)
        if bandwidth:
            capabilities["bandwidth"] = bandwidth
        return cni.Sandbox(
            self.state.container_id,
            str(self._host.lab.netns(f"pod-{meta.uid}")),
            meta.namespace,
            meta.name,
            meta.uid,
            capabilities,
        )

    async def _serve(self, ports: set[tuple[str, int]]) -> None:
        fd = self._netns_fd
        assert fd is not None
        dns: dict[str, list[socket.socket]] = {"UDP": [], "TCP": []}
        for protocol, sock in sandbox.listen(fd, ports):
            if self.pod.serves_dns and sock.getsockname()[1] == DNS_PORT:
                dns[protocol].append(sock)
            else:
                await self._servers.serve(protocol, sock)
        if self.pod.serves_dns and self._dns is None:
            self._dns = self._host.dns_server(dns["UDP"], dns["TCP"])
            await self._dns.start()

    def _start_probes(self) -> None:
        for container in self.pod.containers:
            probe = container.readiness_probe
            if probe is not None and self.state.addresses:
                self._tasks.append(
                    asyncio.create_task(
                        probes.watch(
                            self.node.netns_fd,
                            self.state.addresses[0],
                            container,
                            probe,
                            functools.partial(self._probed, container.name),
                        )
                    )
                )

    def _probed(self, container: str, ready: bool) -> None:
        if ready:
            self.state.ready.add(container)
        else:
            self.state.ready.discard(container)
        self._host.report(self)

    async def _complete(self) -> None:
        """The containers of a Job's pod are done; the sandbox goes, the object stays."""
        await self._stop()
        self.state.phase = "Succeeded"
        self.state.finished = now_text()
        self._host.report(self)

    async def _stop(self) -> None:
        """End the containers, then the network, then the namespace."""
        for task in self._tasks:
            task.cancel()
        self._servers.close()
        if self._dns is not None:
            await self._dns.stop()
        if self._adding is not None:
            await asyncio.wait({self._adding})
        if self._network is not None:
            await self._disconnect(self._network)
            self._network = None
        if self._netns_fd is not None:
            os.close(self._netns_fd)
            self._netns_fd = None
            if not self.pod.spec.host_network:
                path = self._host.lab.netns(f"pod-{self.pod.metadata.uid}")
                await self._host.visit(functools.partial(netns.remove_named, path))

    async def _disconnect(self, network: cni.NetworkList) -> None:
        delay = RETRY_FIRST_S
        while True:
            try:
                delete = functools.partial(self.node.plugins.delete, network, self.sandbox())
                await self.node.run(delete)
                return
            except PodwireError as error:
                event(log, logging.WARNING, "DEL failed", pod=self, error=error)
            await asyncio.sleep(delay)
            delay = min(delay * 2, RETRY_MOST_S)

    def _wanted_ports(self) -> set[tuple[str, int]]:
        return served_ports(self.pod, self._host.services_of(self.pod.metadata.namespace))

    def _background(self, work: Any) -> None:
        async def run() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                try:
                    await work
                except PodwireError as error:
                    event(log, logging.ERROR, "cannot serve", pod=self, error=error)

        self._tasks.append(asyncio.create_task(run()))

    def __str__(self) -> str:
        return f"{self.pod.metadata.namespace}/{self.pod.metadata.name}"


_SUFFIXES = {"k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def _bandwidth(annotations: dict[str, str]) -> dict[str, int]:
    """The `bandwidth` capability from the kubernetes.io annotations, as the kubelet makes it."""
    found: dict[str, int] = {}
    for direction in ("ingress", "egress"):
        text = annotations.get(f"kubernetes.io/{direction}-bandwidth", "")
        digits = text.rstrip("kMGi")
        if digits.isdigit():
            rate = int(digits) * _SUFFIXES.get(text[len(digits) :], 1)
            found |= {f"{direction}Rate": rate, f"{direction}Burst": 2**31 - 1}
    return found
