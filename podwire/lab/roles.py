"""What the lab's processes run, and what they share: the way into the API."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from podwire.agent import logs, start
from podwire.agent.options import Options
from podwire.kernel import netns
from podwire.kube.objects import Json
from podwire.lab import topology
from podwire.lab.api.manifests import apply_all
from podwire.lab.api.server import ApiConfig, ApiServer
from podwire.lab.cloud import network
from podwire.lab.controllers import ControllerConfig, ControllerManager
from podwire.lab.runtime.main import Runtime
from podwire.lab.runtime.objects import DNS_IMAGE
from podwire.lab.state import LabDir, Record

API_PORT = 6443
DNS_ADDRESS = ("10.96.0.10", "fd00:10:96::a")


@dataclass(frozen=True)
class ApiAccess:
    """The API server before it serves, and its sockets: on the underlay and on loopback."""

    server: ApiServer
    sockets: tuple[socket.socket, ...]


def prepare_access(lab: LabDir, record: Record) -> ApiAccess:
    """Open the API's sockets and write the kubeconfigs: nobody has to wait for the server."""
    addresses = [topology.ROUTER[family] for family in topology.families(record.dual_stack)]
    server = ApiServer(
        ApiConfig(
            service_cidrs=[
                topology.SERVICE_RANGE[family] for family in topology.families(record.dual_stack)
            ],
            hosts=("127.0.0.1", "localhost", "kubernetes.default.svc", *addresses),
        )
    )
    apply_all(server.registry, _dns_objects(record.dual_stack))
    underlay = netns.open_path(lab.netns("underlay"))
    with netns.entered(underlay):
        os.close(underlay)
        inner = [socket.create_server((a, API_PORT), family=_family(a)) for a in addresses]
    outer = socket.create_server(("127.0.0.1", 0))
    record.api = {"address": "127.0.0.1", "port": outer.getsockname()[1]}
    here = f"https://127.0.0.1:{record.api['port']}"
    _secret(lab.kubeconfig, server.kubeconfig(here, f"podwire-{lab.name}"))
    _secret(_node_kubeconfig(lab), server.kubeconfig(f"https://{addresses[0]}:{API_PORT}"))
    return ApiAccess(server, (*inner, outer))


def _dns_objects(dual_stack: bool) -> list[Json]:
    """The cluster's DNS: the Service at its usual address, and a pod behind it."""
    labels = {"k8s-app": "kube-dns"}
    meta = {"namespace": "kube-system", "labels": labels}
    ports = [("dns", "UDP"), ("dns-tcp", "TCP")]
    addresses = [DNS_ADDRESS[family] for family in topology.families(dual_stack)]
    container = {
        "name": "dns",
        "image": DNS_IMAGE,
        "ports": [{"name": n, "containerPort": 53, "protocol": p} for n, p in ports],
    }
    service = {
        "clusterIP": addresses[0],
        "clusterIPs": addresses,
        "ipFamilyPolicy": "RequireDualStack" if dual_stack else "SingleStack",
        "selector": labels,
        "ports": [{"name": n, "port": 53, "protocol": p, "targetPort": 53} for n, p in ports],
    }
    deployment = {
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
    }
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns", **meta},
         "spec": service},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "coredns", **meta},
         "spec": deployment},
    ]  # fmt: skip


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _node_kubeconfig(lab: LabDir) -> Path:
    """For the agents: the API server's address on the underlay."""
    return lab.path / "node.kubeconfig"


def _secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def api_main(record: Record, access: ApiAccess) -> None:
    """The API server and the controllers."""
    logs.setup(record.settings["log_level"])
    # the heap is JSON that lives long and has no cycles: looking for them took half of the time
    gc.set_threshold(100_000, 50, 100)
    families = topology.families(record.dual_stack)
    config = ControllerConfig(
        [topology.POD_RANGE[family] for family in families],
        [topology.LOAD_BALANCER_RANGE[family] for family in families],
    )

    async def serve() -> None:
        controllers = ControllerManager(access.server.registry, config)
        controllers.start()
        await access.server.start(access.sockets)
        await asyncio.Event().wait()

    asyncio.run(serve())


def runtime_main(lab: LabDir, record: Record) -> None:
    """All kubelets."""
    logs.setup(record.settings["log_level"])

    async def serve() -> None:
        await Runtime(lab).run()

    asyncio.run(serve())


def _vpc_environment(ipv6: bool) -> dict[str, str]:
    """What an agent in the lab's cloud is told: where EC2 is. Targets come from the caller's."""
    found = {"AWS_ENDPOINT_URL_EC2": f"http://{network.EC2}"}
    if ipv6:
        found |= {"ENABLE_IPv6": "true", "ENABLE_PREFIX_DELEGATION": "true"}
    return found


def agent_main(lab: LabDir, record: Record, node: str) -> None:
    """The agent, told what its DaemonSet would tell it; this process is on the node already."""
    settings = record.settings
    logs.setup(settings["log_level"])
    if settings["wiring"] == "vpc":
        os.environ.update(_vpc_environment(record.dual_stack))
    options = Options(
        node_name=node,
        kubeconfig=str(_node_kubeconfig(lab)),
        run_dir=lab.run_dir(node),
        state_dir=lab.node(node) / "state",
        cni_conf_dir=lab.node(node) / "cni" / "net.d",
        wiring=settings["wiring"],
        routing=settings["routing"],
        datapath=settings["datapath"],
        log_level=settings["log_level"],
    )
    sys.exit(start.run(replace(options, **settings["agent"]).checked()))
