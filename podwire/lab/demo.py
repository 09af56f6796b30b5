"""`make demo`: a cluster at work, with a proof for every kind of traffic.

Exit status 1 when a proof fails.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from podwire.errors import PodwireError
from podwire.lab import manifests, proofs, reach, topology
from podwire.lab.cluster import Lab
from podwire.lab.proofs import Proof, Shop
from podwire.terminal import align, clear, live, pad, paint, progress

MANIFEST = Path(__file__).with_name("demo.yaml")


def main() -> int:
    """Both rounds; the exit status."""
    try:
        results = [*direct_round(), *vxlan_round()]
    except PodwireError as error:
        clear()
        print(paint("red", f"demo: {error}"))
        return 1
    failed = [proof for proof in results if not proof.holds]
    heading("Result")
    if failed:
        print(paint("red", f"  {len(failed)} of {len(results)} proofs failed"))
    else:
        print(paint("green", f"  all {len(results)} proofs hold"))
        print("  next: .venv/bin/podwire lab up -f your-manifests/  leaves a lab running")
    return 1 if failed else 0


def heading(text: str, more: str = "") -> None:
    print(f"\n{paint('bold', text)}  {paint('dim', more) if more else ''}".rstrip(), flush=True)


def direct_round() -> list[Proof]:
    """Two nodes with direct routes, IPv4 and IPv6: everything."""
    lab = bring_up("demo", dual_stack=True)
    try:
        shop = Shop(lab)
        heading("Topology", "every box is a network namespace")
        for line in draw(lab, shop):
            print(line)
        heading("Traffic", "real requests: who answered, and which source it saw")
        results = show(proofs.prove(shop))
        heading("Reachability", "rows ask columns, each by a real connection")
        for line in reach.measure(lab, proofs.NAMESPACE).render():
            print(f"  {line}".rstrip())
        return results
    finally:
        take_down(lab)


def vxlan_round() -> list[Proof]:
    """The same shop over an overlay."""
    lab = bring_up("demo-vxlan", routing="vxlan")
    try:
        shop = Shop(lab)
        heading("Overlay", "pods of two nodes, the underlay sees only VXLAN")
        before = tunnelled(lab)
        results = show(proofs.pod_to_pod(shop))
        results += show(proofs.to_services(shop))
        carried = tunnelled(lab) - before
        results += show(iter([tunnel_proof(carried)]))
        return results
    finally:
        take_down(lab)


def tunnel_proof(carried: int) -> Proof:
    return Proof(
        "VXLAN carried them", "packets out of node1's tunnel", str(carried), "", carried > 0
    )


def tunnelled(lab: Lab) -> int:
    """Packets that node1 has sent through its VXLAN device."""
    shown = lab.run("node/node1", "cat /proc/net/dev").stdout
    for line in shown.splitlines():
        name, _, counters = line.partition(":")
        if "vxlan" in name:
            return int(counters.split()[9])
    return 0


def bring_up(name: str, **options: Any) -> Lab:
    """A lab with the shop in it; named after this process, so that demos do not meet."""
    began = time.monotonic()
    words = ", ".join(
        key.replace("_", "-") if value is True else str(value) for key, value in options.items()
    )
    progress(f"making two nodes ({words})")
    lab = Lab.up(f"{name}-{os.getpid()}", **options)
    try:
        lab.wait(progress=lambda state: progress(f"nodes: {state}"))
        nodes_s = time.monotonic() - began
        failed = [r for r in lab.apply(manifests.read([str(MANIFEST)])) if r["verb"] == "failed"]
        if failed:
            raise PodwireError(f"{failed[0]['kind']} {failed[0]['name']}: {failed[0]['error']}")
        lab.wait(progress=lambda state: progress(f"shop: {state}"))
    except BaseException:
        lab.down()
        raise
    clear()
    seconds = time.monotonic() - began
    pods = len(lab.items("/api/v1/pods"))
    heading(
        f"Lab {lab.name}",
        f"({words})  nodes ready after {nodes_s:.2f} s, {pods} pods ready after {seconds:.2f} s",
    )
    return lab


def take_down(lab: Lab) -> None:
    began = time.monotonic()
    lab.down()
    print(paint("dim", f"\n  lab {lab.name} taken away in {time.monotonic() - began:.2f} s"))


def draw(lab: Lab, shop: Shop) -> Iterator[str]:
    """The lab as a tree: world, underlay, nodes, pods."""
    dual = lab.record.dual_stack

    def both(pair: tuple[str, ...]) -> str:
        return paint("cyan", "  ".join(pair[: 2 if dual else 1]))

    yield f"  outside        {both(topology.OUTSIDE)}"
    yield f"  └─ underlay    {both(topology.ROUTER)}"
    nodes = list(lab.record.nodes.values())
    for node in nodes:
        last = node is nodes[-1]
        branch, trunk = ("└─", "  ") if last else ("├─", "│ ")
        cidrs = paint("dim", "pods " + " ".join(node.pod_cidrs))
        name = paint("bold", pad(node.name, 9))
        yield f"     {branch} {name}  {both(node.addresses)}  {cidrs}"
        pods = [p for p in shop.pods if p["spec"]["nodeName"] == node.name]
        rows = [
            [p["metadata"]["name"], both(tuple(e["ip"] for e in p["status"]["podIPs"]))]
            for p in pods
        ]
        for number, row in enumerate(align(rows), 1):
            yield f"     {trunk}   {'└─' if number == len(pods) else '├─'} {row}"


def show(found: Iterator[Proof]) -> list[Proof]:
    """Print proofs as they come."""
    results: list[Proof] = []
    for proof in found:
        results.append(proof)
        if proof.holds:
            mark = paint("green", "✓" if live() else "ok")
        else:
            mark = paint("red", "✗" if live() else "FAILED")
        latency = f"{proof.latency_s * 1000:.1f} ms" if proof.latency_s else ""
        source = f"saw {paint('cyan', proof.source)}" if proof.source else ""
        cells = (
            pad(proof.title, 30),
            pad(paint("dim", proof.asked), 32),
            pad(proof.answered, 21),
            pad(source, 33),
            paint("dim", latency.rjust(8)),
        )
        print(f"  {mark} {' '.join(cells)}".rstrip(), flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
