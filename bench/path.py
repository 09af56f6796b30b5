"""The way of a packet, timed: `make bench BENCH=path [ARGS="--services 30000 --rounds 20"]`.

A bare veth pair, which is the least that two namespaces can cost, a bridge, and pods of real labs
with all parts on: nftables and eBPF, straight and through Services, on one node and across two.
Programs in C (`crr.c`) inside the pods; times are whole round trips.

Client and server share a CPU, but for throughput, where each has one. Left to the scheduler they
part now and then for seconds, and what is timed then is how long an idle CPU takes to wake: 35 µs
here, ten times what the path costs. All paths take turns, in an order that shifts from round to
round; a ratio is the median over the rounds, between its quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from dataclasses import dataclass, field
from statistics import median

from bench.path_worlds import Absent, Way, World, bare_pair, bridge, compiled, lab
from bench.report import Report

CONNECTIONS, EXCHANGES, POUR_S = 300, 1000, 0.4


@dataclass
class Row:
    """Samples of one way, round by round: µs, µs and Gbit/s."""

    way: Way
    connect: list[list[float]] = field(default_factory=list[list[float]])
    exchange: list[list[float]] = field(default_factory=list[list[float]])
    pour: list[list[float]] = field(default_factory=list[list[float]])

    def measure(self, cpus: tuple[int, int]) -> None:
        """One round, the server being on the second CPU."""
        near, same = cpus
        connect = self.way.ask("ask", CONNECTIONS, cpu=same)
        self.connect.append([ns / 1000 for ns in connect])
        exchange = self.way.ask("talk", EXCHANGES, cpu=same)
        self.exchange.append([ns / 1000 for ns in exchange])
        self.pour.append([rate * 8 / 1e9 for rate in self.way.ask("pour", POUR_S, cpu=near)])


EBPF = "ebpf: pod → pod"
EBPF_SERVICE = "ebpf: pod → Service"
GOALS = {  # of "connect, request, close": the peer, and how many times as long it may take
    EBPF: ("bare veth pair", 1.05),
    EBPF_SERVICE: (EBPF, 1.08),
}
THROUGHPUT_GOAL = 0.95
KINDS = {
    "connect": ("connect, request, close", "µs"),
    "exchange": ("request, response", "µs"),
    "pour": ("throughput", "Gbit/s"),
}


def worlds(services: int) -> list[World]:
    """What is compared, in the order of the rows."""
    many = f"ebpf: pod → Service, {services:,} Services"
    GOALS[many] = (EBPF, 1.08)
    return [
        bare_pair(),
        bridge(),
        lab(
            {"pod → pod": "nftables: pod → pod", "pod → Service": "nftables: pod → Service",
             "pod → node": "nftables: across nodes"},
            datapath="nftables", wiring="bridge",
        ),
        lab(
            {"pod → pod": EBPF, "pod → Service": EBPF_SERVICE,
             "judged": "ebpf: pod → pod, a NetworkPolicy selects both",
             "pod → node": "ebpf: across nodes, direct"},
            datapath="ebpf", wiring="routed",
        ),
        lab({"pod → Service": many}, datapath="ebpf", wiring="routed", nodes=1, services=services),
        lab({"pod → node": "ebpf: across nodes, VXLAN"},
            datapath="ebpf", wiring="routed", routing="vxlan"),
    ]  # fmt: skip


def tell(report: Report, rows: list[Row]) -> None:
    """One line for each row and kind, beside the bare pair or the peer of its goal."""
    named = {row.way.label: row for row in rows}
    for kind, (words, unit) in KINDS.items():
        for label, row in named.items():
            peer, limit = GOALS.get(label, (rows[0].way.label, None))
            if kind != "connect":
                peer, limit = rows[0].way.label, None
            found = named.get(peer) if row is not rows[0] else None
            goals = {"ratio_at_most": limit} if limit else {}
            if kind == "pour" and label in GOALS:
                goals = {"ratio_at_least": THROUGHPUT_GOAL}
            report.row(
                f"{words}: {label}",
                _all(getattr(row, kind)),
                unit,
                peer=_all(getattr(found, kind)) if found else None,
                ratios=_ratios(getattr(row, kind), getattr(found, kind)) if found else None,
                **goals,
            )


def _all(rounds: list[list[float]]) -> list[float]:
    return [sample for samples in rounds for sample in samples]


def _ratios(ours: list[list[float]], theirs: list[list[float]]) -> list[float]:
    """Round by round: what else the machine did fell on both."""
    return [median(a) / median(b) for a, b in zip(ours, theirs, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.path", description=__doc__)
    parser.add_argument("--services", type=int, default=30_000, help="in the row of many")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    report = Report("path", "Pod to pod and through Services: round trips and throughput")
    usable = sorted(os.sched_getaffinity(0))
    cpus = usable[0], usable[-1]
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(compiled(server_cpu=cpus[1]))
        for world in worlds(args.services):
            try:
                rows += [Row(way) for way in stack.enter_context(world(program))]
            except Absent as absent:
                report.absent(absent.label, str(absent))
        for row in rows:
            row.measure(cpus)  # caches are filled, neighbours known
            row.connect.clear()
            row.exchange.clear()
            row.pour.clear()
        for number in range(args.rounds):
            for row in (*rows[number % len(rows) :], *rows[: number % len(rows)]):
                row.measure(cpus)
    tell(report, rows)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
