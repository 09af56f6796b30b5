"""One node and an API server for benchmarks: real processes, one network namespace.

The server runs in a child process and listens on the loopback of both namespaces, so that what the
benchmark measures does not share an interpreter with it. Objects come in bulk through a pipe.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from podwire.agent.control import ask
from podwire.errors import ApiError
from podwire.kernel import netns
from podwire.kube.objects import Json
from podwire.lab.api.server import ApiConfig, ApiServer

NODE, NODE_IP = "bench", "192.0.2.11"
Generator = Callable[..., Iterable[Json]]


def _serve(listeners: list[socket.socket], pipe: Connection, token: str) -> None:
    async def main() -> None:
        server = ApiServer(ApiConfig(service_cidrs=("10.96.0.0/12",), token=token))
        await server.start(listeners)
        pipe.send(server.kubeconfig())
        ready = asyncio.Event()
        asyncio.get_running_loop().add_reader(pipe.fileno(), ready.set)
        while True:
            await ready.wait()
            ready.clear()
            while pipe.poll():
                try:
                    generator, arguments = pipe.recv()
                except EOFError:
                    return
                server.load(generator(*arguments))
                pipe.send("loaded")

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(main())


class Cluster(AbstractContextManager["Cluster"]):
    """`netns_fd` is the node's namespace; `folder` holds the kubeconfig and the agent's files."""

    def __init__(self, node: str = NODE) -> None:
        """`node` names the pins of eBPF, which all namespaces of the machine see."""
        self.node = node
        self.folder = Path(tempfile.mkdtemp(prefix="podwire-bench-"))
        self.netns_fd = netns.create()
        self._agents: list[subprocess.Popen[bytes]] = []
        netns.run(
            self.netns_fd,
            ["sh", "-ec", "ip link set lo up; ip link add eth0 type veth peer name up0; "
             f"ip addr add {NODE_IP}/24 dev eth0; ip link set eth0 up; ip link set up0 up; "
             "ip route add default via 192.0.2.1; ip addr add 10.244.0.1/32 dev lo"],
        )  # fmt: skip
        with netns.entered(self.netns_fd):
            inside = socket.create_server(("127.0.0.1", 0), backlog=128)
        outside = socket.create_server(inside.getsockname(), backlog=128)  # for the benchmark
        self._pipe, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self._server = context.Process(
            target=_serve, args=([inside, outside], other, "bench"), daemon=True
        )
        self._server.start()
        inside.close()
        outside.close()
        self.kubeconfig = self.folder / "kubeconfig"
        self.kubeconfig.write_text(self._pipe.recv())
        self.load(_node, node)

    def load(self, generator: Generator, *arguments: Any) -> None:
        """Put what ``generator(*arguments)`` yields into the API."""
        self._pipe.send((generator, arguments))
        self._pipe.recv()

    def agent(self, *flags: str) -> subprocess.Popen[bytes]:
        """Start an agent in the namespace; logs go to the terminal when they are warnings."""
        run, state = self.folder / "run", self.folder / "state"
        command = [
            sys.executable, "-m", "podwire", "agent", "--node-name", self.node,
            "--kubeconfig", str(self.kubeconfig), "--run-dir", str(run), "--state-dir", str(state),
            "--cni-conf-dir", str(self.folder / "cni"), "--cluster-cidr", "10.244.0.0/16",
            "--log-level", "warning", *flags,
        ]  # fmt: skip
        with netns.entered(self.netns_fd):
            process = subprocess.Popen(command)
        self._agents.append(process)
        return process

    def status(self) -> dict[str, Any]:
        """The agent's status; {} while it does not answer."""
        try:
            return ask(self.folder / "run" / "agent.sock", "/v1/status")
        except ApiError:
            return {}

    def wait_healthy(self, timeout_s: float = 120) -> None:
        until = time.monotonic() + timeout_s
        while not self.status().get("healthy"):
            if time.monotonic() > until:
                raise TimeoutError(f"the agent is not healthy: {self.status()}")
            time.sleep(0.01)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        process.wait(10)
        self._agents.remove(process)

    def cleanup(self) -> None:
        """Take what agents left out of the kernel."""
        command = [
            sys.executable, "-m", "podwire", "agent", "--cleanup", "--node-name", self.node,
            "--state-dir", str(self.folder / "state"),
        ]  # fmt: skip
        netns.run(self.netns_fd, command, timeout_s=120)

    def __exit__(self, *exc: object) -> None:
        for process in self._agents:
            process.kill()
            process.wait()
        self.cleanup()  # pins outlive the namespace
        self._pipe.close()
        self._server.terminate()
        self._server.join(5)
        os.close(self.netns_fd)
        shutil.rmtree(self.folder, ignore_errors=True)


def _node(name: str) -> Iterable[Json]:
    yield {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDR": "10.244.0.0/22", "podCIDRs": ["10.244.0.0/22"]},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE_IP}]},
    }


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"no VmRSS for {pid}")


def maps_mib(pid: int) -> float:
    """What the eBPF maps that a process holds take in the kernel, each counted once."""
    taken: dict[str, int] = {}
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        facts = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        if "map_id" in facts and "memlock" in facts:
            taken[facts["map_id"]] = int(facts["memlock"])
    return sum(taken.values()) / (1 << 20)
