"""Where `bench.path` measures: a bare pair, a bridge, and labs, each with its servers running."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeAlias

from podwire.agent.options import Options
from podwire.errors import PodwireError
from podwire.kernel import netns
from podwire.lab import cgroups, manifests, teardown
from podwire.lab.cluster import Lab
from podwire.lab.manifests import Manifest
from podwire.lab.state import LabDir

PORT = 5001
BATCH = 2000  # objects of one request to the API
PLACES = {"client": "node1", "near": "node1", "closed-client": "node1", "closed": "node1",
          "far": "node2"}  # fmt: skip
WAYS = {  # who asks whom, and whether by a Service
    "pod → pod": ("client", "near", False),
    "pod → Service": ("client", "near", True),
    "judged": ("closed-client", "closed", False),
    "pod → node": ("client", "far", False),
}

POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, ports: []}}]}}
---
"""
POLICY = f"""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: closed}}
spec:
  podSelector: {{matchExpressions: [{{key: app, operator: In, values: [closed, closed-client]}}]}}
  policyTypes: [Ingress, Egress]
  ingress: [{{from: [{{podSelector: {{}}}}], ports: [{{port: {PORT}}}]}}]
  egress: [{{to: [{{podSelector: {{}}}}], ports: [{{port: {PORT}}}]}}]
"""


_numbers = count(1)


class Absent(Exception):
    """This machine, or podwire, does not do what the row `label` is about."""

    def __init__(self, label: str, why: str) -> None:
        super().__init__(why)
        self.label = label


@dataclass
class Program:
    """The compiled `crr.c`, and the CPU its servers run on."""

    path: Path
    server_cpu: int

    @contextlib.contextmanager
    def serving(self, address: str, enter: Callable[[], None]) -> Iterator[None]:
        """A server in the background; here once it listens."""

        def prepare() -> None:
            enter()
            os.sched_setaffinity(0, {self.server_cpu})

        command = [self.path, "serve", address, str(PORT)]
        server = subprocess.Popen(command, preexec_fn=prepare, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            if server.stdout.readline() != "ready\n":
                raise SystemExit(f"nothing serves at {address}")
            yield
        finally:
            server.kill()
            server.wait(10)


@dataclass
class Way:
    """One row: where the client runs, and whom it asks."""

    label: str
    program: Program
    enter: Callable[[], None]
    address: str
    port: int = PORT

    def ask(self, verb: str, amount: float, *, cpu: int) -> list[float]:
        """What the client prints. It runs on that CPU."""

        def prepare() -> None:
            self.enter()
            os.sched_setaffinity(0, {cpu})

        command = [str(self.program.path), verb, self.address, str(self.port), str(amount)]
        done = subprocess.run(
            command, preexec_fn=prepare, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise SystemExit(f"{self.label}: {verb}: {done.stderr.strip()}")
        return [float(line) for line in done.stdout.split()]


World: TypeAlias = Callable[[Program], contextlib.AbstractContextManager[list[Way]]]


@contextlib.contextmanager
def compiled(server_cpu: int) -> Iterator[Program]:
    """The client and server program."""
    with tempfile.TemporaryDirectory(prefix="podwire-bench-") as folder:
        path = Path(folder) / "crr"
        source = Path(__file__).with_name("crr.c")
        subprocess.run(["gcc", "-O2", "-o", path, source], check=True, timeout=60)
        yield Program(path, server_cpu)


def bare_pair() -> World:
    """Two namespaces, one veth pair, nothing else."""

    @contextlib.contextmanager
    def world(program: Program) -> Iterator[list[Way]]:
        with _spaces(2) as (near, far):
            _ip(near, f"link add eth0 type veth peer name eth0 netns {_path(far)}")
            yield from _two_ends("bare veth pair", program, near, far)

    return world


def bridge() -> World:
    """Two namespaces on a bridge in a third, without rules of any kind."""

    @contextlib.contextmanager
    def world(program: Program) -> Iterator[list[Way]]:
        with _spaces(3) as (near, far, middle):
            _ip(middle, "link add br0 type bridge", "link set br0 up")
            for number, end in enumerate((near, far)):
                _ip(
                    middle,
                    f"link add p{number} type veth peer name eth0 netns {_path(end)}",
                    f"link set p{number} master br0 up",
                )
            yield from _two_ends("bridge", program, near, far)

    return world


def _two_ends(label: str, program: Program, near: int, far: int) -> Iterator[list[Way]]:
    for fd, last in ((near, 1), (far, 2)):
        _ip(fd, f"addr add 10.99.0.{last}/24 dev eth0", "link set eth0 up")
    # as pods have one: sockets of a cgroup take 2 % longer for an exchange than those of none
    group = cgroups.of_lab(f"path-{os.getpid()}-{next(_numbers)}")

    def enter(fd: int) -> None:
        cgroups.join(group)
        netns.enter(fd)

    try:
        with program.serving("10.99.0.2", lambda: enter(far)):
            yield [Way(label, program, lambda: enter(near), "10.99.0.2")]
    finally:
        cgroups.remove(group, time.monotonic() + 5)


@contextlib.contextmanager
def _spaces(number: int) -> Iterator[list[int]]:
    spaces = [netns.create() for _ in range(number)]
    try:
        yield spaces
    finally:
        for fd in spaces:
            os.close(fd)


def _path(fd: int) -> str:
    return f"/proc/{os.getpid()}/fd/{fd}"


def _ip(fd: int, *lines: str) -> None:
    done = netns.run(fd, ["ip", "-batch", "-"], stdin="\n".join(lines), timeout_s=20)
    done.check_returncode()


def lab(
    labels: Mapping[str, str],
    *,
    datapath: str,
    wiring: str,
    routing: str = "direct",
    nodes: int = 2,
    services: int = 0,
) -> World:
    """A lab as a user runs it; `labels` are the rows it gives, by their names in `WAYS`."""

    @contextlib.contextmanager
    def world(program: Program) -> Iterator[list[Way]]:
        name = f"path-{os.getpid()}-{next(_numbers)}"
        shape = {"datapath": datapath, "wiring": wiring, "routing": routing}
        try:
            try:
                Options(node_name="any", **shape).checked()
                up = Lab.up(name, nodes=nodes, **shape)
                up.wait()
            except PodwireError as error:
                raise Absent(", ".join(labels.values()), str(error).splitlines()[-1]) from None
            _fill(up, [key for key, node in PLACES.items() if node in up.record.nodes], services)
            yield from _lab_ways(up, program, labels)
        finally:
            teardown.down(LabDir(name))

    return world


def _fill(lab: Lab, names: list[str], services: int) -> None:
    pods = "".join(POD.format(name=name, node=PLACES[name]) for name in names)
    lab.apply(manifests.parse(pods + POLICY, "bench"))
    lab.wait()
    address = lab.pod("near")["status"]["podIP"]
    objects = [*_service("near", address, PORT)]
    for number in range(services):
        objects += _service(f"s{number}", "10.128.0.1", 8080)
    for start in range(0, len(objects), BATCH):
        batch = objects[start : start + BATCH]
        lab.apply([Manifest(obj, "bench", number) for number, obj in enumerate(batch)])
    lab.wait(120)


def _service(name: str, address: str, port: int) -> Iterator[dict[str, object]]:
    """Without a selector, its endpoint given by hand: else the echo server would listen."""
    metadata = {"name": name, "namespace": "default"}
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"ports": [{"port": 80}]},
    }
    yield {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"port": port}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
    }


def _lab_ways(lab: Lab, program: Program, labels: Mapping[str, str]) -> Iterator[list[Way]]:
    ways: list[Way] = []
    with contextlib.ExitStack() as stack:
        for server in dict.fromkeys(WAYS[key][1] for key in labels):
            pod = lab.pod(server)["status"]["podIP"]
            stack.enter_context(program.serving(pod, lab.place(server).enter))
        for key, label in labels.items():
            client, server, by_service = WAYS[key]
            address, port = lab.pod(server)["status"]["podIP"], PORT
            if by_service:
                service = lab.api("GET", f"/api/v1/namespaces/default/services/{server}")
                address, port = service["spec"]["clusterIP"], 80
            ways.append(Way(label, program, lab.place(client).enter, address, port))
        yield ways
