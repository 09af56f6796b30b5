"""Churn: 500 endpoint changes a second for 30 s, with traffic to Services that do not change.

    make bench BENCH=churn [ARGS="--datapath nftables --seconds 30"]

Every connection to a stable Service must reach its own backend: none lost, none misdirected. The
agent takes at most one core, and its memory is flat.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from bench.cluster import Cluster, resident_mib
from bench.report import Report
from bench.services import BACKEND, PORTS, Backends, cluster_ip, endpoint_slice, service
from podwire.kernel import netns
from podwire.kube import kubeconfig
from podwire.kube.client import Client
from podwire.kube.objects import EndpointSlice, Json

SERVICES, CHANGING, PER_SECOND, WRITERS = 1000, 200, 500, 4


def objects() -> Iterable[Json]:
    """The first two Services are stable, each with its own backend; the next ones change."""
    for number in range(SERVICES):
        yield service(number)
        own = [BACKEND] if number < 2 else [f"10.200.{number // 250}.{number % 250}"]
        yield endpoint_slice(number, own, PORTS[number % 2])


class Traffic(threading.Thread):
    """Connects to the stable Services in turn and counts what came back."""

    def __init__(self, netns_fd: int) -> None:
        super().__init__(daemon=True)
        self._netns_fd = netns_fd
        self.stopping = threading.Event()
        self.good = self.lost = self.misdirected = 0

    def run(self) -> None:
        while not self.stopping.is_set():
            for number in (0, 1):
                self._connect(number)
            self.stopping.wait(0.005)

    def _connect(self, number: int) -> None:
        with netns.entered(self._netns_fd):
            client = socket.socket()
        with client:
            client.settimeout(1)
            try:
                client.connect((cluster_ip(number), 80))
                answer = client.recv(16)
            except OSError:
                self.lost += 1
                return
        if answer == str(PORTS[number]).encode():
            self.good += 1
        else:
            self.misdirected += 1


async def churn(world: Cluster, seconds: float) -> int:
    """Move endpoints of changing Services, evenly over time; how many changes were made."""
    began, made = time.monotonic(), 0

    async def writer(client: Client, which: int) -> None:
        nonlocal made
        turn = 0
        while (elapsed := time.monotonic() - began) < seconds:
            due = began + turn * WRITERS / PER_SECOND
            if due > time.monotonic():
                await asyncio.sleep(due - time.monotonic())
            number = 2 + (turn * WRITERS + which) % CHANGING
            count = 1 + (turn + int(elapsed)) % 3
            addresses = [f"10.201.{number % 250}.{1 + (turn + i) % 250}" for i in range(count)]
            await client.update(EndpointSlice, endpoint_slice(number, addresses, 8080))
            turn += 1
            made += 1

    async with Client(kubeconfig.load(str(world.kubeconfig))) as client:
        await asyncio.gather(*(writer(client, which) for which in range(WRITERS)))
    return made


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datapath", default="nftables")
    parser.add_argument("--seconds", type=float, default=30)
    args = parser.parse_args()
    with Cluster() as world:
        world.load(objects)
        backends = Backends(world.netns_fd)
        agent = world.agent("--only=services", f"--datapath={args.datapath}")
        world.wait_healthy()
        asyncio.run(churn(world, 3))  # interpreter and allocator settle
        traffic = Traffic(world.netns_fd)
        traffic.start()
        memory, used, began = [resident_mib(agent.pid)], cpu_s(agent.pid), time.monotonic()
        made = asyncio.run(churn(world, args.seconds))
        took = time.monotonic() - began
        used = cpu_s(agent.pid) - used
        memory.append(resident_mib(agent.pid))
        traffic.stopping.set()
        traffic.join()
        world.stop(agent)
        backends.close()
    report = Report("churn", f"{SERVICES:,} Services under churn, {args.datapath}")
    report.row("endpoint changes", [made / took], "/s", at_least=0.9 * PER_SECOND)
    report.row("connections to stable Services", [traffic.good], "", at_least=100)
    report.row("lost", [traffic.lost], "", at_most=0)
    report.row("misdirected", [traffic.misdirected], "", at_most=0)
    report.row("agent's CPU", [used / took], "cores", at_most=1)
    report.row("memory growth", [memory[1] - memory[0]], "MiB", at_most=5)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
