"""ADD and DEL beside Debian's bridge + host-local: `python -m bench.cni`.

Each has a node of its own; they take turns, batch after batch, so that the machine's noise meets
both. A call is what a runtime does: execute the plugin, write the configuration, read the answer.
The peer's bridge plugin executes host-local itself. Neither masquerades; the peer has a default
gateway and hairpin mode as a node's network has, and ours drops spoofed sources besides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.report import Report
from podwire.cni.plan import NodeConfig
from podwire.kernel import netns
from podwire.net import parse_prefix
from tests.conformance.cni_node import Namespace, Node

PEER = Path("/usr/lib/cni")
SUBNET = "10.55.0.0/16"
Call = Callable[[str, Namespace, str], float]
Way = Callable[[Call, list[Namespace], str], tuple[list[float], list[float]]]


class Peer:
    """The reference plugins on a node of their own."""

    def __init__(self) -> None:
        self.namespace = Namespace("peer")
        self.namespace.run("ip", "link", "set", "lo", "up")
        self._data = Path(f"/run/{self.namespace.name}")
        self._config = json.dumps(
            {
                "cniVersion": "1.0.0",
                "name": "bench",
                "type": "bridge",
                "bridge": "cni0",
                "isDefaultGateway": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(self._data),
                    "ranges": [[{"subnet": SUBNET}]],
                },
            }
        )

    def call(self, command: str, pod: Namespace, container: str) -> float:
        environment = _environment(command, pod, container, PEER)
        started = time.perf_counter()
        done = netns.call(
            self.namespace.fd,
            lambda: subprocess.run(
                [PEER / "bridge"],
                input=self._config,
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            ),
        )
        took = time.perf_counter() - started
        _check(done)
        return took

    def close(self) -> None:
        self.namespace.close()
        shutil.rmtree(self._data, ignore_errors=True)


class Ours:
    """The shim and the server, configured as on a node: by the node's defaults."""

    def __init__(self) -> None:
        config = NodeConfig(
            bridge="podwire0", pod_cidrs=(parse_prefix(SUBNET),), hairpin=True, default_gateway=True
        )
        self.node = Node(lambda: config, guarded=True)
        self.node.start()
        self._config = json.dumps({"cniVersion": "1.0.0", "name": "bench", "type": "podwire"})

    def call(self, command: str, pod: Namespace, container: str) -> float:
        environment = _environment(command, pod, container, self.node.plugins)
        started = time.perf_counter()
        done = self.node.call("podwire", environment, self._config)
        took = time.perf_counter() - started
        _check(done)
        return took

    def close(self) -> None:
        self.node.close()


def _environment(command: str, pod: Namespace, container: str, path: Path) -> dict[str, str]:
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": pod.path,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(path),
        "PATH": os.environ.get("PATH", ""),
    }


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise RuntimeError(f"{done.stdout} {done.stderr}")


def _sequential(call: Call, pods: list[Namespace], name: str) -> tuple[list[float], list[float]]:
    added = [call("ADD", pod, f"{name}{i}") for i, pod in enumerate(pods)]
    deleted = [call("DEL", pod, f"{name}{i}") for i, pod in enumerate(pods)]
    return added, deleted


def _at_once(call: Call, pods: list[Namespace], name: str) -> tuple[list[float], list[float]]:
    with ThreadPoolExecutor(len(pods)) as threads:
        numbers = range(len(pods))
        added = list(threads.map(lambda i: call("ADD", pods[i], f"{name}{i}"), numbers))
        deleted = list(threads.map(lambda i: call("DEL", pods[i], f"{name}{i}"), numbers))
    return added, deleted


def _batch(way: Way, call: Call, size: int) -> tuple[list[float], list[float]]:
    """Pods with fresh namespaces that end afterwards, as a runtime has them."""
    pods = [Namespace(f"pod{i}") for i in range(size)]
    try:
        return way(call, pods, f"{pods[0].name}-")
    finally:
        for pod in pods:
            pod.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cni")
    parser.add_argument("--pods", type=int, default=100, help="pods one after the other")
    parser.add_argument("--at-once", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of pods at once")
    arguments = parser.parse_args()
    if not (PEER / "bridge").exists():
        print(f"skipped: no reference plugins in {PEER}")
        return 0

    peer, ours = Peer(), Ours()
    samples: dict[str, tuple[list[float], list[float]]] = {
        f"{verb}, {how}": ([], [])
        for how in ("one by one", f"{arguments.at_once} at once")
        for verb in ("ADD", "DEL")
    }
    try:
        for plugin in (peer.call, ours.call):  # the bridge is there, files are in the cache
            _batch(_sequential, plugin, 3)
        for how, way, size, count in (
            ("one by one", _sequential, 20, arguments.pods // 20),
            (f"{arguments.at_once} at once", _at_once, arguments.at_once, arguments.rounds),
        ):
            for side, plugin in (0, ours.call), (1, peer.call), (1, peer.call), (0, ours.call):
                for _ in range(-(-count // 2)):
                    times = _batch(way, plugin, size)
                    for verb, more in zip(("ADD", "DEL"), times, strict=True):
                        samples[f"{verb}, {how}"][side].extend(more)
    finally:
        ours.close()
        peer.close()
    report = Report("cni", "CNI calls beside Debian's bridge + host-local")
    for label, (mine, theirs) in samples.items():
        report.row(
            label,
            [each * 1e3 for each in mine],
            "ms",
            peer=[each * 1e3 for each in theirs],
            ratio_at_most=0.5,
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
