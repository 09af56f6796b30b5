"""`podwire bpf`: eBPF programs, maps and links, as the kernel holds them.

Only `drops` asks the agent; everything else works without one.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from podwire.cli import agents
from podwire.cli.output import indented, print_json, print_table
from podwire.datapath.ebpf import inspect
from podwire.datapath.ebpf.events import PASSED, WORDS
from podwire.datapath.ebpf.fill import NEARLY_FULL
from podwire.datapath.ebpf.inspect import LinkState, Place
from podwire.datapath.ebpf.layout import VERSION
from podwire.errors import ConfigError
from podwire.kernel.bpf import features
from podwire.lab.state import LabDir
from podwire.terminal import paint, table

_LONGEST_S = 3600
_WORDS = {reason.name.lower(): words for reason, words in WORDS.items()}
_PASSED = {reason.name.lower() for reason in PASSED}


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    status = commands.add_parser("status", help="what is attached where, and packets by outcome")
    maps = commands.add_parser("maps", help="how full the maps are")
    progs = commands.add_parser("progs", help="runs and time per run")
    progs.add_argument(
        "--seconds",
        type=_seconds,
        default=1.0,
        help="how long to watch; costs a little (%(default)s)",
    )
    drops = commands.add_parser("drops", help="what was refused and why (asks the agent)")
    drops.add_argument("-f", "--follow", action="store_true", help="and what will be")
    agents.add_options(drops)
    for each in (status, maps, progs):
        each.add_argument("--lab", metavar="NAME", help="the nodes of this lab")
        each.add_argument("--node", metavar="NAME", help="one node only")
        each.add_argument("--json", action="store_true", help="the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """0. Raises ConfigError for a node without eBPF here, ApiError without an agent."""
    if args.action == "drops":
        agents.print_stream(args, "/v1/bpf/drops", _drop)
        return 0
    action = {"status": _status, "maps": _maps, "progs": _programs}[args.action]
    places = _places(args)
    if not places and not args.json:
        print("no eBPF of podwire is here")
    if places or args.json or args.action == "status":
        action(places, args)
    return 0


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= _LONGEST_S:
        raise argparse.ArgumentTypeError(f"not between 0 and {_LONGEST_S}: {text}")
    return seconds


def _places(args: argparse.Namespace) -> list[Place]:
    """This machine's pins, else those of the only lab; a lab's nodes have mounts of their own."""
    in_lab = bool(args.lab or os.environ.get("PODWIRE_LAB"))
    places = [] if in_lab else inspect.places()
    if not places:
        args.run_dir = None
        places = [place for found in agents.run_dirs(args) if (place := _lab_place(found))]
    chosen = [place for place in places if args.node in (None, place.node)]
    if args.node and not chosen:
        known = ", ".join(place.node for place in places)
        raise ConfigError(f"no eBPF of node {args.node!r} here ({known or 'none at all'})")
    return chosen


def _lab_place(run_dir: Path) -> Place | None:
    """A lab's node, through the eyes of its agent."""
    if run_dir == agents.RUN_DIR:
        return None
    node, lab = run_dir.parent.name, LabDir(run_dir.parents[2].name)
    process = lab.read().processes.get(f"agent-{node}")
    if process is None or not process.alive:
        return None
    folder = Path(f"/proc/{process.pid}/root/sys/fs/bpf/podwire", node)
    return Place(node, folder, lab.netns(f"node-{node}")) if folder.is_dir() else None


# --- status --------------------------------------------------------------------------------------


def _status(places: Sequence[Place], args: argparse.Namespace) -> None:
    links = {place.node: list(inspect.link_states(place)) for place in places}
    outcomes = {place.node: inspect.node_outcomes(place) for place in places}
    layouts = {place.node: inspect.layout(place) for place in places}
    missing, lacking = features.missing(), features.lacking()
    if args.json:
        every = [link._asdict() for some in links.values() for link in some]
        kernel = {"missing": missing, "lacking": lacking}
        print_json({"links": every, "outcomes": outcomes, "layouts": layouts, "kernel": kernel})
        return
    for place in places:
        _print_node(place, links[place.node], outcomes[place.node], layouts[place.node])
    for name in missing:
        print(f"{paint('red', 'the kernel lacks')} {name}: the eBPF data path cannot run")
    for name in lacking:
        print(f"{paint('yellow', 'the kernel lacks')} {name}")


def _print_node(
    place: Place, links: Sequence[LinkState], outcomes: dict[str, int], layout: int
) -> None:
    own = "" if layout == VERSION else f", this podwire uses {VERSION}"
    print(
        f"{paint('bold', 'node ' + place.node)}  {len(links)} links, maps of layout {layout}{own}"
    )
    if not links:
        print(f"  {paint('yellow', 'nothing is attached')}: left by an agent whose interfaces are "
              f"gone; podwire agent --cleanup --node-name {place.node}")  # fmt: skip
    interfaces: dict[int, dict[str, list[LinkState]]] = {}
    sockets: dict[str, list[str]] = {}
    for link in links:
        if link.hook.startswith("cgroup"):
            sockets.setdefault(link.interface, []).append(link.program)
        else:
            hooks = interfaces.setdefault(link.target, {})
            hooks.setdefault(link.hook, []).append(link)
    rows: list[tuple[str, ...]] = []
    for _, hooks in sorted(interfaces.items()):
        first = next(iter(hooks.values()))[0]
        programs = (
            ", ".join(
                link.program + (" (generic)" if hook.endswith("generic") else "")
                for hook, some in hooks.items()
                if hook.startswith(kind)
                for link in some
            )
            for kind in ("tcx ingress", "tcx egress", "xdp")
        )
        rows.append((first.interface, first.pod or "-", *(text or "-" for text in programs)))
    lines = table(("INTERFACE", "POD", "INGRESS", "EGRESS", "DRIVER"), rows) if rows else []
    for path, programs in sockets.items():
        lines.append(f"sockets of cgroup {path}: {', '.join(sorted(programs))}")
    counted = [
        (_paint_outcome(name), f"{count:,}", _WORDS.get(name, ""))
        for name, count in outcomes.items()
        if count
    ]
    if counted:
        lines += table(("OUTCOME", "PACKETS", "WHAT IT IS"), counted)
    else:
        lines.append("no packets counted")
    print("\n".join([*indented(lines), ""]))


def _paint_outcome(name: str) -> str:
    return name if name in _PASSED else paint("red", name)


# --- maps and programs ---------------------------------------------------------------------------


def _maps(places: Sequence[Place], args: argparse.Namespace) -> None:
    states = [state for place in places for state in inspect.map_states(place)]
    if args.json:
        print_json([state._asdict() for state in states])
        return
    rows: list[tuple[str, ...]] = []
    for state in states:
        held = share = ""
        if state.held is not None:
            held = f"{state.held:,}"
            share = f"{state.held / state.capacity:.0%}"
            if state.when_full == "refuses" and state.held >= NEARLY_FULL * state.capacity:
                share = paint("red", share)
        rows.append(
            (state.node, state.name, state.kind, held, f"{state.capacity:,}", share,
             state.when_full, f"{-(-state.memory // 1024):,} KiB")
        )  # fmt: skip
    header = ("NODE", "MAP", "KIND", "HELD", "ROOM", "FILLED", "WHEN FULL", "MEMORY")
    print_table(header, rows)


def _programs(places: Sequence[Place], args: argparse.Namespace) -> None:
    states = [state for place in places for state in inspect.program_states(place, args.seconds)]
    if args.json:
        print_json([state._asdict() for state in states])
        return
    rows = [
        (
            state.node,
            state.name,
            str(state.id),
            str(state.links),
            f"{state.runs / args.seconds:,.0f}",
            f"{state.nanoseconds:,.0f}" if state.runs else "-",
            f"{state.runs * state.nanoseconds / args.seconds / 1e7:.2f} %",
            f"{state.verified_instructions:,}",
        )
        for state in states
    ]
    header = ("NODE", "PROGRAM", "ID", "LINKS", "RUNS/S", "NS/RUN", "OF A CPU", "VERIFIED")
    print_table(header, rows)


# --- drops ---------------------------------------------------------------------------------------


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
