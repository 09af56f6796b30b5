"""`podwire conntrack`: the connection table by pod and Service."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from podwire.cli import agents, conntrack_top
from podwire.cli.conntrack_reader import Reader, choose
from podwire.cli.conntrack_top import full_in
from podwire.cli.output import print_json
from podwire.net import format_endpoint, parse_address
from podwire.terminal import paint, table

_FILTERS = (
    "source",
    "pod",
    "service",
    "namespace",
    "address",
    "target",
    "protocol",
    "state",
    "kind",
)


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    status = commands.add_parser("status", help="how full, how fast, what is lost, what it costs")
    ls = commands.add_parser("ls", help="entries with names, original and reply direction")
    top = commands.add_parser("top", help="the largest users, live")
    watch = commands.add_parser("watch", help="entries as they come, change and go")
    advise = commands.add_parser("advise", help="how large the table should be, and how to set it")
    flush = commands.add_parser("flush", help="delete entries; shows first what would go")
    for each in (ls, watch, flush):
        _add_filters(each)
    ls.add_argument("--limit", type=int, default=1000, help="rows at most; 0: all (%(default)s)")
    top.add_argument("--by", choices=conntrack_top.GROUPS, help="(pod; without names: remote)")
    top.add_argument("--once", action="store_true", help="print once, for scripts")
    top.add_argument("--interval", type=float, default=2.0, metavar="S", help="(%(default)s)")
    top.add_argument("--most", type=int, default=100, help="rows of each group (%(default)s)")
    advise.add_argument("--apply", action="store_true", help="set it now (root namespace only)")
    flush.add_argument("--stale", action="store_true", help="UDP entries to what serves no more")
    flush.add_argument("--yes", action="store_true", help="do it")
    for each in (status, ls, top, watch, advise, flush):
        agents.add_options(each)
        each.add_argument("--source", choices=("kernel",), default="",
                          help="the kernel table also where the data path has one")  # fmt: skip
        each.add_argument("--raw", action="store_true", help="no agent: this namespace, no names")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pod", default="", metavar="[NAMESPACE/]NAME", help="opened or answered by this pod")
    add("--service", default="", metavar="[NAMESPACE/]NAME", help="through this Service")
    add("-n", "--namespace", default="", help="of a pod or Service concerned")
    add("--address", default="", help="at either end, before or after translation")
    add("--target", default="", metavar="ADDRESS[:PORT]", help="answered from there")
    add("--protocol", default="", help="TCP, UDP, SCTP, ICMP, ICMPV6")
    add("--state", default="", help="ESTABLISHED, ..., UNREPLIED, REPLIED, ASSURED, OFFLOAD")
    add("--kind", default="", help="pod-pod, service, egress, node, outside")


def _query(args: argparse.Namespace) -> dict[str, str]:
    return {name: found for name in _FILTERS if (found := getattr(args, name, ""))}


def run(args: argparse.Namespace) -> int:
    """0; 1 for `status` of a table that is nearly full, and what could not be done."""
    with choose(args) as reader:
        match args.action:
            case "status":
                return _status(reader, args)
            case "ls":
                query = _query(args) | {"limit": str(args.limit)}
                _print_rows(reader.stream("ls", query), as_json=args.json)
            case "top":
                return _top(reader, args)
            case "watch":
                _print_rows(reader.stream("watch", _query(args)), as_json=args.json)
            case "advise":
                return _advise(reader, args)
            case _:
                return _flush(reader, args)
    return 0


# --- status ---------------------------------------------------------------------------------------


def _status(reader: Reader, args: argparse.Namespace) -> int:
    answer = reader.ask("status", _query(args))
    if args.json:
        print_json(answer)
    else:
        print("\n".join(_status_lines(answer)))
    return 1 if answer["pressure"] else 0


def _status_lines(answer: dict[str, Any]) -> list[str]:
    """The answer for people."""
    colour = "red" if answer["pressure"] else "green"
    lines = [
        f"{paint('bold', answer['source'] + ' table')}  {answer['used']:,} of {answer['limit']:,}"
        f" entries  {paint(colour, str(answer['percent']) + ' %')}  peak {answer['peak']:,}",
        f"growth       {answer['growth_per_s']:+,.1f}/s, {full_in(answer)}  ({answer['method']})",
    ]
    if "buckets" in answer:
        megabytes = answer["memory_bytes"] / 2**20
        full = (answer["memory_full_bytes"] + answer["hash_bytes"]) / 2**20
        lines += [
            f"hash         {answer['buckets']:,} buckets, {answer['chain_length']} entries a chain "
            f"({answer['entries_everywhere']:,} entries in all namespaces)",
            f"memory       {megabytes:,.1f} MB now, {full:,.1f} MB when full "
            f"({answer['entry_bytes']} bytes an entry)",
        ]
    rows = [
        [name, f"{value:,}", _rate(answer["rates"].get(name))]
        for name, value in answer["counters"].items()
    ]
    lines += table(["COUNTER", "TOTAL", "PER SECOND"], rows)
    if answer.get("full_messages"):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(answer["last_full_s"]))
        lines.append(
            paint("red", f"the kernel's log has {answer['full_messages']} × \"table full, "
                         f"dropping packet\", last {when}")
        )  # fmt: skip
    elif answer.get("full_messages_error"):
        lines.append(f"kernel log   {answer['full_messages_error']}")
    lines += table(["TIMEOUTS", "SECONDS"], _timeouts(answer["timeouts"]))
    off = [name for name in ("accounting", "timestamps") if not answer[name]]
    if off:
        lines.append(f"off          {', '.join(off)} (no byte counts, no ages)")
    return lines


def _timeouts(timeouts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A row for each protocol: ``tcp``, ``close 10  established 432000``."""
    protocols: dict[str, list[str]] = {}
    for name, seconds in timeouts.items():
        protocol, _, state = name.partition("_timeout")
        protocols.setdefault(protocol, []).append(f"{state.strip('_') or 'any'} {seconds}")
    for protocol, states in protocols.items():
        yield protocol, "  ".join(states)


def _rate(value: float | None) -> str:
    if not value:
        return "-" if value is None else "0"
    return paint("yellow", f"{value:,.1f}")


# --- ls, watch ------------------------------------------------------------------------------------


def _print_rows(rows: Iterator[dict[str, Any]], *, as_json: bool) -> None:
    for row in rows:
        if not row:
            sys.stdout.flush()
        elif as_json:
            print(json.dumps(row))
        elif "more" in row:
            print(paint("yellow", f"and {row['more']:,} more (--limit 0 shows all)"))
        elif row.get("event") == "LOST":
            print(paint("red", "events were lost; the table follows as EXISTING"))
        else:
            print("  ".join(row_cells(row)))


def row_cells(row: dict[str, Any]) -> list[str]:
    """One entry on one line: what was asked for → who answers, and the address it went out by."""
    original, reply = row["original"], row["reply"]
    ports = row["protocol"] not in ("ICMP", "ICMPV6")
    cells = [f"{row['event']:<8}"] if "event" in row else []
    state = row["state"] or ("" if "SEEN_REPLY" in row["status"] else "UNREPLIED")
    cells += [f"{row['protocol']:<6}", f"{state:<11}", f"{row['kind']:<8}"]
    shown = f"{_end(original, 'source', ports)} → {_end(original, 'destination', ports)}"
    if row["service"]:
        shown += paint("cyan", f" {row['service']}")
    if "DST_NAT" in row["status"]:
        shown += f" ⇒ {_end(reply, 'source', ports)}"
    if "SRC_NAT" in row["status"]:
        shown += f" as {_end(reply, 'destination', ports)}"
    if not ports:
        shown += f" type {original['destination_port'] >> 8} id {original['source_port']}"
    cells.append(shown)
    if row["timeout_s"] is not None:
        cells.append(paint("dim", f"{row['timeout_s']} s"))
    if row["zone"]:
        cells.append(f"zone {row['zone']}")
    if not row.get("tracked", True):
        cells.append(paint("dim", "socket"))
    if row["bytes"]:
        cells.append(f"{row['bytes'][0]:,}/{row['bytes'][1]:,} bytes")
    return cells


def _end(direction: dict[str, Any], which: str, port: bool) -> str:
    address, name = direction[which], direction[f"{which}_name"]
    if port:
        address = format_endpoint(parse_address(address), direction[f"{which}_port"])
    return f"{address} ({name})" if name else address


# --- top, advise, flush ---------------------------------------------------------------------------


def _top(reader: Reader, args: argparse.Namespace) -> int:
    query = _query(args) | {"most": str(args.most)}
    group = args.by or ("pod" if reader.names else "remote")
    if not args.once:
        return conntrack_top.run(lambda: reader.ask("top", query), group, args.interval)
    answer = reader.ask("top", query)
    if args.json:
        print_json(answer)
    else:
        lines = conntrack_top.screen(answer, conntrack_top.View(group), rows=args.most)
        print("\n".join(lines))
    return 0


def _advise(reader: Reader, args: argparse.Namespace) -> int:
    answer = reader.ask("advise", {"apply": "1"} if args.apply else {})
    if args.json:
        print_json(answer)
        return 0
    print("\n".join(_advice_lines(answer)))
    return 0


def _advice_lines(answer: dict[str, Any]) -> list[str]:
    """The rules side by side, and what to type or keep."""
    rows = [
        [rule["name"], f"{rule['limit']:,}", f"{rule['bytes'] / 2**20:,.1f} MB", rule["why"]]
        for rule in answer["rules"]
    ]
    lines = table(["RULE", "ENTRIES", "MEMORY WHEN FULL", "FROM"], rows)
    lines += ["", paint("bold", f"advised: {answer['limit']:,}") + f" ({answer['reason']})"]
    lines += ["", "now:"]
    lines += [f"  sysctl -w {name}={value}" for name, value in answer["sysctls"].items()]
    for file, text in answer["persistent"].items():
        lines += [f"for good, in {file}:", *(f"  {line}" for line in text.splitlines())]
    if answer.get("applied"):
        lines.append(paint("green", "applied"))
    elif answer["refusal"]:
        lines.append(paint("yellow", f"cannot be set from here: {answer['refusal']}"))
    return lines


def _flush(reader: Reader, args: argparse.Namespace) -> int:
    query = _query(args) | ({"stale": "1"} if args.stale else {})
    answer = reader.ask("flush", query | ({"yes": "1"} if args.yes else {}))
    if args.json:
        print_json(answer)
        return 0
    print("\n".join(_flush_lines(answer)))
    return 0


def _flush_lines(answer: dict[str, Any]) -> Iterable[str]:
    if "groups" in answer:
        rows = [[g["service"], g["frontend"], g["backend"], str(g["entries"])]
                for g in answer["groups"]]  # fmt: skip
        yield from table(["SERVICE", "FRONTEND", "ANSWERED BY", "ENTRIES"], rows)
    else:
        for row in answer["sample"]:
            yield "  ".join(row_cells(row))
        if answer["entries"] > len(answer["sample"]):
            yield f"and {answer['entries'] - len(answer['sample']):,} more"
    if answer["deleted"]:
        yield paint("green", f"{answer['entries']:,} entries deleted")
    else:
        yield f"{answer['entries']:,} entries would go" + (
            "; --yes deletes them" if answer["entries"] else ""
        )
