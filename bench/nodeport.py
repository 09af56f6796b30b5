"""NodePort packets per second forwarded to a backend on another node: XDP, tcx, nftables; with DSR,
every packet gets an option that says which Service it was for.

The sender, the node and the backend share this machine's CPUs, so the figures mean something only
beside each other, in one run. Counted is what arrives at the backend's side of the uplink.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.report import Report
from podwire.datapath.ebpf.balancing import Balancing
from podwire.datapath.ebpf.nodes import NodesPart
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart as EbpfServices
from podwire.datapath.nftables.services import ServicesPart as NftablesServices
from podwire.kernel import netns
from podwire.kernel.bpf import Link, Program
from podwire.net import Protocol, parse_address
from podwire.nodes import RouteTable
from tests.kernel.ebpf_services import make_port, make_table
from tests.kernel.ebpf_world import NODE, UPLINK_MAC, World

BACKEND = "192.168.9.77"
"""On the uplink's network; what arrives for it is counted and then dropped, for nobody has it."""
ROUNDS, SECONDS, FLOWS, PORT = 6, 0.7, 64, 30080


def main() -> int:
    report = Report("nodeport", f"NodePort to another node, {FLOWS} UDP flows")
    with contextlib.ExitStack() as closing:
        tool = _tool(closing)
        worlds = dict(_worlds(closing))
        rates: dict[str, list[float]] = {name: [] for name in worlds}
        for _ in range(ROUNDS):
            for name, world in worlds.items():
                rates[name].append(_rate(tool, world) / 1000)
    report.row("nftables", rates["nftables"], "kpps")
    report.row("tcx", rates["tcx"], "kpps", peer=rates["nftables"], ratio_at_least=1)
    report.row("XDP", rates["XDP"], "kpps", peer=rates["nftables"], ratio_at_least=1)
    # On a veth an skb must be copied into a frame for XDP; on a card there is no skb yet.
    report.row("XDP beside tcx", rates["XDP"], "kpps", peer=rates["tcx"])
    for name in ("tcx", "XDP"):
        report.row(f"{name} DSR", rates[f"{name} DSR"], "kpps", peer=rates[name])
    return report.finish()


def _worlds(closing: contextlib.ExitStack) -> Iterator[tuple[str, World]]:
    port = make_port("far", 80, [BACKEND], family=4, protocol=Protocol.UDP)
    table = make_table([port])
    for name in ("nftables", "tcx", "XDP", "tcx DSR", "XDP DSR"):
        world = closing.enter_context(World())
        world.batch(world.spaces["node"], f"neigh add {BACKEND} lladdr {UPLINK_MAC[1]} dev up0")
        if name == "nftables":
            netfilter = NftablesServices(table.settings.config, world.spaces["node"])
            closing.callback(netfilter.close)
            netfilter.start()
            netfilter.apply(table)
        else:
            programs = Programs(world.name, world.spaces["node"])
            closing.callback(programs.close)
            dsr = "DSR" in name
            programs.enable("services")
            if dsr:
                peer = frozenset({parse_address(BACKEND)})
                nodes = NodesPart(programs, masquerade=False)
                nodes.apply(RouteTable("node", "direct", node_addresses=peer))
            balancing = Balancing(mode="dsr" if dsr else "snat")
            EbpfServices(programs=programs, balancing=balancing).apply(table)
            if "XDP" in name:
                programs.accelerate(world.ifindex("up0"))
                _take_frames(closing, world)
        yield name, world


def _take_frames(closing: contextlib.ExitStack, world: World) -> None:
    """A veth takes frames from its peer's XDP only when it runs XDP itself."""
    program = Program.xdp_pass()

    def attach() -> Link:
        return Link.xdp(program, socket.if_nametoindex("eth0"))

    closing.callback(netns.call(world.spaces["outside"], attach).close)
    program.close()


def _tool(closing: contextlib.ExitStack) -> str:
    folder = closing.enter_context(tempfile.TemporaryDirectory())
    source = Path(__file__).with_name("flood.c")
    subprocess.run(["gcc", "-O2", "-o", f"{folder}/flood", str(source)], check=True, timeout=60)
    return f"{folder}/flood"


def _rate(tool: str, world: World) -> float:
    """Packets per second that came back out to the backend."""
    before = _arrived(world)
    command = [tool, "eth0", UPLINK_MAC[0], "198.51.100.9", NODE[4], str(PORT), str(FLOWS)]
    netns.run(world.spaces["outside"], [*command, str(SECONDS)]).check_returncode()
    return (_arrived(world) - before) / SECONDS


def _arrived(world: World) -> int:
    out = netns.run(world.spaces["outside"], ["cat", "/proc/net/dev"]).stdout
    return next(int(line.split()[2]) for line in out.splitlines() if "eth0:" in line)


if __name__ == "__main__":
    sys.exit(main())
