"""How long a lab takes: `python -m bench.lab`.

The time of `podwire lab up -f …` is a whole command's, from the start of the interpreter until it
returns; then nodes and pods must reach pods and Services at the first try. Memory is what
the machine has less of afterwards (processes, namespaces, links, sockets, rules).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.report import Report
from podwire.kernel import netns
from podwire.lab import cgroups, connect, teardown
from podwire.lab.cluster import Lab
from podwire.lab.state import LabDir

NAME = f"bench-{os.getpid()}"
MOST_PAIRS = 400

DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web{number}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: web{number}}}}}
  template:
    metadata: {{labels: {{app: web{number}}}}}
    spec:
      containers:
      - {{name: web, image: shop/web, ports: [{{containerPort: 80}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: web{number}}}
spec: {{selector: {{app: web{number}}}, ports: [{{port: 80}}]}}
"""


def manifest(deployments: int, replicas: int) -> str:
    """That many Deployments with a Service each."""
    return "---".join(
        DEPLOYMENT.format(number=number, replicas=replicas) for number in range(deployments)
    )


def podwire(*words: str, stdin: str = "") -> float:
    """Seconds of one command, which must succeed."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "podwire", "lab", *words, "--name", NAME],
        input=stdin,
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    return time.monotonic() - began


def check_reach(lab: Lab) -> None:
    """Every node to every pod, and pods to pods and Services (a sample of the pairs). Raises.

    A sample, because pods of one node find each other by ARP, and the kernel holds 1,024 entries of
    that kind for all namespaces together (gc_thresh3).
    """
    pods = lab.items("/api/v1/namespaces/default/pods")
    services = lab.items("/api/v1/namespaces/default/services")
    targets = [(p["status"]["podIP"], 80) for p in pods]
    nodes = [(f"node-{name}", target) for name in lab.record.nodes for target in targets]
    targets += [(s["spec"]["clusterIP"], 80) for s in services if s["spec"].get("selector")]
    places = [f"pod-{p['metadata']['uid']}" for p in pods]
    pairs = [(place, target) for place in places for target in targets]
    random.Random(0).shuffle(pairs)
    with contextlib.ExitStack() as stack:
        fds: dict[str, int] = {}
        asks: list[connect.Ask] = []
        for place, target in [*nodes, *pairs[:MOST_PAIRS]]:
            if place not in fds:
                fds[place] = netns.open_path(lab.dir.netns(place))
                stack.callback(os.close, fds[place])
            asks.append(connect.Ask(fds[place], *target, timeout_s=5))
        outcomes = connect.outcomes(connect.ask_all(asks))
    if set(outcomes) != {"ok"}:
        raise SystemExit(f"not all pairs reach each other: {outcomes}")


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    try:
        yield
    finally:
        teardown.down(LabDir(NAME))


def available_mb() -> float:
    """What the machine could still give to programs (proc(5), MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1000
    raise SystemExit("no MemAvailable in /proc/meminfo")


def processes_mb() -> float:
    """Memory of the lab's processes; what they share counts once (proportional set size)."""
    total = 0
    for pid in cgroups.processes(cgroups.of_lab(NAME)):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += next(int(x.split()[1]) for x in text.splitlines() if x.startswith("Pss:"))
    return total / 1000


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.lab", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of the small lab")
    parser.add_argument("--pods", type=int, default=1000, help="of the large lab")
    args = parser.parse_args()
    report = Report("lab", "A lab of two nodes, up and down")
    ups: list[float] = []
    downs: list[float] = []
    with nothing_left():
        for _ in range(args.rounds):
            ups.append(podwire("up", "-f", "-", stdin=manifest(3, 10)))
            check_reach(Lab(NAME))
            downs.append(podwire("down"))
        report.row("30 pods up, ready and reachable", ups, "s", at_most=2)
        report.row("30 pods down", downs, "s", at_most=2)
        before = available_mb()
        up = podwire("up", "--timeout", "60", "-f", "-", stdin=manifest(10, args.pods // 10))
        used, processes = before - available_mb(), processes_mb()
        check_reach(Lab(NAME))
        down = podwire("down")
    report.row(f"{args.pods:,} pods up, ready and reachable", [up], "s", at_most=15)
    report.row(f"{args.pods:,} pods, memory in all", [used], "MB", at_most=600)
    report.row(f"{args.pods:,} pods, memory of the processes", [processes], "MB")
    report.row(f"{args.pods:,} pods down", [down], "s", at_most=2)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
