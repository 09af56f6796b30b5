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
    DATAPATHS,
    LOG_LEVELS,
    MODES,
    ROUTINGS,
    TUNNEL_PROTOCOLS,
    WIRINGS,
    Options,
)
from podwire.cli import status
from podwire.cli.output import indented, print_json
from podwire.errors import ConfigError, PodwireError
from podwire.lab import manifests, state
from podwire.lab.cluster import UNREADY_TIMEOUT_S, Lab
from podwire.lab.overview import overview
from podwire.lab.readiness import is_ready
from podwire.terminal import clear, paint, progress, table


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
    up.add_argument("--nodes", type=int, default=2, metavar="N", help="how many (%(default)s)")
    up.add_argument("--dual-stack", action="store_true", help="IPv4 and IPv6")
    default, given = Options(), "the agent's (%(default)s)"
    for name, choices in (
        ("wiring", WIRINGS),
        ("routing", ROUTINGS),
        ("tunnel_protocol", TUNNEL_PROTOCOLS),
        ("datapath", DATAPATHS),
        ("lb_algorithm", ALGORITHMS),
        ("lb_mode", MODES),
        ("lb_acceleration", ACCELERATIONS),
    ):
        flag = f"--{name.replace('_', '-')}"
        up.add_argument(flag, choices=choices, default=getattr(default, name), help=given)
    up.add_argument(
        "--instance-type", default="m5.large", help="of the nodes, with --wiring vpc (%(default)s)"
    )
    up.add_argument(
        "--log-level", choices=LOG_LEVELS, default="info", help="of all processes (%(default)s)"
    )
    _manifest_options(up)
    _wait_options(up)
    apply = add("apply", "apply manifests")
    _manifest_options(apply, required=True)
    _wait_options(apply)
    _manifest_options(add("delete", "delete what manifests name"), required=True)
    listing = commands.add_parser("ls", help="labs, their nodes and pods")
    listing.add_argument("--name", default="", help="only this lab (default: all)")
    looked = add("status", "what runs and what does not")
    execute = add("exec", "run a program in a pod, on a node (node/NAME) or outside")
    execute.add_argument("target", metavar="POD", help="a pod, what made it, node/NAME or outside")
    execute.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD")
    logs = add("logs", "the requests that a pod saw")
    logs.add_argument("target", metavar="POD", help="a pod, what made it, or outside")
    for each in (execute, logs):
        each.add_argument("-n", "--namespace", default="default", help="the pod's (%(default)s)")
    reach = add("reach", "who reaches whom, tried with real connections")
    reach.add_argument("-n", "--namespace", default="", help="only pods of this namespace")
    reach.add_argument("--timeout", type=float, default=1.0, metavar="S", help="(%(default)s)")
    for each in (looked, logs, reach):
        each.add_argument("--json", action="store_true", help="the answer as JSON")
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
        "-f",
        "--filename",
        "--file",
        action="append",
        default=[],
        required=required,
        metavar="FILE|DIR|-",
        help="YAML or JSON; may be repeated",
    )
    parser.add_argument(
        "-n", "--namespace", default="", help="for objects that name none (default: default)"
    )


def _wait_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="do not wait for readiness")
    parser.add_argument(
        "--timeout", type=float, default=UNREADY_TIMEOUT_S, metavar="S", help="(%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    return _COMMANDS[args.lab_command](args)


# --- beginning and end ----------------------------------------------------------------------------


def _up(args: argparse.Namespace) -> int:
    # what no agent would start with is said here, before anything is made
    told = ("tunnel_protocol", "lb_algorithm", "lb_mode", "lb_acceleration")
    agent = {name: getattr(args, name) for name in told}
    Options(wiring=args.wiring, routing=args.routing, datapath=args.datapath, **agent).checked()
    found = manifests.read(args.filename)
    began = time.monotonic()
    progress("making namespaces")
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
        lab.wait(args.timeout, lambda readiness: progress(str(readiness)))
    failed = _apply_to(lab, found, args)
    seconds = time.monotonic() - began
    print(f"lab {lab.name} is up: {len(lab.record.nodes)} nodes, {seconds:.2f} s")
    option = "" if lab.name == state.DEFAULT_NAME else f" --name {lab.name}"
    print(f"  kubectl: {_export(lab)}")
    print(f"  look around: podwire lab ls{option}, podwire lab reach{option}")
    return failed


def _apply(args: argparse.Namespace) -> int:
    return _apply_to(Lab(args.name), manifests.read(args.filename), args, say=True)


def _apply_to(
    lab: Lab,
    found: Sequence[manifests.Manifest],
    args: argparse.Namespace,
    *,
    say: bool = False,
) -> int:
    """Apply and wait; 1 when something was refused."""
    failed = _print_results(lab.apply(found, args.namespace) if found else [], say)
    if not args.no_wait:
        lab.wait(args.timeout, lambda readiness: progress(str(readiness)))
        clear()
    return failed


def _delete(args: argparse.Namespace) -> int:
    found = manifests.read(args.filename)
    return _print_results(Lab(args.name).delete(found, args.namespace), True)


def _print_results(results: Sequence[dict[str, Any]], say: bool) -> int:
    clear()
    for result in results:
        where = f"{result['namespace']}/" if result.get("namespace") else ""
        subject = f"{result['kind']} {where}{result['name']}"
        if result["verb"] == "failed":
            print(paint("red", f"{subject}: {result['error']}"))
        elif say:
            print(f"{subject} {result['verb']}")
    unknown = sorted({str(r["kind"]) for r in results if not r.get("known", True)})
    if unknown:
        print(f"kept, but nothing here acts on it: {', '.join(unknown)}")
    return int(any(result["verb"] == "failed" for result in results))


def _down(args: argparse.Namespace) -> int:
    from podwire.lab import teardown

    if not teardown.down(state.LabDir(args.name)):
        print(f"no lab {args.name}", file=sys.stderr)
    return 0


# --- looking --------------------------------------------------------------------------------------


def _ls(args: argparse.Namespace) -> int:
    """1 when the one named is not there or does not answer."""
    names = [args.name] if args.name else state.names()
    if not names:
        print("no lab is up")
    failed = 0
    for name in names:
        try:
            print("\n".join([paint("bold", name), *indented(_listing(Lab(name)))]))
        except PodwireError as error:
            print(paint("red", str(error)))
            failed = int(bool(args.name))
    return failed


def _listing(lab: Lab) -> list[str]:
    """The lab's nodes, then its pods."""
    nodes: list[list[str]] = []
    for node in lab.items("/api/v1/nodes"):
        addresses = [a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP"]
        mark = _mark(node, "Ready" if is_ready(node) else "NotReady")
        cidrs = ",".join(node["spec"].get("podCIDRs", ()))
        nodes.append([node["metadata"]["name"], mark, ",".join(addresses), cidrs])
    pods: list[list[str]] = []
    for pod in lab.items("/api/v1/pods"):
        meta, status = pod["metadata"], pod["status"]
        addresses = [entry["ip"] for entry in status.get("podIPs", ())]
        phase = status.get("phase", "")
        mark = _mark(pod, phase if is_ready(pod) or phase != "Running" else "NotReady")
        name = f"{meta['namespace']}/{meta['name']}"
        pods.append([name, mark, ",".join(addresses), pod["spec"].get("nodeName", "")])
    return [
        *table(["NODE", "STATUS", "ADDRESS", "PODS"], nodes),
        *table(["POD", "STATUS", "ADDRESS", "NODE"], pods),
    ]


def _mark(obj: dict[str, Any], text: str) -> str:
    return paint("green" if is_ready(obj) else "yellow", text)


def _status(args: argparse.Namespace) -> int:
    found = overview(Lab(args.name))
    if args.json:
        print_json(found)
    else:
        print("\n".join(_status_lines(found)))
    return 0 if found["well"] else 1


def _status_lines(found: dict[str, Any]) -> list[str]:
    """Processes, then what each agent says of itself, then what is not ready."""
    rows = [
        [role, str(pid), paint("green", "runs")]
        if pid
        else [role, "-", paint("red", "does not run")]
        for role, pid in found["processes"].items()
    ]
    lines = [f"{paint('bold', found['lab'])}  {found['ready']}"]
    lines += indented(table(["PROCESS", "PID", "STATE"], rows))
    for answer in found["agents"].values():
        lines += ["", *status.lines(answer)]
    if found["missing"]:
        lines += ["", paint("yellow", "not ready"), *indented(found["missing"])]
    return lines


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
        print_json(matrix.as_json())
    else:
        print("\n".join(matrix.render()))
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
