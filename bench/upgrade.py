"""Fifty agents killed and ten program replacements under traffic: no connection breaks.

Six connections talk all the time (pod, node and outside client; IPv4 and IPv6; through a Service,
masqueraded, and straight). A broken one ends the run with its error.
"""

from __future__ import annotations

import sys
import time

from bench.report import Report
from tests.kernel.ebpf_world import POD, World
from tests.kernel.test_ebpf_upgrade import survive

RESTARTS, REPLACEMENTS = 50, 10


def main() -> int:
    report = Report("upgrade", f"eBPF: {RESTARTS} agents killed, {REPLACEMENTS} replacements")
    with World() as world:
        for family in (4, 6):
            world.echo("pod1", POD[1][family], 80)
        start = time.monotonic()
        turns = survive(world, RESTARTS, REPLACEMENTS)
    report.row("connections broken", [0], "", at_most=0)
    report.row("messages of each connection", [float(n) for n in turns], "", at_least=100)
    report.row("time of it all", [time.monotonic() - start], "s")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
