"""A small stage for policies with real packets: one or two nodes, pods, one data path per node."""

from __future__ import annotations

import socket
import time
from typing import Any

import msgspec

from podwire.datapath.nftables.policy import PolicyPart
from podwire.kernel import netns
from podwire.kube.objects import Namespace, NetworkPolicy, Node, Pod
from podwire.kube.store import Store
from podwire.net import format_address, parse_address
from podwire.policy import Attachment, PolicyCompiler, PolicyTable
from tests.conformance.netpol_fabric import BRIDGE, Fabric
from tests.conformance.netpol_world import World

NODES = {"n1": ["192.0.2.11", "2001:db8::11"], "n2": ["192.0.2.12", "2001:db8::12"]}


class Play:
    """Objects as they would be in the API, and the kernel after `play`."""

    def __init__(self) -> None:
        self.fabric = Fabric()
        world = World()
        world.nodes = NODES
        self.fabric.sync(world)
        self.store = Store()
        self.compilers = {name: PolicyCompiler(name) for name in NODES}
        self.parts: dict[str, PolicyPart] = {}
        self.tables: dict[str, PolicyTable] = {}
        for name, ips in NODES.items():
            part = self.parts[name] = PolicyPart(self.fabric.nodes[name].fd, BRIDGE)
            part.start()
            addresses = [{"type": "InternalIP", "address": ip} for ip in ips]
            self._put(Node, {"metadata": {"name": name}, "status": {"addresses": addresses}})
        for name in "xy":
            self._put(Namespace, {"metadata": {"name": name, "labels": {"ns": name}}})

    def close(self) -> None:
        for part in self.parts.values():
            part.close()
        self.fabric.close()

    def _put(self, kind: Any, source: dict[str, Any]) -> None:
        self.store.put(msgspec.convert(source, kind))

    def policy(self, name: str, spec: dict[str, Any], **metadata: Any) -> None:
        namespace, _, short = name.partition("/")
        metadata |= {"namespace": namespace, "name": short}
        self._put(NetworkPolicy, {"metadata": metadata, "spec": spec})

    def pod(
        self,
        name: str,
        labels: dict[str, str],
        node: str = "n1",
        addresses: tuple[str, ...] = (),
        **metadata: Any,
    ) -> None:
        """The object alone; its status tells of the addresses when ADD is done."""
        namespace, _, short = name.partition("/")
        metadata |= {"namespace": namespace, "name": short, "labels": labels}
        status = {"podIPs": [{"ip": ip} for ip in addresses]}
        self._put(Pod, {"metadata": metadata, "spec": {"nodeName": node}, "status": status})

    def attach(self, name: str, number: int, node: str = "n1") -> Attachment:
        """What CNI ADD does first: the pod's policies, before there is a link."""
        ips = (f"10.244.{node[1]}.{number}", f"fd00:10:244:{node[1]}::{number:x}")
        namespace, _, short = name.partition("/")
        link = self.fabric.next_link()
        attachment = Attachment((namespace, short), link, tuple(map(parse_address, ips)))
        for at, compiler in self.compilers.items():
            if at == node:
                compiler.attach(attachment)
        return attachment

    def start(self, name: str, number: int, labels: dict[str, str], node: str = "n1") -> None:
        """A running pod: object, policies, link."""
        self.pod(name, labels, node)
        attachment = self.attach(name, number, node)
        self.play()
        self.fabric.add_pod(name, node, attachment.addresses)
        self.pod(name, labels, node, tuple(map(format_address, attachment.addresses)))
        self.play()

    def stop(self, name: str, node: str = "n1") -> None:
        """CNI DEL; the object stays."""
        self.fabric.remove_pod(name)
        namespace, _, short = name.partition("/")
        self.compilers[node].detach((namespace, short))

    def play(self) -> None:
        """Bring the kernel to where the objects are."""
        changes = self.store.take()
        for name, compiler in self.compilers.items():
            self.tables[name] = compiler.update(changes)
            self.parts[name].apply(self.tables[name])

    def ip(self, endpoint: str, bits: int = 32) -> str:
        place = self.fabric.place(endpoint)
        return next(format_address(a) for a in place.addresses if len(a) * 8 == bits)

    def socket(self, endpoint: str, kind: int, bits: int = 32) -> socket.socket:
        family = socket.AF_INET if bits == 32 else socket.AF_INET6
        return netns.socket(self.fabric.place(endpoint).fd, family, kind)

    def listen(self, endpoint: str, port: int, bits: int = 32) -> socket.socket:
        server = self.socket(endpoint, socket.SOCK_STREAM, bits)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((self.ip(endpoint, bits), port))
        server.listen(64)
        return server

    def connects(self, source: str, destination: str, port: int, bits: int = 32) -> bool:
        """Whether a TCP connection comes about; refused is connected, too."""
        with self.socket(source, socket.SOCK_STREAM, bits) as one:
            one.settimeout(0.3)
            try:
                one.connect((self.ip(destination, bits), port))
            except ConnectionRefusedError:
                return True
            except TimeoutError:
                return False
            return True


def wait_for(condition: Any, timeout_s: float = 5) -> None:
    """Until the condition holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)
