"""The eBPF data path by itself, without a lab: beside a bare pair, routing and nftables.

One connection after the other: connect, one byte each way, close. Rounds of all paths alternate, so
that what else the machine does falls on all alike; each row's ratio is against the path it names.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.report import Report
from podwire.datapath.ebpf.pods import EbpfPods, PodLink
from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart as EbpfServices
from podwire.datapath.nftables.services import ServicesPart as NftablesServices
from podwire.kernel import netns
from podwire.net import Protocol, parse_address
from podwire.services import ServiceTable
from tests.kernel.ebpf_world import HOST_MAC, MAC, POD, World
from tests.kernel.test_ebpf_services import VIP, make_port, make_table

ROUNDS, PER_ROUND, POURS, SECONDS = 16, 500, 5, 0.5
MANY = 30_000


class Route(NamedTuple):
    """Where a client is and what it addresses."""

    space: int
    address: str
    port: int = 80


def main() -> int:
    report = Report("ebpf_path", "Connect, request, close; and throughput")
    with contextlib.ExitStack() as closing:
        tool = _tool(closing)
        paths = dict(_paths(closing, tool))
        times: dict[str, list[float]] = {name: [] for name in paths}
        rates: dict[str, list[float]] = {name: [] for name in paths}
        for _ in range(ROUNDS):
            for name, path in paths.items():
                times[name] += _ask(tool, path, PER_ROUND)
        for _ in range(POURS):
            for name, path in paths.items():
                rates[name].append(_pour(tool, path) * 8 / 1e9)
    bare, direct, service = "bare veth pair", "ebpf pod → pod", "ebpf pod → Service"
    report.row(bare, times[bare], "µs")
    report.row("routed, no proxy", times["routed"], "µs", peer=times[bare])
    report.row("nftables pod → Service", times["nftables"], "µs", peer=times[bare])
    report.row(direct, times[direct], "µs", peer=times[bare], ratio_at_most=1.05)
    report.row(service, times[service], "µs", peer=times[direct], ratio_at_most=1.08)
    many = f"{service}, {MANY:,} Services"
    report.row(many, times["many"], "µs", peer=times[service], ratio_at_most=1.05)
    guarded = "ebpf pod → pod, policies on"
    report.row(guarded, times["guarded"], "µs", peer=times[bare])
    for name in ("routed", "nftables", direct, service):
        goal = {"ratio_at_least": 0.95} if name.startswith("ebpf") else {}
        report.row(f"{name}: throughput", rates[name], "Gbit/s", peer=rates[bare], **goal)
    return report.finish()


def _paths(closing: contextlib.ExitStack, tool: str) -> Iterator[tuple[str, Route]]:
    ends = [netns.create(), netns.create()]
    for fd in ends:
        closing.callback(os.close, fd)
    _ip(
        ends[0],
        f"link add e0 type veth peer name e0 netns /proc/{os.getpid()}/fd/{ends[1]}",
        "link set e0 up",
        "addr add 10.9.0.1/24 dev e0",
    )
    _ip(ends[1], "link set e0 up", "addr add 10.9.0.2/24 dev e0")
    _serve(closing, tool, ends[1], "10.9.0.2")
    yield "bare veth pair", Route(ends[0], "10.9.0.2")

    plain = _world(closing, tool)
    yield "routed", Route(plain.spaces["pod1"], POD[2][4])

    nft = _world(closing, tool)
    table = _table(1)
    netfilter = NftablesServices(table.settings.config, nft.spaces["node"])
    closing.callback(netfilter.close)
    netfilter.start()
    netfilter.apply(table)
    yield "nftables", Route(nft.spaces["pod1"], VIP[4])

    first = _world(closing, tool)
    _ebpf(closing, first, table)
    yield "ebpf pod → pod", Route(first.spaces["pod1"], POD[2][4])
    yield "ebpf pod → Service", Route(first.spaces["pod1"], VIP[4])

    second = _world(closing, tool)
    _ebpf(closing, second, _table(MANY))
    yield "many", Route(second.spaces["pod1"], VIP[4], MANY // 2)

    third = _world(closing, tool)
    programs = _ebpf(closing, third, table)
    PolicyPart(programs=programs).start()
    yield "guarded", Route(third.spaces["pod1"], POD[2][4])


def _table(count: int) -> ServiceTable:
    numbers = [80] if count == 1 else range(1, count + 1)
    both = {"family": 4, "protocol": Protocol.TCP, "external": False}
    return make_table([make_port(f"s{n}", n, [POD[2][4]], **both) for n in numbers])


def _world(closing: contextlib.ExitStack, tool: str) -> World:
    world = closing.enter_context(World())
    _serve(closing, tool, world.spaces["pod2"], POD[2][4])
    return world


def _ebpf(closing: contextlib.ExitStack, world: World, table: ServiceTable) -> Programs:
    programs = Programs(world.name, world.spaces["node"])
    closing.callback(programs.close)
    pods, services = EbpfPods(programs), EbpfServices(programs=programs)
    pods.start()
    services.start()
    pods.replace(
        PodLink(
            world.ifindex(f"pod{n}"),
            *(bytes.fromhex(m[n].replace(":", "")) for m in (HOST_MAC, MAC)),
            tuple(parse_address(text) for text in POD[n].values()),
        )
        for n in (1, 2)
    )
    services.apply(table)
    return programs


def _tool(closing: contextlib.ExitStack) -> str:
    folder = closing.enter_context(tempfile.TemporaryDirectory())
    tool = f"{folder}/crr"
    source = Path(__file__).with_name("crr.c")
    subprocess.run(["gcc", "-O2", "-o", tool, str(source)], check=True, timeout=60)
    return tool


def _ip(space: int, *lines: str) -> None:
    batch = "\n".join(("link set lo up", *lines))
    netns.run(space, ["ip", "-batch", "-"], stdin=batch).check_returncode()


def _serve(closing: contextlib.ExitStack, tool: str, space: int, address: str) -> None:
    with netns.entered(space):
        server = subprocess.Popen([tool, "serve", address, "80"], stdout=subprocess.PIPE)
    closing.callback(server.wait)
    closing.callback(server.kill)
    assert server.stdout is not None
    server.stdout.readline()


def _ask(tool: str, path: Route, count: int) -> list[float]:
    done = netns.run(path.space, [tool, "ask", path.address, str(path.port), str(count)])
    done.check_returncode()
    return [int(line) / 1000 for line in done.stdout.split()]


def _pour(tool: str, path: Route) -> float:
    done = netns.run(path.space, [tool, "pour", path.address, str(path.port), str(SECONDS)])
    done.check_returncode()
    return float(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
