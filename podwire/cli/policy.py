"""`podwire policy`: why a connection passes or not, who reaches whom, what a change would do."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import yaml

from podwire.agent import report
from podwire.agent.control import ask
from podwire.cli import agents
from podwire.cli.output import print_json, print_table
from podwire.errors import ApiError, ConfigError, PodwireError
from podwire.kube import kubeconfig
from podwire.kube.client import Client, Selection
from podwire.kube.objects import ClusterNetworkPolicy, NetworkPolicy, Node
from podwire.policy import PolicyRef
from podwire.terminal import paint

_COLOURS = {"allow": "green", "deny": "red", "audit": "yellow"}
_CELLS = {"allow": ".", "deny": "X", "audit": "a", None: "-"}


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    why = commands.add_parser("why", help="the verdict on a connection, and the rule that decides")
    why.add_argument("source", metavar="SRC", help="namespace/pod, an address, or node:NAME")
    why.add_argument(
        "destination",
        metavar="DST:PORT[/PROTO]",
        help="namespace/pod, a Service (namespace/name), an address, or node:NAME",
    )
    why.add_argument("--family", choices=["IPv4", "IPv6"], default="")
    ls = commands.add_parser("ls", help="every policy, whom it selects, what it isolates")
    ls.add_argument("-n", "--namespace", default="")
    show = commands.add_parser("show", help="one policy: the pods it selects, its rules")
    show.add_argument("name", metavar="[NAMESPACE/]NAME")
    matrix = commands.add_parser("matrix", help="who reaches whom")
    matrix.add_argument("-n", "--namespace", action="append", default=[])
    matrix.add_argument("--port", default="80/TCP", metavar="PORT[/PROTO]")
    matrix.add_argument("--family", choices=["IPv4", "IPv6"], default="IPv4")
    diff = commands.add_parser("diff", help="which connections other policies would change")
    diff.add_argument("-f", "--filename", type=Path, required=True, metavar="NEW.yaml")
    lint = commands.add_parser("lint", help="policies that do not do what was probably meant")
    drops = commands.add_parser("drops", help="what was denied, by which policy")
    drops.add_argument("-f", "--follow", action="store_true", help="and what will be")
    counts = commands.add_parser("counts", help="how often each policy has decided")
    wait = commands.add_parser("wait", help="until every node enforces the policy as it is now")
    wait.add_argument("name", metavar="[NAMESPACE/]NAME")
    wait.add_argument("--timeout", type=float, default=30, metavar="SECONDS")
    wait.add_argument(
        "--kubeconfig",
        type=Path,
        help="ask a cluster's API what each node reports (default: the agents of this machine)",
    )
    for each in (why, ls, show, matrix, diff, lint, drops, counts, wait):
        agents.add_options(each)


def run(args: argparse.Namespace) -> int:
    """0; 1 when the connection would be denied, lint found something, or waiting was in vain."""
    match args.action:
        case "drops":
            agents.print_stream(args, "/v1/policy/drops", _drop)
            return 0
        case "wait":
            return asyncio.run(_wait_reports(args)) if args.kubeconfig else _wait(args)
        case "diff":
            documents = _documents(args.filename)
            answer = ask(agents.socket(args), "/v1/policy/diff", {}, json.dumps(documents))
        case _:
            path, query = _question(args)
            answer = ask(agents.socket(args), f"/v1/policy{path}", query)
    if args.json:
        print_json(answer)
    else:
        _PRINTERS[args.action](answer)
    if args.action == "why":
        return int(any(one["verdict"] == "deny" for one in answer))
    return int(args.action == "lint" and bool(answer))


def _question(args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    match args.action:
        case "why":
            host, port, protocol = agents.parse_destination(args.destination)
            query = {"src": args.source, "dst": host, "port": str(port), "protocol": protocol,
                     "family": args.family}  # fmt: skip
            return "/why", query
        case "ls":
            return "", {"namespace": args.namespace}
        case "show":
            return "/show", {"name": args.name}
        case "matrix":
            port, _, protocol = args.port.partition("/")
            if not port.isdigit():
                raise ConfigError(f"--port takes PORT[/PROTO], not {args.port!r}")
            query = {"namespaces": ",".join(args.namespace), "port": port,
                     "protocol": protocol or "TCP", "family": args.family}  # fmt: skip
            return "/matrix", query
        case other:
            return f"/{other}", {}


def _documents(path: Path) -> list[Any]:
    try:
        return [one for one in yaml.safe_load_all(path.read_text()) if isinstance(one, dict)]
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _print_why(answers: list[dict[str, Any]]) -> None:
    for one in answers:
        verdict = paint(_COLOURS[one["verdict"]], one["verdict"])
        port = f":{one['port']}" if one["port"] else ""
        print(f"{one['source']} ({one['source_address']}) → {one['destination']} "
              f"({one['destination_address']}){port}/{one['protocol']}: {verdict}")  # fmt: skip
        for direction in one["directions"]:
            print(f"  {direction['text']}")
            for hint in direction["hints"]:
                print(f"    {hint}")


def _print_list(rows: list[dict[str, Any]]) -> None:
    cells = [
        [row["policy"], row["tier"], row["selects"], str(row["pods"]),
         ",".join(row["isolates"]) or "-", f"{row['ingress_rules']}/{row['egress_rules']}",
         paint("yellow", "audit") if row["audit"] else "enforced",
         paint("yellow", str(row["problems"])) if row["problems"] else "-"]
        for row in rows
    ]  # fmt: skip
    header = ["POLICY", "TIER", "SELECTS", "PODS", "ISOLATES", "IN/OUT", "MODE", "PROBLEMS"]
    print_table(header, cells)


def _print_show(policies: list[dict[str, Any]]) -> None:
    for policy in policies:
        mode = " (audit: not enforced)" if policy["audit"] else ""
        print(paint("bold", policy["policy"]) + mode)
        print(f"  selects   {policy['subject']}: {' '.join(policy['pods']) or 'no pod'}")
        print(f"  isolates  {', '.join(policy['isolates']) or 'nothing'}")
        for rule in policy["rules"]:
            peers = "any peer" if rule["peers"] is None else "; ".join(rule["peers"]) or "nobody"
            ports = "any port" if rule["ports"] is None else ", ".join(rule["ports"]) or "nothing"
            name = f" {rule['name']}" if rule["name"] else ""
            print(f"  {rule['direction']:<8}{rule['number']:>3}  {rule['action']}{name}: "
                  f"{peers}, {ports}")  # fmt: skip
        for field, sentence in policy["problems"].items():
            print(f"  {paint('yellow', field)}: {sentence}")


def _print_matrix(answer: dict[str, Any]) -> None:
    width = max(map(len, answer["pods"]), default=0)
    for number, pod in enumerate(answer["pods"]):
        print(f"{'':{width}}  " + " │" * number + f" ┌ {pod}")
    for pod, row in zip(answer["pods"], answer["rows"], strict=True):
        print(f"{pod:{width}}   " + " ".join(
            paint(_COLOURS.get(verdict, "cyan"), _CELLS[verdict]) for verdict in row
        ))  # fmt: skip
    print(". connects   X denied   a audited (connects)   - itself, or no address")


def _print_diff(answer: dict[str, Any]) -> None:
    for where, sentence in answer["problems"].items():
        print(f"{paint('yellow', where)}: {sentence}")
    for change in answer["changes"]:
        before, after = (paint(_COLOURS[change[k]], change[k]) for k in ("before", "after"))
        print(f"{change['source']} → {change['destination']} {change['protocol']}/{change['port']}:"
              f" {before} → {after}  ({change['reason']})")  # fmt: skip
    for flow in answer.get("connections", ()):
        print(f"{paint('red', 'open now, would be denied')}: {flow}")
    print(f"{len(answer['changes'])} changes; tried {', '.join(answer['tried'])}")


def _print_lint(findings: list[dict[str, Any]]) -> None:
    for finding in findings:
        print(f"{finding['policy']} {paint('yellow', finding['field'])}: {finding['message']}")
    print(f"{len(findings)} findings")


def _print_counts(rows: list[dict[str, Any]]) -> None:
    cells = [
        [", ".join(row["policies"]) or "(no policy)", row["direction"],
         paint(_COLOURS[row["verdict"]], row["verdict"]), str(row["packets"])]
        for row in rows
    ]  # fmt: skip
    print_table(["POLICY", "DIRECTION", "VERDICT", "CONNECTIONS"], cells)


_PRINTERS = {
    "why": _print_why,
    "ls": _print_list,
    "show": _print_show,
    "matrix": _print_matrix,
    "diff": _print_diff,
    "lint": _print_lint,
    "counts": _print_counts,
}


def _drop(drop: dict[str, Any]) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(drop["time"]))
    verdict = paint(_COLOURS[drop["verdict"]], drop["verdict"])
    return (
        f"{when} {verdict} {drop['source_name']} ({drop['source']}) → {drop['destination_name']} "
        f"({drop['destination']}) {drop['protocol']}/{drop['port']}: {drop['reason']}"
    )


def _wait(args: argparse.Namespace) -> int:
    """Ask until all agents have the same, newest version and enforce it."""
    until = time.monotonic() + args.timeout
    newest = asyncio.run(_versions(args))
    while True:
        answers = [
            ask(run_dir / "agent.sock", "/v1/policy/applied", {"name": args.name})
            for run_dir in agents.run_dirs(args)
        ]
        versions = {json.dumps(answer["versions"], sort_keys=True) for answer in answers}
        late = [answer["node"] for answer in answers if not answer["enforced"]]
        known = answers[0]["versions"]
        if len(versions) == 1 and not late and known and newest.items() <= known.items():
            print(f"{args.name} is enforced on {len(answers)} nodes")
            return 0
        if time.monotonic() > until:
            why = f"not by {', '.join(late)}" if late else "not all nodes know its newest version"
            if not any(answer["versions"] for answer in answers):
                why = "no node knows it"
            raise ApiError(f"{args.name} is not enforced everywhere: {why}")
        time.sleep(0.05)


async def _wait_reports(args: argparse.Namespace) -> int:
    """Read the Nodes until all report the policy's version or a later one."""
    until = time.monotonic() + args.timeout
    namespace, _, name = args.name.rpartition("/")
    kind = NetworkPolicy if namespace else ClusterNetworkPolicy
    async with Client(kubeconfig.load(args.kubeconfig)) as client:
        policy = await client.get(kind, name, namespace)
        wanted = int(policy.metadata.resource_version)
        while True:
            nodes = (await client.list(Selection(Node))).objects
            late = [n.metadata.name for n in nodes if (report.enforced(n) or 0) < wanted]
            if nodes and not late:
                print(f"{args.name} is enforced on {len(nodes)} nodes")
                return 0
            if time.monotonic() > until:
                raise ApiError(f"{args.name} is not enforced everywhere: not by {', '.join(late)}")
            await asyncio.sleep(0.2)


async def _versions(args: argparse.Namespace) -> dict[str, str]:
    """The policy's version in the API, by kind and name; nothing where no API can be asked."""
    kubeconfig_path = agents.run_dirs(args)[0] / "../../../kubeconfig"  # of a lab
    namespace, _, name = args.name.rpartition("/")
    kind = NetworkPolicy if namespace else ClusterNetworkPolicy
    try:
        config = kubeconfig.load(kubeconfig_path if kubeconfig_path.exists() else None)
        async with Client(config) as client:
            found = await client.get(kind, name, namespace)
    except PodwireError:
        return {}
    ref = PolicyRef(kind.__name__, namespace, name)
    return {str(ref): found.metadata.resource_version}
