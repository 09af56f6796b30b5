"""The command line: one subcommand per file in this folder, found by name when it is asked for.

A subcommand's module has `configure(parser)` and `run(args) -> int`. Modules are imported only when
they are used, so that `podwire --help` stays fast.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Generator
from contextlib import contextmanager

from podwire import __version__
from podwire.errors import PodwireError

COMMANDS: dict[str, str] = {
    "agent": "the node's daemon",
    "lab": "a cluster in network namespaces on this machine",
    "status": "what runs, what is programmed, what was set aside and why",
    "services": "Services as the data path sees them",
    "policy": "network policies: whom they select, what they decide and why",
    "conntrack": "the connection table by pod and Service",
    "vpc": "ENIs, pods and settings of VPC mode",
    "bpf": "eBPF programs, maps and links",
    "install": "put the CNI plugin and its configuration in place",
    "uninstall": "take the CNI plugin and its configuration away again",
}


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand and exit with its status: 0 done, 1 failed, 2 bad usage."""
    arguments = sys.argv[1:] if argv is None else argv
    with _collector_paused():
        args = _parse(arguments)
    try:
        sys.exit(args.run(args))
    except BrokenPipeError:
        sys.exit(1)
    except (PodwireError, OSError) as error:  # OSError: a file that is not there or not ours
        print(f"podwire: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _collector_paused() -> Generator[None]:
    """Modules stay: going through them again and again is a fifth of the time to import them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The words of one subcommand, and `run`, which does what they say."""
    parser = argparse.ArgumentParser(prog="podwire", description="Kubernetes networking")
    parser.add_argument("--version", action="version", version=f"podwire {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == wanted:
            module = importlib.import_module(f"podwire.cli.{name}")
            module.configure(subparser)
            subparser.set_defaults(run=module.run)
    return parser.parse_args(arguments)
