"""The way of a packet, timed: `python -m bench.path [--datapath nftables --datapath ebpf …]`.

One client pod and two servers, on its own node and on the other; straight, and through Services.
Beside them, in the same run and in turn, a bare veth pair: the least that two namespaces can cost.
Programs in C (`crr.c`) inside the pods; times are whole round trips.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.report import Report
from podwire.kernel import address, link, netns
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket
from podwire.lab import manifests, teardown
from podwire.lab.cluster import Lab
from podwire.lab.state import LabDir
from podwire.net import parse_address

PORT = 5001
CONNECTIONS, EXCHANGES, POUR_S = 1500, 6000, 0.4

POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, ports: []}}]}}
---
"""
# Without a selector, its endpoint given by hand: else the echo server would listen on the port.
SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{ports: [{{port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{port: {port}}}]
endpoints: [{{addresses: ["{address}"], nodeName: {node}, conditions: {{ready: true}}}}]
---
"""


@dataclass
class Way:
    """One row: where the client runs, and whom it asks. Samples in µs, and GB/s."""

    label: str
    run: Callable[..., subprocess.CompletedProcess[str]]
    address: str
    port: int
    connect: list[float] = field(default_factory=list[float])
    exchange: list[float] = field(default_factory=list[float])
    pour: list[float] = field(default_factory=list[float])

    def measure(self, program: Path) -> None:
        """One round of each kind."""
        target = [self.address, str(self.port)]
        for verb, count, samples in (
            ("ask", CONNECTIONS, self.connect),
            ("talk", EXCHANGES, self.exchange),
        ):
            lines = self._output([str(program), verb, *target, str(count)])
            samples += [float(line) / 1000 for line in lines]
        lines = self._output([str(program), "pour", *target, str(POUR_S)])
        self.pour.append(float(lines[0]) / 1e9)

    def _output(self, command: list[str]) -> list[str]:
        done = self.run(command)
        if done.returncode:
            raise SystemExit(f"{self.label}: {' '.join(command[1:])}: {done.stderr.strip()}")
        return done.stdout.split()


@contextlib.contextmanager
def compiled() -> Iterator[Path]:
    """The client and server program."""
    with tempfile.TemporaryDirectory(prefix="podwire-bench-") as folder:
        program = Path(folder) / "crr"
        source = Path(__file__).with_name("crr.c")
        subprocess.run(["gcc", "-O2", "-o", program, source], check=True, timeout=60)
        yield program


@contextlib.contextmanager
def serving(command: list[str], enter: Callable[[], None]) -> Iterator[None]:
    """A server in the background; here once it listens."""
    server = subprocess.Popen(command, preexec_fn=enter, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        if server.stdout.readline() != "ready\n":
            raise SystemExit(f"{' '.join(command)} does not serve")
        yield
    finally:
        server.kill()
        server.wait(10)


@contextlib.contextmanager
def bare_pair(program: Path) -> Iterator[Way]:
    """Two namespaces, one veth pair, nothing else."""
    near, far = netns.create(), netns.create()
    try:
        for fd, peer, last in ((near, far, 1), (far, near, 2)):
            with NetlinkSocket(netns_fd=fd) as sock:
                if fd == near:
                    sock.run(link.add_veth(End("eth0"), End("eth0", peer)))
                found = link.find(sock, "eth0")
                assert found is not None
                own = InterfaceAddress(found.index, parse_address(f"10.99.0.{last}"), 24)
                sock.run(address.add(own), link.change("eth0", up=True))

        def run(command: list[str]) -> subprocess.CompletedProcess[str]:
            return netns.run(near, command, timeout_s=60)

        command = [str(program), "serve", "10.99.0.2", str(PORT)]
        with serving(command, lambda: netns.enter(far)):
            yield Way("bare veth pair", run, "10.99.0.2", PORT)
    finally:
        os.close(near)
        os.close(far)


@contextlib.contextmanager
def lab_ways(program: Path, datapath: str, wiring: str) -> Iterator[list[Way]]:
    """A lab with that data path, its servers running."""
    name = f"bench-{os.getpid()}-{datapath}"
    try:
        lab = Lab.up(name, datapath=datapath, wiring=wiring)
        lab.wait()
        places = {"client": "node1", "near": "node1", "far": "node2"}
        pods = "".join(POD.format(name=name, node=node) for name, node in places.items())
        lab.apply(manifests.parse(pods, "bench"))
        lab.wait()
        services = "".join(
            SERVICE.format(
                name=name, node=places[name], port=PORT, address=lab.pod(name)["status"]["podIP"]
            )
            for name in ("near", "far")
        )
        lab.apply(manifests.parse(services, "bench"))
        lab.wait()
        ways: list[Way] = []
        place = lab.place("client")

        def run(command: list[str]) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                command, preexec_fn=place.enter, capture_output=True, text=True, timeout=60
            )

        with contextlib.ExitStack() as stack:
            for server, where in (("near", "same node"), ("far", "across nodes")):
                pod = lab.pod(server)["status"]["podIP"]
                service = lab.api("GET", f"/api/v1/namespaces/default/services/{server}")
                command = [str(program), "serve", pod, str(PORT)]
                stack.enter_context(serving(command, lab.place(server).enter))
                ways.append(Way(f"{datapath}: {where}", run, pod, PORT))
                cluster_ip = service["spec"]["clusterIP"]
                ways.append(Way(f"{datapath}: {where}, Service", run, cluster_ip, 80))
            yield ways
    finally:
        teardown.down(LabDir(name))


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.path", description=__doc__)
    parser.add_argument("--datapath", action="append", help="one or more (default: nftables)")
    parser.add_argument("--wiring", default="bridge")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    report = Report("path", "Round trips and throughput, pod to pod and through Services")
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(compiled())
        bare = stack.enter_context(bare_pair(program))
        ways: list[Way] = []
        for datapath in args.datapath or ["nftables"]:
            ways += stack.enter_context(lab_ways(program, datapath, args.wiring))
        for _ in range(args.rounds):
            for way in (bare, *ways):
                way.measure(program)
        for title, unit in (("connect", "µs"), ("exchange", "µs"), ("pour", "GB/s")):
            words = {"connect": "connect, request, close", "exchange": "request, response"}
            for way in (bare, *ways):
                label = f"{words.get(title, 'throughput')}: {way.label}"
                peer = None if way is bare else getattr(bare, title)
                report.row(label, getattr(way, title), unit, peer=peer)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
