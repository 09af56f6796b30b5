"""`podwire status`: what runs, what is programmed, what was set aside and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any, cast

from podwire.agent.control import ask
from podwire.cli import agents
from podwire.cli.paint import paint, table
from podwire.errors import ApiError


def configure(parser: argparse.ArgumentParser) -> None:
    agents.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """0 when every agent asked is healthy, 1 otherwise."""
    answers: dict[str, Any] = {}
    failed = False
    for run_dir in agents.run_dirs(args):
        try:
            answers[str(run_dir)] = ask(run_dir / "agent.sock", "/v1/status")
        except ApiError as error:
            answers[str(run_dir)] = {"error": str(error)}
            failed = True
    if args.json:
        json.dump(answers, sys.stdout, indent=2)
        print()
    else:
        for answer in answers.values():
            _print(answer)
    return 1 if failed or any(a.get("healthy") is False for a in answers.values()) else 0


def _print(answer: dict[str, Any]) -> None:
    if "error" in answer:
        print(paint("red", answer["error"]))
        return
    healthy = answer["healthy"]
    state = paint("green", "healthy") if healthy else paint("red", "unhealthy")
    print(f"{paint('bold', 'node ' + answer['node'])}  {state}  podwire {answer['version']}"
          f"  up {answer['uptime_s']:.0f} s")  # fmt: skip
    for reason in answer["reasons"]:
        print(f"  {paint('red', '!')} {reason}")
    print(f"  {answer['summary']}")
    rows = [
        [name, str(part["revision"]), f"{part['last_sync_ms']:.1f} ms", str(part["failures"]),
         ", ".join(_counts(part["kernel"]))]
        for name, part in answer["parts"].items()
    ]  # fmt: skip
    _indent(table(["PART", "SYNCS", "LAST", "FAILED", "IN THE KERNEL"], rows))
    aside = [
        [name, reason]
        for part in answer["parts"].values()
        for name, reason in part["problems"].items()
    ] + [[entry["object"], entry["reason"]] for entry in answer["set_aside"]]
    if aside:
        print(f"  {paint('yellow', 'set aside')}")
        _indent(table(["OBJECT", "WHY"], aside))
    drifted = [r for r in answer["machine"] if r["value"] != r["wanted"] or r["restored"]]
    if drifted:
        _indent(table(["SYSCTL", "WANTED", "VALUE", "RESTORED", "WHY"],
                      [[r["sysctl"], r["wanted"], str(r["value"]), str(r["restored"]), r["why"]]
                       for r in drifted]))  # fmt: skip
    print()


def _counts(kernel: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in kernel.items():
        if isinstance(value, dict):
            yield from _counts(cast("dict[str, Any]", value), f"{name} ")
        elif isinstance(value, str) or value:
            yield f"{prefix}{name} {value}"


def _indent(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"  {line}")
