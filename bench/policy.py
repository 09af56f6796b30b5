"""Policies through the API: from the write to the first packet that is judged by it.

    make bench BENCH=policy [ARGS="--datapath nftables --sizes 100,1000,10000"]

As many pods as policies; a hundred of the pods are this node's, the others are objects. Two have a
namespace and a link: one sends a new UDP connection every fraction of a millisecond, the other
listens, and the first packet whose fate is new ends the measurement. An agent of its own process
watches a real API server; policies are compiled for the node's own pods.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from bench.cluster import NODE, Cluster
from bench.path_worlds import Program, Way, compiled
from bench.report import Report
from podwire.kernel import netns
from podwire.kube import kubeconfig
from podwire.kube.client import Client
from podwire.kube.objects import Json, NetworkPolicy, Pod

CLIENT, SERVER = "10.244.0.10", "10.244.0.11"
OWN_PODS = 100
CHANGES = 60
NAMESPACES = 100
CONNECTIONS = 3000


def name_of(number: int) -> str:
    return f"ns{number % NAMESPACES}"


def pod(number: int, app: str = "") -> Json:
    """Pods 0 and 1 are the client and the server; the first hundred are on this node."""
    own = number < OWN_PODS
    address = f"10.244.0.{10 + number}" if own else (
        f"10.{245 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
    )  # fmt: skip
    namespace = "own" if number < 2 else name_of(number)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": namespace,
            "name": f"p{number}",
            "labels": {"app": app or f"app{number % 1000}", "tier": f"t{number % 3}"},
        },
        "spec": {
            "nodeName": NODE if own else f"other{number % 99}",
            "containers": [{"name": "c", "image": "none",
                            "ports": [{"name": "web", "containerPort": 8080}]}],
        },
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    }  # fmt: skip


def policy(number: int) -> Json:
    """One of the many: pods by label from pods by label, from a block, by name and number."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": name_of(number), "name": f"policy{number}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": f"app{number % 1000}"}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [
                        {"podSelector": {"matchLabels": {"tier": "t1"}}},
                        {"namespaceSelector": {"matchLabels": {"team": f"team{number % 10}"}}},
                        {"ipBlock": {"cidr": "172.16.0.0/12", "except": ["172.16.1.0/24"]}},
                    ],
                    "ports": [{"port": 80 + number % 7}, {"port": "web"}],
                }
            ],
        },
    }


def deny(name: str, app: str = "") -> Json:
    """Isolates the server; with `app`, but for clients of this label."""
    rules = [{"from": [{"podSelector": {"matchLabels": {"app": app}}}]}] if app else []
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "own", "name": name},
        "spec": {
            "podSelector": {"matchLabels": {"app": "app1"}},
            "policyTypes": ["Ingress"],
            "ingress": rules,
        },
    }


def objects(size: int) -> Iterable[Json]:
    names = [("own", "own"), *((f"ns{i}", f"team{i % 10}") for i in range(NAMESPACES))]
    for name, team in names:
        labels = {"team": team, "kubernetes.io/metadata.name": name}
        yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name,
               "labels": labels}}  # fmt: skip
    for number in range(size):
        yield pod(number)
    for number in range(size):
        yield policy(number)


class Pods:
    """The client's and the server's namespace, routed to the node's."""

    def __init__(self, node_fd: int) -> None:
        self.fds: list[int] = []
        for number, address in enumerate((CLIENT, SERVER)):
            fd = netns.create()
            self.fds.append(fd)
            link = f"pod{number}"
            here, there = (f"02:00:00:00:0{side}:0{number}" for side in (1, 2))
            run(node_fd, f"ip link add {link} address {here} type veth "
                f"peer name eth0 address {there} netns /proc/self/fd/{fd}", fd)  # fmt: skip
            run(node_fd, f"ip link set {link} up && ip route add {address}/32 dev {link} && "
                f"ip neigh add {address} lladdr {there} dev {link} && "
                "sysctl -qw net.ipv4.ip_forward=1")  # fmt: skip
            run(fd, f"ip link set lo up && ip addr add {address}/32 dev eth0 && "
                "ip link set eth0 up && ip route add 169.254.1.1 dev eth0 && "
                f"ip neigh add 169.254.1.1 lladdr {here} dev eth0 && "
                "ip route add default via 169.254.1.1")  # fmt: skip
        self.server = netns.socket(self.fds[1], socket.AF_INET, socket.SOCK_DGRAM)
        self.server.bind((SERVER, 53))
        self.server.settimeout(0.002)
        self.wait(True, time.perf_counter())

    def close(self) -> None:
        self.server.close()
        for fd in self.fds:
            os.close(fd)

    def passes(self) -> bool:
        """Whether one new connection's first packet gets through now."""
        with netns.socket(self.fds[0], socket.AF_INET, socket.SOCK_DGRAM) as one:
            token = os.urandom(8)
            one.sendto(token, (SERVER, 53))
            try:
                while self.server.recv(64) != token:
                    pass
            except TimeoutError:
                return False
            return True

    def wait(self, passes: bool, began: float, timeout_s: float = 60) -> float:
        """Milliseconds from `began` to the sending of the first packet that fares so."""
        while True:
            sent = time.perf_counter()
            if self.passes() is passes:
                return (sent - began) * 1000
            if sent - began > timeout_s:
                raise TimeoutError(f"packets do not {'pass' if passes else 'stop'}")


def run(fd: int, script: str, *inherited: int) -> None:
    with netns.entered(fd):
        subprocess.run(["sh", "-ec", script], check=True, pass_fds=inherited, timeout=30)


async def changes(world: Cluster, pods: Pods) -> dict[str, list[float]]:
    """Milliseconds of each kind of change, write to first packet judged by it."""
    out: dict[str, list[float]] = {"created": [], "deleted": [], "label": []}

    async def timed(kind: str, passes: bool, write: Callable[[], Any]) -> None:
        began = time.perf_counter()
        watching = asyncio.to_thread(pods.wait, passes, began)
        task = asyncio.create_task(watching)
        await write()
        out[kind].append(await task)

    async with Client(kubeconfig.load(str(world.kubeconfig))) as client:
        await client.get(Pod, "p0", "own")  # the connection and its TLS are the writer's
        for _ in range(CHANGES):
            await timed("created", False, lambda: client.create(NetworkPolicy, deny("d"), "own"))
            await timed("deleted", True, lambda: client.delete(NetworkPolicy, "d", "own"))
        await client.create(NetworkPolicy, deny("l", "app0"), "own")
        for _ in range(CHANGES):
            for app, passes in (("other", False), ("app0", True)):
                patch = {"metadata": {"labels": {"app": app}}}
                await timed("label", passes, lambda patch=patch: client.patch(
                    Pod, "p0", patch, "own"))  # fmt: skip
        await client.delete(NetworkPolicy, "l", "own")
    return out


def connections(pods: Pods, program: Program) -> list[float]:
    """Microseconds of connect, one byte each way, close, between the two pods."""
    client, server = pods.fds
    cpu = min(os.sched_getaffinity(0))
    with program.serving(SERVER, lambda: netns.enter(server)):
        way = Way("pod → pod", program, lambda: netns.enter(client), SERVER)
        return [ns / 1000 for ns in way.ask("ask", CONNECTIONS, cpu=cpu)]


def measure(size: int, datapath: str, report: Report, program: Program) -> list[float]:
    """All rows of one size; the samples of a connection."""
    with Cluster() as world:
        world.load(objects, size)
        pods = Pods(world.netns_fd)
        try:
            agent = world.agent("--only=policy", f"--datapath={datapath}")
            world.wait_healthy()
            found = asyncio.run(changes(world, pods))
            packet = allowed(world, pods, program)
            world.stop(agent)
            world.cleanup()
            assert pods.passes()
            began = time.perf_counter()
            world.agent("--only=policy", f"--datapath={datapath}", "--state-dir",
                        str(world.folder / "fresh"))  # fmt: skip
            cold = pods.wait(False, began) / 1000
        finally:
            pods.close()
    label = f"{size:,} pods and policies"
    goals = {"at_most": 20.0} if size == 10000 else {}
    for kind, words in (("created", "policy written → enforced"),
                        ("deleted", "policy deleted → open"),
                        ("label", "label of a pod changed → judged by it")):  # fmt: skip
        samples = sorted(found[kind])
        report.row(f"{label}: {words}", samples, "ms", **goals)
        p99 = samples[min(len(samples) - 1, int(len(samples) * 0.99))]
        report.row(f"{label}: {words}, p99", [p99], "ms",
                   **({"at_most": 100.0} if size == 10000 else {}))  # fmt: skip
    report.row(f"{label}: cold start → enforced", [cold], "s",
               **({"at_most": 3.0} if size == 10000 else {}))  # fmt: skip
    return packet


def allowed(world: Cluster, pods: Pods, program: Program) -> list[float]:
    """Microseconds of connections that a policy allows; afterwards nothing allows them."""

    async def write() -> None:
        async with Client(kubeconfig.load(str(world.kubeconfig))) as client:
            await client.create(NetworkPolicy, deny("isolate"), "own")
            await asyncio.to_thread(pods.wait, False, time.perf_counter())
            await client.create(NetworkPolicy, deny("let-in", "app0"), "own")
            await asyncio.to_thread(pods.wait, True, time.perf_counter())
            samples.extend(await asyncio.to_thread(connections, pods, program))
            await client.delete(NetworkPolicy, "let-in", "own")

    samples: list[float] = []
    asyncio.run(write())
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datapath", default="nftables")
    parser.add_argument("--sizes", default="100,1000,10000")
    args = parser.parse_args()
    name = "policy" if args.datapath == "nftables" else f"policy-{args.datapath}"
    report = Report(name, f"Policies through the API, {args.datapath}")
    with compiled(server_cpu=max(os.sched_getaffinity(0))) as program:
        few = measure(OWN_PODS, args.datapath, report, program)
        report.row("a connection at 100 policies", few, "µs")
        for size in map(int, args.sizes.split(",")):
            if size == OWN_PODS:
                continue
            many = measure(size, args.datapath, report, program)
            report.row(f"a connection at {size:,} policies beside {OWN_PODS}", many, "µs",
                       peer=few, ratio_at_most=1.15)  # fmt: skip
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
