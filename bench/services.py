"""The Service proxy's control path: cold start, one change, restart, memory, through the API.

    make bench BENCH=services [ARGS="--datapath ebpf --sizes 10000x2,44125x1"]

A Service answers when a connection to its ClusterIP is accepted: a listener stands behind the last
Service of the table. With KUBE_PROXY=/path/to/kube-proxy that binary does the same in the same run;
without it its published figures stand beside ours, labelled so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from ipaddress import ip_address

from bench.cluster import NODE, Cluster, maps_mib, resident_mib
from bench.report import Report
from podwire.kernel import netns
from podwire.kube import kubeconfig
from podwire.kube.client import Client
from podwire.kube.objects import EndpointSlice, Json, Service

SIZES = "1000x2,10000x2,30000x2,44125x1,5006x50"
BACKEND = "10.244.0.1"
PORTS = (8081, 8082)
COLD_STARTS = 3
CHANGES = 40
FIRST_IP = int(ip_address("10.97.0.0"))
# cold start (s), one Service added (s), resident (MiB), where published
PUBLISHED = {
    "10000x2": (30.0, 9.9, 184.0),
    "44125x1": (1003.9, None, None),
    "5006x50": (795.3, None, None),
}
GOALS = {"nftables": {"10000x2": 2.0, "44125x1": 6.0, "5006x50": 6.0},
         "ebpf": {"10000x2": 1.5, "5006x50": 5.0}}  # fmt: skip
ADDED_GOAL_MS = {"nftables": 10.0, "ebpf": 5.0}


def cluster_ip(number: int) -> str:
    return str(ip_address(FIRST_IP + number))


def service(number: int) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "default", "name": f"s{number}"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": cluster_ip(number),
            "clusterIPs": [cluster_ip(number)],
            "ipFamilies": ["IPv4"],
            "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
        },
    }


def endpoint_slice(number: int, addresses: list[str], port: int, part: int = 0) -> Json:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default",
            "name": f"s{number}-{part}",
            "labels": {"kubernetes.io/service-name": f"s{number}"},
        },
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": [a], "nodeName": "other", "conditions": {"ready": True}}
            for a in addresses
        ],
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
    }


def cluster(services: int, endpoints: int) -> Iterable[Json]:
    """All but the last Service have endpoints elsewhere; the last one's is the listener here."""
    address = int(ip_address("10.128.0.0"))
    for number in range(services):
        yield service(number)
        if number == services - 1:
            yield endpoint_slice(number, [BACKEND], PORTS[0])
        else:
            some = [str(ip_address(address + i)) for i in range(endpoints)]
            address += endpoints
            yield endpoint_slice(number, some, 8080)


class Backends:
    """Listeners at `PORTS` that say their port and close."""

    def __init__(self, netns_fd: int) -> None:
        self._sockets: list[socket.socket] = []
        for port in PORTS:
            with netns.entered(netns_fd):
                listener = socket.create_server((BACKEND, port), backlog=1024)
            self._sockets.append(listener)
            threading.Thread(target=self._serve, args=(listener, port), daemon=True).start()

    @staticmethod
    def _serve(listener: socket.socket, port: int) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(str(port).encode())

    def close(self) -> None:
        for listener in self._sockets:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


def answered_port(netns_fd: int, address: str) -> int:
    """The port of the backend that answers at once; 0 when none does."""
    with netns.entered(netns_fd):
        client = socket.socket()
    with client:
        client.settimeout(0.001)  # on one machine it is there at once or not at all
        try:
            client.connect((address, 80))
            return int(client.recv(16) or 0)
        except OSError:
            return 0


def wait_answer(netns_fd: int, address: str, port: int, timeout_s: float) -> float:
    """Seconds until a new connection to `address` reaches `port`."""
    began = time.perf_counter()
    while answered_port(netns_fd, address) != port:
        if time.perf_counter() - began > timeout_s:
            raise TimeoutError(f"{address} does not answer from port {port}")
        time.sleep(0.0002)
    return time.perf_counter() - began


async def one_by_one(world: Cluster, services: int) -> tuple[list[float], list[float]]:
    """Milliseconds from the API write to the first packet balanced: Services added, and moved."""
    added: list[float] = []
    moved: list[float] = []
    config = kubeconfig.load(str(world.kubeconfig))
    async with Client(config) as client:
        for number in range(services, services + CHANGES):
            await client.create(EndpointSlice, endpoint_slice(number, [BACKEND], PORTS[0]),
                                "default")  # fmt: skip
            began = time.perf_counter()
            await client.create(Service, service(number), "default")
            await asyncio.to_thread(wait_answer, world.netns_fd, cluster_ip(number), PORTS[0], 30)
            added.append((time.perf_counter() - began) * 1000)
            began = time.perf_counter()
            await client.update(EndpointSlice, endpoint_slice(number, [BACKEND], PORTS[1]))
            await asyncio.to_thread(wait_answer, world.netns_fd, cluster_ip(number), PORTS[1], 30)
            moved.append((time.perf_counter() - began) * 1000)
    return added, moved


def kube_proxy(world: Cluster, binary: str) -> subprocess.Popen[bytes]:
    command = [binary, "--proxy-mode=nftables", f"--kubeconfig={world.kubeconfig}",
               f"--hostname-override={NODE}", "--cluster-cidr=10.244.0.0/16",
               "--conntrack-max-per-core=0"]  # fmt: skip
    with netns.entered(world.netns_fd):
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def measure(size: str, datapath: str, report: Report) -> list[float]:
    """All rows of one size; the samples of one Service added."""
    services, endpoints = map(int, size.split("x"))
    last = cluster_ip(services - 1)
    published = PUBLISHED.get(size, (None, None, None))
    peer: dict[str, list[float]] = {}
    with Cluster() as world:
        world.load(cluster, services, endpoints)
        backends = Backends(world.netns_fd)
        binary = os.environ.get("KUBE_PROXY")
        if binary:
            began = time.perf_counter()
            process = kube_proxy(world, binary)
            wait_answer(world.netns_fd, last, PORTS[0], 1200)
            peer["cold"] = [time.perf_counter() - began]
            peer["memory"] = [resident_mib(process.pid)]
            process.terminate()
            process.wait(30)
            netns.run(world.netns_fd, ["nft", "flush", "ruleset"], timeout_s=300)
        flags = ("--only=services", f"--datapath={datapath}")
        cold: list[float] = []
        while True:
            began = time.perf_counter()
            agent = world.agent(*flags)
            wait_answer(world.netns_fd, last, PORTS[0], 120)
            cold.append(time.perf_counter() - began)
            world.wait_healthy()
            if len(cold) == COLD_STARTS:
                break
            world.stop(agent)
            world.cleanup()
            shutil.rmtree(world.folder / "state")  # the last known objects
        added, moved = asyncio.run(one_by_one(world, services))
        memory = resident_mib(agent.pid) + maps_mib(agent.pid)
        world.stop(agent)
        began = time.perf_counter()
        agent = world.agent(*flags)
        world.wait_healthy()
        restart = time.perf_counter() - began
        world.stop(agent)
        backends.close()
    label = f"{services:,} × {endpoints}"
    note = "" if binary else " (peer: published)"
    goals = GOALS.get(datapath, {})
    peer_cold = peer.get("cold") or _published(published[0])
    report.row(f"{label} cold start{note if published[0] else ''}", cold, "s",
               peer=peer_cold, at_most=goals.get(size))  # fmt: skip
    report.row(f"{label} one Service added{note if published[1] else ''}", added, "ms",
               peer=_published(published[1], 1000),
               at_most=ADDED_GOAL_MS.get(datapath) if size == "10000x2" else None)  # fmt: skip
    report.row(f"{label} one endpoint changed", moved, "ms")
    report.row(f"{label} agent restarted, nothing changed", [restart], "s")
    counted = ", maps counted" if datapath == "ebpf" else ""
    report.row(f"{label} resident{counted}{note if published[2] else ''}", [memory], "MiB",
               peer=peer.get("memory") or _published(published[2]),
               at_most=130 if size == "10000x2" and datapath == "nftables" else None)  # fmt: skip
    return added


def _published(value: float | None, factor: float = 1) -> list[float] | None:
    return None if value is None else [value * factor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datapath", default="nftables")
    parser.add_argument("--sizes", default=SIZES)
    args = parser.parse_args()
    name = "services" if args.datapath == "nftables" else f"services-{args.datapath}"
    report = Report(name, f"Services through the API, {args.datapath}")
    small = measure("100x2", args.datapath, report)
    for size in args.sizes.split(","):
        added = measure(size, args.datapath, report)
        if size == "30000x2":
            report.row("one Service added at 30,000 beside 100", added, "ms", peer=small,
                       ratio_at_most=1.5)  # fmt: skip
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
