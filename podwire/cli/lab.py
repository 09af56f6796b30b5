"""`podwire lab`: a cluster in network namespaces on this machine."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from podwire.agent.options import (
    ACCELERATIONS,
    ALGORITHMS,
    MODES,
    ROUTINGS,
    TUNNEL_PROTOCOLS,
    Options,
)
from podwire.errors import ConfigError, PodwireError
from podwire.lab import manifests, state
from podwire.lab.cluster import UNREADY_TIMEOUT_S, Lab
from podwire.lab.terminal import Terminal, table

SUMMARY = "a cluster in network namespaces on this machine"


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="lab_command", required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument(
            "--name",
            default=os.environ.get("PODWIRE_LAB", state.DEFAULT_NAME),
            help="which lab (default: $PODWIRE_LAB, or %(default)s)",
        )
        return command

    up = add("up", "bring a lab up and wait until all pods are ready")
    up.add_argument("--nodes", type=int, default=2, metavar="N")
    up.add_argument("--dual-stack", action="store_true", help="IPv4 and IPv6")
    up.add_argument("--routing", choices=ROUTINGS, default="direct")
    up.add_argument("--tunnel-protocol", choices=TUNNEL_PROTOCOLS, default="vxlan")
    up.add_argument("--wiring", choices=("bridge", "routed", "vpc"), default="bridge")
    up.add_argument("--datapath", choices=("auto", "nftables", "iptables", "ebpf"), default="auto")
    up.add_argument("--lb-algorithm", choices=ALGORITHMS, default="random")
    up.add_argument("--lb-mode", choices=MODES, default="snat")
    up.add_argument("--lb-acceleration", choices=ACCELERATIONS, default="disabled")
    up.add_argument(
        "--instance-type", default="m5.large", help="of the nodes, with --wiring vpc (%(default)s)"
    )
    up.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    _manifest_options(up)
    _wait_options(up)
    apply = add("apply", "apply manifests")
    _manifest_options(apply, required=True)
    _wait_options(apply)
    _manifest_options(add("delete", "delete what manifests name"), required=True)
    add("ls", "list labs, nodes and pods; all labs unless one is named").set_defaults(name="")
    status = add("status", "what runs and what does not")
    status.add_argument("--json", action="store_true")
    execute = add("exec", "run a program in a pod, on a node (node/NAME) or outside")
    execute.add_argument("-n", "--namespace", default="default")
    execute.add_argument("target", metavar="POD")
    execute.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD")
    logs = add("logs", "the requests that a pod saw")
    logs.add_argument("-n", "--namespace", default="default")
    logs.add_argument("--json", action="store_true")
    logs.add_argument("target", metavar="POD")
    reach = add("reach", "who reaches whom, tried with real connections")
    reach.add_argument("-n", "--namespace", default="", help="only pods of this namespace")
    reach.add_argument("--json", action="store_true")
    reach.add_argument("--timeout", type=float, default=1.0, metavar="S")
    kubeconfig = add("kubeconfig", "print the path of the kubeconfig")
    kubeconfig.add_argument("--show", action="store_true", help="print its content")
    kubeconfig.add_argument("--shell", action="store_true", help="print a line for eval")
    node = add("node", "add, remove or re-address a node")
    node.add_argument("action", choices=("add", "remove", "readdress"))
    node.add_argument("node", metavar="NODE")
    node.add_argument("host", nargs="?", type=int, help="its new number in the underlay")
    add("down", "take a lab away, also one that died")


def _manifest_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "-f", "--file", action="append", default=[], required=required, metavar="FILE|DIR|-"
    )
    parser.add_argument(
        "-n", "--namespace", default="", help="for objects that name none (default: default)"
    )


def _wait_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="do not wait for readiness")
    parser.add_argument("--timeout", type=float, default=UNREADY_TIMEOUT_S, metavar="S")


def run(args: argparse.Namespace) -> int:
    return _COMMANDS[args.lab_command](args)


# --- beginning and end ----------------------------------------------------------------------------


def _up(args: argparse.Namespace) -> int:
    # what no agent would start with is said here, before anything is made
    told = ("tunnel_protocol", "lb_algorithm", "lb_mode", "lb_acceleration")
    agent = {name: getattr(args, name) for name in told}
    Options(wiring=args.wiring, routing=args.routing, datapath=args.datapath, **agent).checked()
    found = manifests.read(args.file)
    terminal = Terminal()
    began = time.monotonic()
    terminal.progress("making namespaces")
    lab = Lab.up(
        args.name,
        nodes=args.nodes,
        dual_stack=args.dual_stack,
        wiring=args.wiring,
        routing=args.routing,
        datapath=args.datapath,
        agent=agent,
        instance_type=args.instance_type,
        log_level=args.log_level,
    )
    if found:  # the first node to be ready would get all pods
        lab.wait(args.timeout, lambda readiness: terminal.progress(str(readiness)))
    failed = _apply_to(lab, found, args, terminal)
    seconds = time.monotonic() - began
    terminal.print(f"lab {lab.name} is up: {len(lab.record.nodes)} nodes, {seconds:.2f} s")
    option = "" if lab.name == state.DEFAULT_NAME else f" --name {lab.name}"
    terminal.print(f"  kubectl: {_export(lab)}")
    terminal.print(f"  look around: podwire lab ls{option}, podwire lab reach{option}")
    return failed


def _apply(args: argparse.Namespace) -> int:
    found = manifests.read(args.file)
    terminal = Terminal()
    return _apply_to(Lab(args.name), found, args, terminal, say=True)


def _apply_to(
    lab: Lab,
    found: Sequence[manifests.Manifest],
    args: argparse.Namespace,
    terminal: Terminal,
    *,
    say: bool = False,
) -> int:
    """Apply and wait; 1 when something was refused."""
    failed = _print_results(lab.apply(found, args.namespace) if found else [], terminal, say)
    if not args.no_wait:
        lab.wait(args.timeout, lambda readiness: terminal.progress(str(readiness)))
        terminal.clear()
    return failed


def _delete(args: argparse.Namespace) -> int:
    found = manifests.read(args.file)
    return _print_results(Lab(args.name).delete(found, args.namespace), Terminal(), True)


def _print_results(results: Sequence[dict[str, Any]], terminal: Terminal, say: bool) -> int:
    terminal.clear()
    for result in results:
        where = f"{result['namespace']}/" if result.get("namespace") else ""
        subject = f"{result['kind']} {where}{result['name']}"
        if result["verb"] == "failed":
            terminal.print(terminal.paint(f"{subject}: {result['error']}", "red"))
        elif say:
            terminal.print(f"{subject} {result['verb']}")
    unknown = sorted({str(r["kind"]) for r in results if not r.get("known", True)})
    if unknown:
        terminal.print(f"kept, but nothing here acts on it: {', '.join(unknown)}")
    return int(any(result["verb"] == "failed" for result in results))


def _down(args: argparse.Namespace) -> int:
    from podwire.lab import teardown

    if not teardown.down(state.LabDir(args.name)):
        print(f"no lab {args.name}", file=sys.stderr)
    return 0


# --- looking --------------------------------------------------------------------------------------


def _ls(args: argparse.Namespace) -> int:
    terminal = Terminal()
    names = [args.name] if args.name else state.names()
    for name in names:
        terminal.print(terminal.paint(name, "bold"))
        try:
            lab = Lab(name)
            for line in _listing(lab, terminal):
                terminal.print(f"  {line}")
        except PodwireError as error:
            terminal.print(terminal.paint(f"  {error}", "red"))
    return 0


def _listing(lab: Lab, terminal: Terminal) -> list[str]:
    from podwire.lab.readiness import is_ready

    def state_of(obj: dict[str, Any], text: str) -> str:
        return terminal.paint(text, "green") if is_ready(obj) else terminal.paint(text, "yellow")

    rows: list[list[str]] = []
    for node in lab.items("/api/v1/nodes"):
        addresses = [a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP"]
        mark = state_of(node, "Ready" if is_ready(node) else "NotReady")
        cidrs = ",".join(node["spec"].get("podCIDRs", ()))
        rows.append(["node", node["metadata"]["name"], mark, ",".join(addresses), cidrs])
    for pod in lab.items("/api/v1/pods"):
        meta, status = pod["metadata"], pod["status"]
        addresses = ",".join(entry["ip"] for entry in status.get("podIPs", ()))
        phase = status.get("phase", "")
        name = f"{meta['namespace']}/{meta['name']}"
        mark = state_of(pod, phase if is_ready(pod) or phase != "Running" else "NotReady")
        rows.append(["pod", name, mark, addresses, pod["spec"].get("nodeName", "")])
    return table(rows)


def _status(args: argparse.Namespace) -> int:
    from podwire.lab.overview import overview, render

    found = overview(Lab(args.name))
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        terminal = Terminal()
        for line in render(found, terminal):
            terminal.print(line)
    return 0 if found["well"] else 1


def _logs(args: argparse.Namespace) -> int:
    from podwire.agent.logs import quote

    for entry in Lab(args.name).logs(args.target, args.namespace):
        if args.json:
            print(json.dumps(entry))
            continue
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(entry["time"]))
        millis = int(entry["time"] % 1 * 1000)
        status = f" status={entry['status']}" if entry["status"] else ""
        print(
            f"{moment}.{millis:03d}Z protocol={entry['protocol']} port={entry['port']} "
            f"client={entry['client']} request={quote(entry['request'])}{status}"
        )
    return 0


def _reach(args: argparse.Namespace) -> int:
    from podwire.lab import reach

    matrix = reach.measure(Lab(args.name), args.namespace, args.timeout)
    if args.json:
        print(json.dumps(matrix.as_json(), indent=1))
    else:
        terminal = Terminal()
        for line in matrix.render(terminal):
            terminal.print(line)
    return 0


def _kubeconfig(args: argparse.Namespace) -> int:
    lab = Lab(args.name)
    if args.shell:
        print(_export(lab))
    else:
        print(lab.dir.kubeconfig.read_text() if args.show else lab.dir.kubeconfig)
    return 0


def _export(lab: Lab) -> str:
    return f"export KUBECONFIG={shlex.quote(str(lab.dir.kubeconfig))}"


# --- doing ----------------------------------------------------------------------------------------


def _exec(args: argparse.Namespace) -> int:
    argv = args.argv
    if "--" in argv:  # argparse leaves options between POD and -- in the remainder
        late, argv = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
        options = argparse.ArgumentParser(prog="podwire lab exec")
        options.add_argument("--name", default=args.name)
        options.add_argument("-n", "--namespace", default=args.namespace)
        options.parse_args(late, args)
    if not argv:
        raise ConfigError("which program? podwire lab exec POD -- CMD")
    Lab(args.name).execute(args.target, argv, args.namespace)
    return 0


def _node(args: argparse.Namespace) -> int:
    lab = Lab(args.name)
    if args.action == "readdress" and args.host is None:
        raise ConfigError("readdress: which number in the underlay? e.g. 99 for 172.18.0.99")
    lab.control(f"{args.action}-node", node=args.node, host=args.host)
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "up": _up,
    "apply": _apply,
    "delete": _delete,
    "ls": _ls,
    "status": _status,
    "exec": _exec,
    "logs": _logs,
    "reach": _reach,
    "kubeconfig": _kubeconfig,
    "node": _node,
    "down": _down,
}
