"""The fields of pods and Services that a kubelet reads beyond those of `podwire.kube.objects`."""

from __future__ import annotations

from podwire.kube import objects
from podwire.kube.objects import Object, Resource
from podwire.kube.resources import ENDPOINTS

DNS_IMAGE = "podwire.dev/lab-dns"


class HTTPGet(Object, frozen=True, kw_only=True):
    path: str = "/"
    port: int | str = 0
    host: str = ""


class TCPSocket(Object, frozen=True, kw_only=True):
    port: int | str = 0
    host: str = ""


class Probe(Object, frozen=True, kw_only=True):
    """A readiness probe. `exec` is not here: it counts as success. Times in seconds."""

    http_get: HTTPGet | None = None
    tcp_socket: TCPSocket | None = None
    grpc: TCPSocket | None = None  # asked by a TCP connection: the echo server speaks no gRPC
    initial_delay_seconds: int = 0
    period_seconds: int = 10
    timeout_seconds: int = 1
    success_threshold: int = 1
    failure_threshold: int = 3


class ContainerPort(Object, frozen=True, kw_only=True):
    name: str = ""
    container_port: int = 0
    protocol: str = "TCP"
    host_port: int = 0
    host_ip: str = ""


class Sleep(Object, frozen=True, kw_only=True):
    seconds: int = 0


class LifecycleHandler(Object, frozen=True, kw_only=True):
    sleep: Sleep | None = None


class Lifecycle(Object, frozen=True, kw_only=True):
    pre_stop: LifecycleHandler | None = None


class Container(Object, frozen=True, kw_only=True):
    name: str = ""
    image: str = ""
    ports: tuple[ContainerPort, ...] = ()
    readiness_probe: Probe | None = None
    lifecycle: Lifecycle | None = None
    restart_policy: str = ""


class PodSpec(Object, frozen=True, kw_only=True):
    node_name: str = ""
    host_network: bool = False
    restart_policy: str = "Always"
    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()


class Metadata(objects.Metadata, frozen=True, kw_only=True):
    deletion_grace_period_seconds: int | None = None


class PodStatus(Object, frozen=True, kw_only=True):
    phase: str = ""


class Pod(Resource, frozen=True, kw_only=True):
    metadata: Metadata = Metadata()
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def containers(self) -> list[Container]:
        """What runs: the containers, and init containers that are sidecars."""
        sidecars = [c for c in self.spec.init_containers if c.restart_policy == "Always"]
        return [*sidecars, *self.spec.containers]

    @property
    def serves_dns(self) -> bool:
        """Whether it runs the cluster's DNS server instead of the echo server on port 53."""
        return any(container.image == DNS_IMAGE for container in self.spec.containers)

    @property
    def finished(self) -> bool:
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def completes(self) -> bool:
        """Whether the pod ends by itself: one that a Job owns."""
        return any(owner.kind == "Job" for owner in self.metadata.owner_references)

    @property
    def pre_stop_s(self) -> int:
        """How long the containers' preStop sleeps keep it serving after its deletion."""
        sleeps = (
            c.lifecycle.pre_stop.sleep.seconds
            for c in self.containers
            if c.lifecycle and c.lifecycle.pre_stop and c.lifecycle.pre_stop.sleep
        )
        return max(sleeps, default=0)


class ServicePort(Object, frozen=True, kw_only=True):
    protocol: str = "TCP"
    port: int = 0
    target_port: int | str | None = None


class ServiceSpec(Object, frozen=True, kw_only=True):
    ports: tuple[ServicePort, ...] = ()
    selector: dict[str, str] | None = None


class TargetService(Resource, frozen=True, kw_only=True):
    """A Service as the pods behind it see it."""

    spec: ServiceSpec = ServiceSpec()

    def selects(self, pod: Pod) -> bool:
        selector = self.spec.selector
        labels = pod.metadata.labels
        return (
            bool(selector)
            and self.metadata.namespace == pod.metadata.namespace
            and all(labels.get(key) == value for key, value in (selector or {}).items())
        )


def served_ports(pod: Pod, services: list[TargetService]) -> set[tuple[str, int]]:
    """What the echo server of a pod listens on: ``(protocol, port)``.

    Containers listen on more than they declare (containerPort is informational), so the numeric
    target ports of Services and the ports of probes are served as well.
    """
    ports = {(p.protocol, p.container_port) for c in pod.containers for p in c.ports}
    for service in services:
        if service.selects(pod):
            for port in service.spec.ports:
                target = port.target_port or port.port
                if isinstance(target, int):
                    ports.add((port.protocol, target))
    for container in pod.containers:
        probe = container.readiness_probe
        for handler in (probe.http_get, probe.tcp_socket, probe.grpc) if probe else ():
            if handler and isinstance(handler.port, int):
                ports.add(("TCP", handler.port))
    return {(protocol, port) for protocol, port in ports if 0 < port < 65536}


ENDPOINTS[Pod] = ENDPOINTS[objects.Pod]
ENDPOINTS[TargetService] = ENDPOINTS[objects.Service]
