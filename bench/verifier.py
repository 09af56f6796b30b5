"""How much work each eBPF program is for the verifier (its limit: a million instructions)."""

from __future__ import annotations

import sys
import time

from bench.report import Report
from podwire.datapath.ebpf.programs import OBJECTS
from podwire.kernel.bpf import ObjectSpec


def main() -> int:
    report = Report("verifier", "eBPF programs: instructions verified, time to load")
    for path in sorted(OBJECTS.glob("*.bpf.o")):
        start = time.monotonic()
        with ObjectSpec(path).load() as loaded:
            took = time.monotonic() - start
            for name, program in sorted(loaded.programs.items()):
                count = program.info.verified_instructions
                report.row(f"{path.stem}: {name}", [count], "instructions", at_most=1_000_000)
        report.row(f"{path.stem}: load", [took * 1000], "ms")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
