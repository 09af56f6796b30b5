"""The first packet through a Service, on every data path, beside 10 and 30,000 Services.

    make bench BENCH=first-packet [ARGS="--sizes 10,1000 --datapaths nftables,ebpf"]

A pod sends a datagram from a new port to the last Service of the table, and the pod behind it gets
it: one way, system calls at both ends included. Between veth pairs that happens within the sender's
own call, so that no scheduler has a part in it. All nodes are there at once and take turns, a few
packets each, on one CPU: what else the machine does falls on all alike. Beside them the same packet
without a Service. Writes first-packet.json and first-packet.png into bench/results.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address

from bench.report import RESULTS, Report, summary
from podwire.datapath.ebpf.pods import EbpfPods, PodLink
from podwire.datapath.ebpf.programs import OBJECTS, Programs
from podwire.datapath.ebpf.services import ServicesPart as EbpfServices
from podwire.datapath.iptables.services import ServicesPart as IptablesServices
from podwire.datapath.nftables.services import ServicesPart as NftablesServices
from podwire.errors import KernelError
from podwire.kernel import netns
from podwire.kernel.bpf import features
from podwire.kernel.iptables import FLAVOURS, installed
from podwire.net import Protocol, parse_address, parse_prefix
from podwire.services import (
    DetectLocal,
    Frontend,
    FrontendKind,
    NodeFacts,
    ProxyConfig,
    ServicePort,
    ServicePortName,
    ServiceTable,
    backend,
)
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_world import HOST_MAC, MAC, NODE, POD, World
from tests.service_objects import service_table

SIZES = (10, 1_000, 10_000, 30_000)
ROUNDS, PER_ROUND = 100, 50
BACKEND_PORTS = (8081, 8082)
_FIRST_VIP = int(ip_address("10.96.0.1"))
_ELSEWHERE = int(ip_address("10.128.0.1"))


class Place:
    """A client pod, what it addresses, and the pod that gets it; the samples in µs."""

    def __init__(self, world: World, closing: contextlib.ExitStack, address: str, port: int):
        self.samples: list[float] = []
        self._address, self._port = address, port
        self._client = netns.socket(
            world.spaces["pod1"], socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW
        )
        self._server = netns.socket(
            world.spaces["pod2"], socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP
        )
        # Not a timeout of Python's, which would poll before every call.
        second = struct.pack("ll", 1, 0)
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, second)
        for each in (self._client, self._server):
            closing.callback(each.close)
        self._source_port = 10_000

    def measure(self, count: int) -> None:
        """So many first packets, each of a connection of its own."""
        first = self._source_port
        self._source_port += count
        wire = [
            packets.first(POD[1][4], self._address, Protocol.UDP, (port, self._port), port)
            for port in range(first, self._source_port)
        ]
        to = (self._address, 0)
        send, receive, clock = self._client.sendto, self._server.recv, time.perf_counter_ns
        for packet in wire:
            began = clock()
            send(packet, to)
            receive(2048)
            self.samples.append((clock() - began) / 1000)


def table(services: int) -> ServiceTable:
    """ClusterIPs with two endpoints each; those of the last are two ports of the server pod."""
    here = [backend(parse_address(POD[2][4]), port) for port in BACKEND_PORTS]
    ports = [
        ServicePort(
            name=ServicePortName("default", f"s{number}", "", Protocol.UDP, 4),
            frontends=(Frontend(FrontendKind.CLUSTER_IP, _packed(_FIRST_VIP + number), 80),),
            cluster=tuple(here)
            if number == services - 1
            else tuple(backend(_packed(_ELSEWHERE + 2 * number + i), 8080) for i in (0, 1)),
            has_endpoints=True,
        )
        for number in range(services)
    ]
    config = ProxyConfig(
        detect_local=DetectLocal(prefixes=(parse_prefix("10.244.0.0/24"),)),
        service_cidrs=(parse_prefix("10.96.0.0/16"),),
    )
    node = NodeFacts("node", (parse_address(NODE[4]),))
    return service_table(ports, node, config)


def _packed(number: int) -> bytes:
    return number.to_bytes(4, "big")


def place(closing: contextlib.ExitStack, datapath: str, services: int) -> Place:
    """A node with that many Services. Raises KernelError where they cannot be written in time."""
    world = closing.enter_context(World())
    for port in BACKEND_PORTS:
        listener = netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_DGRAM)
        listener.bind((POD[2][4], port))
        closing.callback(listener.close)
    if datapath == "direct":
        return Place(world, closing, POD[2][4], BACKEND_PORTS[0])
    wanted = table(services)
    part = _part(closing, world, datapath, wanted.settings.config)
    part.start()
    part.apply(wanted)
    vip = str(ip_address(_FIRST_VIP + services - 1))
    return Place(world, closing, vip, 80)


def _part(
    closing: contextlib.ExitStack, world: World, datapath: str, config: ProxyConfig
) -> NftablesServices | IptablesServices | EbpfServices:
    node = world.spaces["node"]
    if datapath == "nftables":
        part = NftablesServices(config, node)
        closing.callback(part.close)
        return part
    if datapath.startswith("iptables-"):
        return IptablesServices(config, node, "legacy" if "legacy" in datapath else "nft")
    programs = Programs(world.name, node)
    closing.callback(programs.close)
    pods = EbpfPods(programs)
    pods.start()
    pods.replace(
        PodLink(
            world.ifindex(f"pod{n}"),
            *(bytes.fromhex(mac[n].replace(":", "")) for mac in (HOST_MAC, MAC)),
            tuple(map(parse_address, POD[n].values())),
        )
        for n in (1, 2)
    )
    return EbpfServices(config, programs=programs)


def available() -> Iterator[str]:
    """The data paths of this machine."""
    yield "nftables"
    yield from (f"iptables-{flavour}" for flavour in FLAVOURS if installed(flavour))
    if not features.missing() and list(OBJECTS.glob("*.bpf.o")):
        yield "ebpf"


def measure(closing: contextlib.ExitStack, datapaths: list[str], sizes: list[int], report: Report
            ) -> dict[tuple[str, int], list[float]]:  # fmt: skip
    """Samples in µs by data path and number of Services."""
    places = {("direct", 0): place(closing, "direct", 0)}
    for datapath in datapaths:
        for size in sizes:
            began = time.perf_counter()
            try:
                places[datapath, size] = place(closing, datapath, size)
            except KernelError as error:
                print(f"{datapath} {size:,}: not possible here: {error}", file=sys.stderr)
                continue
            took = time.perf_counter() - began
            report.row(f"{datapath} {size:,} Services: node set up and rules written", [took], "s")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for each in places.values():
        each.measure(PER_ROUND)  # caches are filled, neighbours known
        each.samples.clear()
    gc.disable()
    for _ in range(ROUNDS):
        for each in places.values():
            each.measure(PER_ROUND)
    return {key: each.samples for key, each in places.items()}


def plot(samples: dict[tuple[str, int], list[float]], file: str) -> None:
    """p50 and p99 of every data path over the number of Services."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    direct = summary(samples["direct", 0])["p50"]
    axes.axhline(direct, color="#888888", linewidth=1, linestyle=":")
    axes.annotate("no Service, p50", (SIZES[0], direct), (0, -11), textcoords="offset points",
                  fontsize=8, color="#666666")  # fmt: skip
    colours = ("#0b6e99", "#c8553d", "#e0a030", "#3a7d44")
    names = dict.fromkeys(name for name, _ in samples if name != "direct")
    for name, colour in zip(names, colours, strict=False):
        points = sorted((size, summary(some)) for (n, size), some in samples.items() if n == name)
        sizes = [size for size, _ in points]
        axes.plot(sizes, [s["p50"] for _, s in points], "o-", color=colour, label=f"{name}, p50")
        axes.plot(sizes, [s["p99"] for _, s in points], "o--", color=colour, alpha=0.55,
                  markersize=4, label=f"{name}, p99")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Services")
    axes.set_ylabel("first packet, one way (µs)")
    axes.set_title("First packet to the last Service")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=2, frameon=False)
    figure.savefig(file, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--datapaths", default=",".join(available()))
    args = parser.parse_args()
    report = Report("first-packet", "First packet through the last Service, one way")
    datapaths, sizes = args.datapaths.split(","), [int(text) for text in args.sizes.split(",")]
    with contextlib.ExitStack() as closing:
        samples = measure(closing, datapaths, sizes, report)
    report.row("no Service", samples["direct", 0], "µs")
    for (datapath, size), some in samples.items():
        smallest = samples.get((datapath, sizes[0])) if size != sizes[0] else None
        goal = 1.1 if datapath == "nftables" and smallest else None
        if datapath != "direct":
            report.row(f"{datapath} {size:,} Services", some, "µs", peer=smallest,
                       ratio_at_most=goal)  # fmt: skip
    plot(samples, str(RESULTS / "first-packet.png"))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
