"""`podwire status`: what runs, what is programmed, what was set aside and why."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, cast

from podwire.agent.control import ask
from podwire.cli import agents
from podwire.cli.output import indented, print_json
from podwire.errors import ApiError
from podwire.terminal import paint, table


def configure(parser: argparse.ArgumentParser) -> None:
    agents.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """0 when every agent asked is healthy, 1 otherwise."""
    answers: dict[str, Any] = {}
    for run_dir in agents.run_dirs(args):
        try:
            answers[str(run_dir)] = ask(run_dir / "agent.sock", "/v1/status")
        except ApiError as error:
            answers[str(run_dir)] = {"error": str(error), "healthy": False}
    if args.json:
        print_json(answers)
    else:
        print("\n\n".join("\n".join(lines(answer)) for answer in answers.values()))
    return 0 if all(answer["healthy"] for answer in answers.values()) else 1


def lines(answer: dict[str, Any]) -> list[str]:
    """One agent's status for people."""
    if "error" in answer:
        return [paint("red", answer["error"])]
    state = paint("green", "healthy") if answer["healthy"] else paint("red", "unhealthy")
    head = f"{paint('bold', 'node ' + answer['node'])}  {state}"
    head += f"  podwire {answer['version']}  up {answer['uptime_s']:.0f} s"
    objects = ", ".join(f"{kind} {count}" for kind, count in answer["objects"].items())
    body = [f"{paint('red', '!')} {reason}" for reason in answer["reasons"]]
    body += [answer["summary"], f"knows {objects}"]
    header = ["PART", "SYNCS", "LAST", "FAILED", "IN THE KERNEL"]
    body += table(header, map(_part, answer["parts"], answer["parts"].values()))
    aside = [
        [name, reason]
        for part in answer["parts"].values()
        for name, reason in part["problems"].items()
    ] + [[entry["object"], entry["reason"]] for entry in answer["set_aside"]]
    if aside:
        body += [paint("yellow", "set aside"), *table(["OBJECT", "WHY"], aside)]
    drifted = [r for r in answer["machine"] if r["value"] != r["wanted"] or r["restored"]]
    if drifted:
        rows = [
            [r["sysctl"], r["wanted"], str(r["value"]), str(r["restored"]), r["why"]]
            for r in drifted
        ]
        body += table(["SYSCTL", "WANTED", "VALUE", "RESTORED", "WHY"], rows)
    return [head, *indented(body)]


def _part(name: str, part: dict[str, Any]) -> list[str]:
    counts = ", ".join(_counts(part["kernel"])) or "-"
    last = f"{part['last_sync_ms']:.1f} ms"
    return [name, str(part["revision"]), last, str(part["failures"]), counts]


def _counts(kernel: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What is not zero, with the names of groups in front."""
    for name, value in kernel.items():
        if isinstance(value, dict):
            yield from _counts(cast("dict[str, Any]", value), f"{prefix}{name} ")
        elif isinstance(value, str) or value:
            yield f"{prefix}{name} {value}"
