"""`podwire services`: Services as the data path sees them."""

from __future__ import annotations

import argparse
from typing import Any

from podwire.agent.control import ask
from podwire.cli import agents
from podwire.cli.output import print_json, print_table
from podwire.terminal import paint

_COLOURS = {"dnat": "green", "accept": "cyan", "reject": "red", "drop": "red"}


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    ls = commands.add_parser("ls", help="every frontend and how many backends it has")
    ls.add_argument("-n", "--namespace", default="")
    show = commands.add_parser("show", help="one Service: frontends, backends, policies")
    show.add_argument("name", metavar="[NAMESPACE/]NAME")
    resolve = commands.add_parser("resolve", help="what becomes of a new connection, and why")
    resolve.add_argument(
        "source", metavar="SRC", help="a pod (namespace/name), an address, or node"
    )
    resolve.add_argument(
        "destination", metavar="DST:PORT[/PROTO]", help="an address or a Service (namespace/name)"
    )
    for each in (ls, show, resolve):
        agents.add_options(each)


def run(args: argparse.Namespace) -> int:
    """0; 1 when the connection resolved would be refused or dropped."""
    socket = agents.socket(args)
    match args.action:
        case "ls":
            answer = ask(socket, "/v1/services", {"namespace": args.namespace})
        case "show":
            answer = ask(socket, "/v1/services/show", {"name": args.name})
        case _:
            answer = _resolve(args)
    if args.json:
        print_json(answer)
    else:
        {"ls": _print_list, "show": _print_one}.get(args.action, _print_resolution)(answer)
    return 1 if args.action == "resolve" and answer["verdict"] in ("reject", "drop") else 0


def _resolve(args: argparse.Namespace) -> Any:
    """The answer of the node that decides, where its agent can be asked; else of the first."""
    query = _query(args)
    answer = ask(agents.socket(args), "/v1/services/resolve", query)
    if answer["decided_on"] != answer["node"] and not args.node:
        socket = agents.socket_on(args, answer["decided_on"])
        if socket is not None:
            return ask(socket, "/v1/services/resolve", query)
    return answer


def _query(args: argparse.Namespace) -> dict[str, str]:
    host, port, protocol = agents.parse_destination(args.destination)
    return {"src": args.source, "dst": host, "port": str(port), "protocol": protocol}


def _print_list(rows: list[dict[str, Any]]) -> None:
    cells = [
        [row["service"], row["port"] or "-", row["kind"], f"{row['frontend']}/{row['protocol']}",
         row["policy"], str(row["backends"]) if row["backends"] else paint("red", "0"),
         f"{row['affinity_timeout_s']} s" if row["affinity_timeout_s"] else "-"]
        for row in rows
    ]  # fmt: skip
    header = ["SERVICE", "PORT", "KIND", "FRONTEND", "POLICY", "BACKENDS", "AFFINITY"]
    print_table(header, cells)


def _print_one(ports: list[dict[str, Any]]) -> None:
    for port in ports:
        title = f"{port['service']} {port.get('port') or ''}".strip()
        print(paint("bold", title))
        for frontend in port.get("frontends", []):
            print(f"  {frontend['kind']:<12} {frontend['frontend']}/{frontend['protocol']}"
                  f"  policy {frontend['policy']}, {frontend['backends']} backends")  # fmt: skip
            if "element" in frontend:
                count = frontend["connections"]
                seen = "not counted" if count is None else f"{count:,} connections"
                print(f"  {'':<12} {seen}, decided by {frontend['element']}")
        counts = port.get("connections", {})
        for name in ("cluster", "local"):
            if port.get(name):
                words = [f"{b} ({counts[b]:,})" if b in counts else b for b in port[name]]
                print(f"  {name + ' backends':<16} {' '.join(words)}")
        if port.get("source_ranges") is not None:
            print(f"  source ranges    {' '.join(port['source_ranges']) or 'nobody'}")
        if port.get("affinity_timeout_s"):
            print(f"  session affinity {port['affinity_timeout_s']} s by client address")
        if port.get("balancing"):
            print(f"  from outside: {port['balancing']}")
        for what, why in port["problems"].items():
            print(f"  {paint('yellow', 'set aside')} {what}: {why}")


def _print_resolution(answer: dict[str, Any]) -> None:
    verdict = paint(_COLOURS[answer["verdict"]], answer["verdict"])
    print(f"{answer['source']} ({answer['from']}) → {answer['destination']}/{answer['protocol']}:"
          f" {verdict}, {answer['reason']}")  # fmt: skip
    if answer["service"]:
        print(f"  {answer['kind']} of {answer['service']}")
    if answer["node"] != answer["decided_on"]:
        print(f"  as {answer['node']} would do it; {answer['decided_on']} decides: ask its agent")
    for backend in answer["backends"]:
        seen = "sees a node address" if backend["masquerade"] else "sees the client's address"
        print(f"  → {backend['endpoint']} {backend['pod'] or ''} ({seen})")
