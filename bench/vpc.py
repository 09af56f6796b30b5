"""VPC mode: a burst of pods on a new node beside the original's algorithm, and ADD with a warm
address beside ptp + host-local: `python -m bench.vpc`.

The burst runs in virtual time on the same fake EC2 (200 ms for each request, two seconds until an
attached ENI is there), so the figures are exact and the same on every machine. Requests are counted
until the last pod has its address, and in all, five minutes later.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.report import Report
from bench.vpc_original import Original
from podwire.cni.assembly import assemble, restored_pool
from podwire.cni.plan import NodeConfig
from podwire.cni.server import CniServer
from podwire.ipam.vpc.ec2 import Ec2
from podwire.ipam.vpc.limits import InstanceLimits, known_limits
from podwire.ipam.vpc.manager import Manager
from podwire.ipam.vpc.settings import Settings
from podwire.ipam.vpc.threads import POOL, VpcPool
from podwire.kernel import netns
from podwire.lab.cloud.local import LocalEc2, LocalImds, LocalNetwork
from podwire.lab.cloud.model import Model
from podwire.lab.cloud.server import Cloud
from podwire.lab.virtual_time import run
from podwire.wiring import Key
from podwire.wiring.routed import RoutedWiring
from tests.conformance.cni_node import Namespace, Node

EC2_S, ATTACH_S = 0.2, 2.0
QUIET_S = 300.0
PEER = Path("/usr/lib/cni")
BURSTS = ((30, "m5.xlarge"), (100, "m5.4xlarge"))
TARGETS = (
    ("WARM_IP_TARGET=5", Settings(warm_ip_target=5)),
    ("WARM_ENI_TARGET=1", Settings(warm_eni_target=1)),
)


@dataclass(frozen=True)
class Outcome:
    """`over` is what is held beyond the pods when all is quiet."""

    seconds: float
    calls: int
    calls_in_all: int
    over: int


def _cloud(instance_type: str) -> tuple[Cloud, str]:
    """A VPC with one new instance, in the running loop's time."""
    cloud = Cloud(Model(clock=asyncio.get_running_loop().time))
    cloud.model.attach_delay_s, cloud.faults.latency_s = ATTACH_S, EC2_S
    subnet = cloud.model.add_subnet(cloud.model.add_vpc(["10.0.0.0/16"]), "10.0.0.0/20")
    return cloud, cloud.model.run_instance(instance_type, subnet).id


def _limits(instance_type: str) -> InstanceLimits:
    limits = known_limits(instance_type)
    assert limits is not None
    return limits


async def ours(pods: int, instance_type: str, settings: Settings) -> Outcome:
    cloud, instance = _cloud(instance_type)
    clock = asyncio.get_running_loop().time
    manager: Manager[int] = Manager(
        Ec2(LocalEc2(cloud)),
        LocalImds(cloud, instance),
        LocalNetwork(cloud),
        settings,
        clock=clock,
        wall=clock,
    )
    began = clock()
    await manager.start()
    await asyncio.gather(*(manager.assign(pod, 600) for pod in range(pods)))
    seconds, calls = clock() - began, len(cloud.calls)
    await asyncio.sleep(QUIET_S)
    over = manager.store.stats().total - pods
    await manager.close()
    return Outcome(seconds, calls, len(cloud.calls), over)


async def original(pods: int, instance_type: str, settings: Settings) -> Outcome:
    cloud, instance = _cloud(instance_type)
    clock = asyncio.get_running_loop().time
    limits = _limits(instance_type)
    pool = Original(LocalEc2(cloud), LocalImds(cloud, instance), settings, limits, pods)
    began = clock()
    # DescribeNetworkInterfaces at its start too (nodeInit), as ours.
    await LocalEc2(cloud)("DescribeNetworkInterfaces", {})
    task = asyncio.create_task(pool.run())
    while pool.served_at is None:  # noqa: ASYNC110  virtual time
        await asyncio.sleep(0.05)
    seconds, calls = pool.served_at - began, len(cloud.calls)
    await asyncio.sleep(QUIET_S)
    task.cancel()
    return Outcome(seconds, calls, len(cloud.calls), pool.total - pods)


def allowed_over(pods: int, instance_type: str, settings: Settings) -> int:
    """What the target asks to hold beyond the pods: whole ENIs where it counts in ENIs."""
    if settings.ip_targets:
        return settings.warm_ip_target or 0
    slots = _limits(instance_type).slots_per_eni
    return -(-(pods + slots * settings.warm_eni_target) // slots) * slots - pods


def bursts(report: Report) -> None:
    for pods, instance_type in BURSTS:
        for name, settings in TARGETS:
            mine = run(ours(pods, instance_type, settings))
            theirs = run(original(pods, instance_type, settings))
            what = f"{pods} pods, {instance_type}, {name}"
            report.row(
                f"{what}: last address",
                [mine.seconds],
                "s",
                peer=[theirs.seconds],
                ratio_at_most=0.4,
            )
            report.row(
                f"{what}: requests until then",
                [mine.calls],
                "",
                peer=[theirs.calls],
                ratio_at_most=0.5,
            )
            report.row(
                f"{what}: requests in all", [mine.calls_in_all], "", peer=[theirs.calls_in_all]
            )
            allowed = allowed_over(pods, instance_type, settings)
            report.row(
                f"{what}: addresses over need", [mine.over], "", peer=[theirs.over], at_most=allowed
            )


class VpcNode(Node):
    """The real server with the address manager, and routed links, in a namespace."""

    def _child(self, write: int) -> None:
        status = 1
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            netns.enter(self.namespace.fd)
            server = CniServer(self.folder / "run", self._assemble())
            server.start()
            os.write(write, b"+")
            signal.sigwait({signal.SIGTERM})
            status = 0
        except BaseException:
            with contextlib.suppress(OSError):
                os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(status)

    def _assemble(self):
        state = self.state()
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()

        async def begin() -> VpcPool:
            cloud, instance = _cloud("c5n.18xlarge")
            cloud.model.attach_delay_s = cloud.faults.latency_s = 0.0
            manager: Manager[Key] = Manager(
                Ec2(LocalEc2(cloud)),
                LocalImds(cloud, instance),
                LocalNetwork(cloud),
                Settings(warm_eni_target=2),
                clock=time.monotonic,
            )
            await manager.start()
            while manager.store.stats().total < 90:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            return VpcPool(manager, loop, restored_pool(state), 20)

        pool = asyncio.run_coroutine_threadsafe(begin(), loop).result(20)
        return assemble(state, node=self._config, pool=pool, wirings={"routed": RoutedWiring()})


def warm_add(report: Report, count: int) -> None:
    """ADD with an address that is there, by the shim, in turns with ptp + host-local."""
    config = json.dumps({"cniVersion": "1.0.0", "name": "bench", "type": "podwire"})
    node = VpcNode(lambda: NodeConfig(wiring="routed", pool=POOL))
    peer_at = Namespace("peer")
    times: tuple[list[float], list[float]] = ([], [])
    with TemporaryDirectory(prefix="pwt-vpc-") as data, contextlib.ExitStack() as ends:
        ends.callback(peer_at.close)
        ends.callback(node.close)
        peer_config = json.dumps(
            {
                "cniVersion": "1.0.0",
                "name": "bench",
                "type": "ptp",
                "ipam": {
                    "type": "host-local",
                    "dataDir": data,
                    "ranges": [[{"subnet": "10.56.0.0/16"}]],
                },
            }
        )
        peer_at.run("ip", "link", "set", "lo", "up")
        node.start()
        for turn in range(count + 2):
            with contextlib.ExitStack() as pods:
                first, second = Namespace("a"), Namespace("b")
                pods.callback(first.close)
                pods.callback(second.close)
                began = time.perf_counter()
                _check(node.call("podwire", _env(first, node.plugins, turn), config))
                between = time.perf_counter()
                _check(_peer(peer_at, second, peer_config, turn))
                ended = time.perf_counter()
            if turn >= 2:
                times[0].append((between - began) * 1e3)
                times[1].append((ended - between) * 1e3)
    report.row(
        "ADD with a warm address, beside ptp + host-local",
        times[0],
        "ms",
        peer=times[1],
        ratio_at_most=0.5,
    )


def _env(pod: Namespace, plugins: Path, turn: int) -> dict[str, str]:
    return {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": f"{pod.name}-{turn}",
        "CNI_NETNS": pod.path,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(plugins),
        "PATH": os.environ.get("PATH", ""),
    }


def _peer(node: Namespace, pod: Namespace, config: str, turn: int):
    environment = _env(pod, PEER, turn)
    return netns.call(
        node.fd,
        lambda: subprocess.run(
            [PEER / "ptp"],
            input=config,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ),
    )


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise RuntimeError(f"{done.stdout} {done.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.vpc")
    parser.add_argument("--adds", type=int, default=60, help="ADDs with a warm address")
    arguments = parser.parse_args()
    report = Report("vpc", "VPC mode beside the AWS VPC CNI's algorithm and ptp + host-local")
    bursts(report)
    if os.geteuid() == 0 and (PEER / "ptp").exists():
        warm_add(report, arguments.adds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
