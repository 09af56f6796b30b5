"""The lab's cloud as a process: instances for the nodes, EC2, the metadata service, the network.

What goes wrong on purpose is told it on ``cloud.sock``, JSON over HTTP:

    GET  /calls                     the requests that reached EC2
    GET  /enis                      what EC2 holds
    POST /faults  {…}               a `Fault`'s fields; also latency_s, attach_delay_s, bucket
    POST /faults/clear
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from dataclasses import asdict
from typing import Any

from aiohttp import web

from podwire.kernel import netns
from podwire.lab.cloud import network
from podwire.lab.cloud.faults import Fault, TokenBucket
from podwire.lab.cloud.network import CloudNetwork
from podwire.lab.cloud.server import Cloud, ec2_app, imds_app, serve
from podwire.lab.state import LabDir, Record

SOCKET = "cloud.sock"
HTTP = 80


class LabCloud:
    """One lab's cloud."""

    def __init__(self, lab: LabDir, record: Record) -> None:
        self._lab, self._dual_stack = lab, record.dual_stack
        self.cloud = Cloud()
        model = self.cloud.model
        vpc = model.add_vpc([network.VPC[0]], [network.VPC[1]])
        self._subnet = model.add_subnet(vpc, network.SUBNET[0], ipv6_cidr=network.SUBNET[1])
        self._type = str(record.settings.get("instance_type") or "m5.large")
        self._network = CloudNetwork(lab, model)
        self._instances: dict[str, str] = {}  # node → instance
        self._plug_soon = asyncio.Event()

    async def run(self) -> None:
        """Serve until killed."""
        self.cloud.model.listeners.append(self._plug_soon.set)
        self.follow_nodes()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.follow_nodes)
        for address, app in (
            (network.METADATA, imds_app(self.cloud, self._instance_of)),
            (network.EC2, ec2_app(self.cloud)),
        ):
            await serve(app, lambda runner, a=address: web.SockSite(runner, self._listen(a)))
        path = self._lab.path / SOCKET
        await serve(self._control(), lambda runner: web.UnixSite(runner, str(path)))
        while True:
            await self._plug_soon.wait()
            self._plug_soon.clear()
            self._plug()

    def follow_nodes(self) -> None:
        """Launch instances for new nodes, terminate those of removed ones."""
        nodes, model = self._lab.read().nodes, self.cloud.model
        for name in self._instances.keys() - nodes.keys():
            model.terminate(model.instances[self._instances.pop(name)])
        for name, node in nodes.items():
            if name in self._instances:
                continue
            instance = model.run_instance(
                self._type, self._subnet, ipv6=self._dual_stack, address=node.addresses[0],
                address6=node.addresses[1] if self._dual_stack else "",
            )  # fmt: skip
            self._instances[name] = instance.id
            self._network.nodes[instance.id] = name
        self._plug()

    def _plug(self) -> None:
        ready_at = self._network.sync()
        if ready_at is not None:
            delay = max(ready_at - self.cloud.model.clock(), 0.01)
            asyncio.get_running_loop().call_later(delay, self._plug_soon.set)

    def _listen(self, address: str) -> socket.socket:
        fd = netns.open_path(self._lab.netns("underlay"))
        try:
            with netns.entered(fd):
                return socket.create_server((address, HTTP))
        finally:
            os.close(fd)

    def _instance_of(self, request: web.Request) -> str | None:
        """Who asks, by the address of its primary ENI."""
        for id in self._instances.values():
            if self.cloud.model.primary_eni(id).primary == request.remote:
                return id
        return None

    def _control(self) -> web.Application:
        async def calls(_: web.Request) -> web.Response:
            return web.json_response([asdict(call) for call in self.cloud.calls])

        async def enis(_: web.Request) -> web.Response:
            answer = self.cloud.operations.call("DescribeNetworkInterfaces", {})
            return web.Response(text=json.dumps(answer, default=str))

        async def fault(request: web.Request) -> web.Response:
            self._misbehave(await request.json())
            return web.json_response({})

        async def clear(_: web.Request) -> web.Response:
            self.cloud.faults.clear()
            self.cloud.faults.latency_s = self.cloud.model.attach_delay_s = 0.0
            return web.json_response({})

        app = web.Application()
        app.router.add_get("/calls", calls)
        app.router.add_get("/enis", enis)
        app.router.add_post("/faults", fault)
        app.router.add_post("/faults/clear", clear)
        return app

    def _misbehave(self, asked: dict[str, Any]) -> None:
        faults = self.cloud.faults
        faults.latency_s = asked.pop("latency_s", faults.latency_s)
        model = self.cloud.model
        model.attach_delay_s = asked.pop("attach_delay_s", model.attach_delay_s)
        if bucket := asked.pop("bucket", None):
            faults.bucket = TokenBucket(**bucket, filled_at=model.clock())
        if asked:
            faults.add(Fault(**asked))


def cloud_main(lab: LabDir, record: Record) -> None:
    """The process."""

    async def run() -> None:
        await LabCloud(lab, record).run()

    asyncio.run(run())
