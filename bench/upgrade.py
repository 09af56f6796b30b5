"""Fifty agents killed and ten program replacements under traffic: no connection breaks.

First with Services alone: six connections talk all the time (pod, node and outside client; IPv4 and
IPv6; through a Service, masqueraded, and straight). Then with policies, Services and pods that
change all the time (`tests.kernel.policy_storm`): each datagram is a flow of its own, those that
every state allows must be answered and those that none allows must not arrive. What goes wrong ends
the run.
"""

from __future__ import annotations

import sys
import time

from bench.report import Report
from tests.kernel.ebpf_world import POD, World
from tests.kernel.policy_storm import APPS, Storm
from tests.kernel.test_ebpf_upgrade import survive

RESTARTS, REPLACEMENTS = 50, 10


def services(report: Report) -> None:
    with World() as world:
        for family in (4, 6):
            world.echo("pod1", POD[1][family], 80)
        start = time.monotonic()
        turns = survive(world, RESTARTS, REPLACEMENTS)
    report.row("connections broken", [0], "", at_most=0)
    report.row("messages of each connection", [float(n) for n in turns], "", at_least=100)
    report.row("time of it all", [time.monotonic() - start], "s")


def policies(report: Report) -> None:
    with World(pods=len(APPS)) as world:
        storm = Storm(world)
        start = time.monotonic()
        storm.run(RESTARTS, REPLACEMENTS)
    turns = [float(talk.turns) for talk in storm.talks]
    report.row("with policies: changes of the rules", [float(storm.changes)], "", at_least=100)
    report.row("with policies: connections broken", [0], "", at_most=0)
    report.row("with policies: messages of each connection", turns, "", at_least=100)
    for label, probes, wrong in (
        ("allowed", storm.allowed, "refused"),
        ("denied", storm.denied, "let through"),
    ):
        sent = float(sum(probe.sent for probe in probes))
        report.row(f"with policies: {label} first packets", [sent], "", at_least=1000)
        report.row(f"with policies: {label} first packets {wrong}", [0], "", at_most=0)
    report.row("with policies: time of it all", [time.monotonic() - start], "s")


def main() -> int:
    report = Report("upgrade", f"eBPF: {RESTARTS} agents killed, {REPLACEMENTS} replacements")
    services(report)
    policies(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
