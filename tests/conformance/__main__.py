"""`python -m tests.conformance --suite S [--datapath D] [--routing R] [--cases DIR]`.

One line per case, then exactly ``N passed, N failed`` (and ``, N skipped`` if there are any).
Exit status: 0 when none failed, 1 otherwise, 2 for bad usage.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from tests.conformance import SHARED_CASES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    parser.add_argument("--suite", required=True, help="cni, service-proxy, netpol …")
    parser.add_argument("--datapath", default="nftables")
    parser.add_argument("--routing", default="direct", choices=["direct", "vxlan"])
    parser.add_argument("--cases", type=Path, help="a folder of cases (default: the shared one)")
    arguments = parser.parse_args()
    name = arguments.suite.replace("-", "_")
    try:
        suite = importlib.import_module(f"tests.conformance.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"tests.conformance.{name}":
            raise
        parser.error(f"no suite {arguments.suite!r}")
    cases = arguments.cases or SHARED_CASES / arguments.suite
    if not cases.is_dir():
        if arguments.cases:
            parser.error(f"no folder {cases}")
        print(f"suite {arguments.suite} skipped: its cases are not at {cases}")
        print("0 passed, 0 failed")
        return 0

    run = suite.run
    if arguments.routing != "direct":
        if arguments.suite != "netpol":
            parser.error("only the cases of netpol have a way between nodes to choose")
        run = partial(run, routing=arguments.routing)
    counts: Counter[str] = Counter()
    for result in run(cases, arguments.datapath):
        counts[result.outcome] += 1
        detail = "\n".join(f"    {line}" for line in result.detail.splitlines())
        print(f"{result.outcome:7} {result.case}" + (f"\n{detail}" if detail else ""), flush=True)
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"{counts['passed']} passed, {counts['failed']} failed{skipped}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
