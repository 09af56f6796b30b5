"""Which agent a command asks: the node's own, one of a lab's, or all of a lab's."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from podwire.agent.control import follow
from podwire.errors import ApiError, ConfigError

RUN_DIR = Path("/run/podwire")

_DESTINATION = re.compile(
    r"^(?P<host>\[[0-9a-fA-F:.]+\]|[^\[\]]+?)(:(?P<port>\d+))?(/(?P<protocol>tcp|udp|sctp|icmp|icmpv6))?$",
    re.IGNORECASE,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--run-dir`, `--lab`, `--node` and `--json`."""
    parser.add_argument("--run-dir", type=Path, help=f"of the agent (default {RUN_DIR})")
    parser.add_argument("--lab", metavar="NAME", help="an agent of this lab ($PODWIRE_LAB)")
    parser.add_argument("--node", metavar="NAME", help="one of the lab's nodes")
    parser.add_argument("--json", action="store_true", help="the answer as JSON")


def run_dirs(args: argparse.Namespace) -> list[Path]:
    """The run directories asked for. Without options: those of the lab that $PODWIRE_LAB names,
    else the node's agent, else the only lab's.

    Raises ApiError when there is none.
    """
    if args.run_dir:
        return [args.run_dir]
    lab = args.lab or os.environ.get("PODWIRE_LAB") or _only_lab()
    if lab is None:
        return [RUN_DIR]
    found = sorted((RUN_DIR / "lab" / lab / "nodes").glob(f"{args.node or '*'}/run"))
    if not found:
        what = f"no node {args.node!r} in lab {lab!r}" if args.node else f"no lab {lab!r}"
        raise ApiError(f"{what} runs here (podwire lab ls)")
    return found


def socket(args: argparse.Namespace) -> Path:
    """The control socket of the (first) agent asked for."""
    return run_dirs(args)[0] / "agent.sock"


def socket_on(args: argparse.Namespace, node: str) -> Path | None:
    """The control socket of the agent on `node`, if it runs in the lab asked for."""
    found = (each / "agent.sock" for each in run_dirs(args) if each.parent.name == node)
    return next(found, None)


def print_stream(
    args: argparse.Namespace, path: str, spell: Callable[[dict[str, Any]], str]
) -> None:
    """Print what all agents asked for tell at `path`, a line each (`--json`: JSON) as it comes.

    With `--follow` until it is interrupted. Raises ApiError when no agent answers.
    """

    async def one(run_dir: Path) -> None:
        query = {"follow": "1"} if args.follow else {}
        async for document in follow(run_dir / "agent.sock", path, query):
            print(json.dumps(document) if args.json else spell(document), flush=True)

    async def every() -> None:
        await asyncio.gather(*map(one, run_dirs(args)))

    asyncio.run(every())


class Destination(NamedTuple):
    """What a connection is to: a pod, a Service or an address; `port` 0 for ICMP."""

    host: str
    port: int
    protocol: str


def parse_destination(text: str) -> Destination:
    """``DST:PORT[/PROTO]``, with IPv6 addresses in brackets. Raises ConfigError."""
    found = _DESTINATION.match(text)
    if found is None:
        raise ConfigError(f"not DST:PORT[/PROTO]: {text!r}")
    protocol = (found["protocol"] or "TCP").upper()
    if found["port"] is None and not protocol.startswith("ICMP"):
        raise ConfigError(f"{text!r} needs a port: DST:PORT[/PROTO]")
    port = int(found["port"] or 0)
    if port > 65535:
        raise ConfigError(f"{text!r}: ports end at 65535")
    return Destination(found["host"].strip("[]"), port, protocol)


def _only_lab() -> str | None:
    if (RUN_DIR / "agent.sock").exists():
        return None
    labs = sorted(path.name for path in RUN_DIR.glob("lab/*") if (path / "nodes").is_dir())
    if len(labs) > 1:
        raise ApiError(f"several labs run here: choose one with --lab ({', '.join(labs)})")
    return labs[0] if labs else None
