"""`podwire vpc`: ENIs, pods and settings of VPC mode."""

from __future__ import annotations

import argparse
from typing import Any, cast

from podwire.agent.control import ask
from podwire.cli import agents
from podwire.cli.output import print_json, print_table
from podwire.terminal import paint


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    enis = commands.add_parser("enis", help="ENIs, and what they hold")
    pods = commands.add_parser("pods", help="pods, their addresses and the ENI of each")
    env = commands.add_parser("env", help="the settings in force, by the names of the environment")
    for each in (enis, pods, env):
        agents.add_options(each)


def run(args: argparse.Namespace) -> int:
    socket = agents.socket(args)
    answer: Any
    match args.action:
        case "enis":
            answer = ask(socket, "/v1/vpc/enis", {})
        case "pods":
            answer = ask(socket, "/v1/vpc/pods", {})
        case _:
            paths = ("ipamd-env-settings", "networkutils-env-settings")
            answer = {}
            for path in paths:
                answer |= ask(socket, f"/v1/vpc/{path}", {})
    if args.json:
        print_json(answer)
    else:
        {"enis": _print_enis, "pods": _print_pods}.get(args.action, _print_env)(answer)
    return 0


def _print_enis(answer: Any) -> None:
    rows: list[list[str]] = []
    for eni in sorted(answer["ENIs"].values(), key=lambda eni: eni["DeviceNumber"] or 0):
        cidrs = {**eni["AvailableIPv4Cidrs"], **eni["IPv6Cidrs"]}
        addresses = [one for cidr in cidrs.values() for one in cidr["IPAddresses"].values()]
        used = sum(bool(one["IPAMKey"]["containerID"]) for one in addresses)
        remark = "primary" if eni["IsPrimary"] else ""
        if eni["Fault"]:
            remark = paint("yellow", eni["Fault"])
        rows.append(
            [
                eni["ID"],
                str(eni["DeviceNumber"]),
                str(eni["RouteTableID"]),
                eni["SubnetID"],
                _held(cidrs),
                str(used),
                str(len(addresses) - used),
                remark,
            ]
        )
    header = ["ENI", "DEVICE", "TABLE", "SUBNET", "HOLDS", "USED", "COOLING", "REMARK"]
    print_table(header, rows)
    totals = (answer["TotalIPs"], answer["AssignedIPs"], answer["CoolingIPs"])
    print("{} addresses, {} with pods, {} cooling".format(*totals))


def _held(cidrs: dict[str, Any]) -> str:
    prefixes = sum(cidr["IsPrefix"] for cidr in cidrs.values())
    single = len(cidrs) - prefixes
    parts = [f"{single} addresses" if single else "", f"{prefixes} prefixes" if prefixes else ""]
    return ", ".join(filter(None, parts)) or "-"


def _print_pods(answer: Any) -> None:
    rows = [
        [
            f"{row['namespace']}/{row['pod']}",
            row["address"],
            row["eni"] or paint("red", "gone"),
            "-" if row["device"] is None else str(row["device"]),
            "-" if row["table"] is None else str(row["table"]),
        ]
        for row in answer
    ]
    print_table(["POD", "ADDRESS", "ENI", "DEVICE", "TABLE"], rows)


def _print_env(answer: Any) -> None:
    for name, value in sorted(answer.items()):
        print(f"{name}={_plain(value)}")


def _plain(value: Any) -> str:
    """As the environment would spell it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(cast("list[str]", value)) if isinstance(value, list) else str(value)
