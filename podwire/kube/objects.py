"""The Kubernetes objects that podwire reads, with just the fields it reads.

They decode straight from the watch stream (msgspec): unknown fields are skipped, missing ones get
the API's defaults. Values that the API server would have refused are kept as they are; the rooms
that give them meaning judge them (`podwire.errors.InvalidObject`).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec


class Object(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Base: immutable, camelCase on the wire, unknown fields ignored."""


class OwnerReference(Object):
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool = False


class Metadata(Object):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    deletion_timestamp: str | None = None
    owner_references: list[OwnerReference] = []


class NamespacedName(Object):
    """`str()` is ``namespace/name``, or ``name`` for cluster-scoped objects."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class Resource(Object):
    """Anything with metadata."""

    metadata: Metadata = Metadata()

    @property
    def key(self) -> tuple[str, str]:
        """``(namespace, name)``; the namespace of cluster-scoped objects is empty."""
        return (self.metadata.namespace, self.metadata.name)


# --- core/v1 -------------------------------------------------------------------------------------


class Namespace(Resource):
    pass


class NodeAddress(Object):
    type: str = ""
    address: str = ""


class Taint(Object):
    key: str = ""
    value: str = ""
    effect: str = ""


class NodeSpec(Object):
    pod_cidr: str = msgspec.field(name="podCIDR", default="")
    pod_cidrs: list[str] = msgspec.field(name="podCIDRs", default=[])
    taints: list[Taint] = []
    unschedulable: bool = False


class NodeStatus(Object):
    addresses: list[NodeAddress] = []
    capacity: dict[str, str] = {}


class Node(Resource):
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class ContainerPort(Object):
    name: str = ""
    container_port: int = 0
    protocol: str = "TCP"
    host_port: int = 0
    host_ip: str = msgspec.field(name="hostIP", default="")


class Container(Object):
    name: str = ""
    ports: list[ContainerPort] = []
    restart_policy: str = ""  # "Always" marks a native sidecar among init containers


class PodSpec(Object):
    node_name: str = ""
    host_network: bool = False
    containers: list[Container] = []
    init_containers: list[Container] = []


class PodIP(Object):
    ip: str = ""


class PodStatus(Object):
    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    pod_ips: list[PodIP] = msgspec.field(name="podIPs", default=[])
    host_ip: str = msgspec.field(name="hostIP", default="")


class Pod(Resource):
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class ServicePort(Object):
    name: str = ""
    protocol: str = "TCP"
    port: int = 0
    node_port: int = 0
    app_protocol: str = ""


class ClientIPConfig(Object):
    timeout_seconds: int | None = None


class SessionAffinityConfig(Object):
    client_ip: ClientIPConfig | None = msgspec.field(name="clientIP", default=None)


class ServiceSpec(Object):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(name="clusterIP", default="")
    cluster_ips: list[str] = msgspec.field(name="clusterIPs", default=[])
    ip_families: list[str] = []
    ports: list[ServicePort] = []
    selector: dict[str, str] | None = None
    external_ips: list[str] = msgspec.field(name="externalIPs", default=[])
    load_balancer_ip: str = msgspec.field(name="loadBalancerIP", default="")
    load_balancer_source_ranges: list[str] = []
    load_balancer_class: str | None = None
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str = ""
    health_check_node_port: int = 0
    publish_not_ready_addresses: bool = False
    traffic_distribution: str | None = None


class LoadBalancerIngress(Object):
    ip: str = ""
    ip_mode: str | None = None
    hostname: str = ""


class LoadBalancerStatus(Object):
    ingress: list[LoadBalancerIngress] = []


class ServiceStatus(Object):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(Resource):
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()


# --- discovery.k8s.io/v1 -------------------------------------------------------------------------


class EndpointConditions(Object):
    """`None` means unset: ready and serving then count as true, terminating as false."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hint(Object):
    name: str = ""


class EndpointHints(Object):
    for_zones: list[Hint] | None = None
    for_nodes: list[Hint] | None = None


class TargetRef(Object):
    kind: str = ""
    name: str = ""
    namespace: str = ""


class Endpoint(Object):
    addresses: list[str] = []
    conditions: EndpointConditions = EndpointConditions()
    node_name: str | None = None
    zone: str | None = None
    hints: EndpointHints | None = None
    hostname: str | None = None
    target_ref: TargetRef | None = None


class EndpointPort(Object):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class EndpointSlice(Resource):
    address_type: str = "IPv4"
    endpoints: list[Endpoint] | None = None
    ports: list[EndpointPort] | None = None


# --- networking.k8s.io/v1 ------------------------------------------------------------------------


class ServiceCIDRSpec(Object):
    cidrs: list[str] = []


class ServiceCIDR(Resource):
    spec: ServiceCIDRSpec = ServiceCIDRSpec()


class SelectorRequirement(Object):
    key: str = ""
    operator: str = ""
    values: list[str] | None = None


class LabelSelector(Object):
    match_labels: dict[str, str] | None = None
    match_expressions: list[SelectorRequirement] | None = None


class IPBlock(Object):
    cidr: str = ""
    except_: list[str] | None = msgspec.field(name="except", default=None)


class NetworkPolicyPeer(Object):
    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


class NetworkPolicyPort(Object):
    protocol: str | None = None
    port: int | str | None = None
    end_port: int | None = None


class NetworkPolicyIngressRule(Object):
    from_: list[NetworkPolicyPeer] | None = msgspec.field(name="from", default=None)
    ports: list[NetworkPolicyPort] | None = None


class NetworkPolicyEgressRule(Object):
    to: list[NetworkPolicyPeer] | None = None
    ports: list[NetworkPolicyPort] | None = None


class NetworkPolicySpec(Object):
    pod_selector: LabelSelector = LabelSelector()
    policy_types: list[str] | None = None
    ingress: list[NetworkPolicyIngressRule] | None = None
    egress: list[NetworkPolicyEgressRule] | None = None


class NetworkPolicy(Resource):
    spec: NetworkPolicySpec = NetworkPolicySpec()


# --- policy.networking.k8s.io/v1alpha2 -----------------------------------------------------------

Json: TypeAlias = dict[str, Any]


class ClusterNetworkPolicySpec(Object):
    """Rules stay JSON: a peer of a kind that we do not know must be seen, to fail closed."""

    tier: str = ""
    priority: int = 0
    subject: Json = {}
    ingress: list[Json] | None = None
    egress: list[Json] | None = None


class ClusterNetworkPolicy(Resource):
    spec: ClusterNetworkPolicySpec = ClusterNetworkPolicySpec()
