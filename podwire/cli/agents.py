"""Which agent a command asks: the node's own, one of a lab's, or all of a lab's."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from podwire.errors import ApiError

RUN_DIR = Path("/run/podwire")


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--run-dir`, `--lab` and `--node`."""
    parser.add_argument("--run-dir", type=Path, help=f"of the agent (default {RUN_DIR})")
    parser.add_argument("--lab", metavar="NAME", help="an agent of this lab ($PODWIRE_LAB)")
    parser.add_argument("--node", metavar="NAME", help="which of the lab's nodes (default: first)")
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


def _only_lab() -> str | None:
    if (RUN_DIR / "agent.sock").exists():
        return None
    labs = sorted(path.name for path in RUN_DIR.glob("lab/*") if (path / "nodes").is_dir())
    if len(labs) > 1:
        raise ApiError(f"several labs run here: choose one with --lab ({', '.join(labs)})")
    return labs[0] if labs else None
