"""`podwire bpf`: eBPF programs, maps and links, as the kernel holds them."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from podwire.agent.control import follow
from podwire.cli import agents
from podwire.cli.paint import paint, table
from podwire.datapath.ebpf import inspect
from podwire.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    status = commands.add_parser("status", help="what is attached where, and packets by outcome")
    maps = commands.add_parser("maps", help="how full the maps are")
    progs = commands.add_parser("progs", help="runs and time per run")
    progs.add_argument(
        "--seconds", type=float, default=1.0, help="how long to watch (default 1; costs a little)"
    )
    drops = commands.add_parser("drops", help="what was refused and why (asks the agent)")
    drops.add_argument("-f", "--follow", action="store_true", help="and what will be")
    agents.add_options(drops)
    for each in (status, maps, progs):
        each.add_argument("--node", help="one node only (default: all that have pins here)")
        each.add_argument("--json", action="store_true", help="the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """0. Raises ConfigError for a node without eBPF here, ApiError without an agent."""
    if args.action == "drops":
        return asyncio.run(_drops(args))
    known = inspect.nodes()
    if args.node and args.node not in known:
        raise ConfigError(f"no eBPF of node {args.node!r} here ({', '.join(known) or 'none'})")
    nodes = [args.node] if args.node else known
    action = {"status": _status, "maps": _maps, "progs": _programs}[args.action]
    action(nodes, args)
    return 0


def _status(nodes: Sequence[str], args: argparse.Namespace) -> None:
    links = [link for node in nodes for link in inspect.link_states(node)]
    outcomes = {node: inspect.node_outcomes(node) for node in nodes}
    if args.json:
        _print_json({"links": [link._asdict() for link in links], "outcomes": outcomes})
        return
    rows = [
        (link.node, link.program, link.hook, str(link.target), str(link.program_id))
        for link in links
    ]
    print("\n".join(table(("NODE", "PROGRAM", "HOOK", "TARGET", "ID"), rows)))
    for node, counts in outcomes.items():
        seen = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        print(f"{node}: {seen or 'no packets counted'}")


def _maps(nodes: Sequence[str], args: argparse.Namespace) -> None:
    states = [state for node in nodes for state in inspect.map_states(node)]
    if args.json:
        _print_json([state._asdict() for state in states])
        return
    rows: list[tuple[str, ...]] = []
    for state in states:
        held, share = ("", "")
        if state.held is not None:
            held = f"{state.held:,}"
            fraction = state.held / state.capacity if state.capacity else 0
            share = f"{fraction:.0%}"
            if fraction > 0.75 and state.kind not in ("array", "percpu_array"):
                share = paint("red", share)
        rows.append((state.node, state.name, state.kind, held, f"{state.capacity:,}", share))
    print("\n".join(table(("NODE", "MAP", "KIND", "HELD", "ROOM", "FILLED"), rows)))


def _programs(nodes: Sequence[str], args: argparse.Namespace) -> None:
    states = [state for node in nodes for state in inspect.program_states(node, args.seconds)]
    if args.json:
        _print_json([state._asdict() for state in states])
        return
    rows = [
        (
            state.node,
            state.name,
            str(state.id),
            str(state.links),
            f"{state.runs / args.seconds:,.0f}",
            f"{state.nanoseconds:,.0f}",
            f"{state.verified_instructions:,}",
        )
        for state in states
    ]
    header = ("NODE", "PROGRAM", "ID", "LINKS", "RUNS/S", "NS/RUN", "VERIFIED")
    print("\n".join(table(header, rows)))


async def _drops(args: argparse.Namespace) -> int:
    """All agents' refusals, as they come."""

    async def one(run_dir: Path) -> None:
        query = {"follow": "1"} if args.follow else {}
        async for drop in follow(run_dir / "agent.sock", "/v1/bpf/drops", query):
            print(json.dumps(drop) if args.json else _drop(drop), flush=True)

    await asyncio.gather(*(one(run_dir) for run_dir in agents.run_dirs(args)))
    return 0


def _drop(drop: dict[str, Any]) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(drop["time"]))
    colour = "yellow" if drop["reason"] == "policy_audit" else "red"
    source, destination = (
        f"{drop[f'{end}_name']} ({drop[end]})".lstrip() for end in ("source", "destination")
    )
    return (
        f"{when} {paint(colour, drop['reason'])} {source} → {destination} "
        f"{drop['protocol']}/{drop['port']} on {drop['interface']}: {drop['text']}"
    )


def _print_json(answer: object) -> None:
    print(json.dumps(answer, indent=2))
