"""The Kubernetes objects that podwire reads, with just the fields it reads.

They decode straight from the watch stream (msgspec): unknown fields are skipped, missing ones get
the API's defaults. Values that the API server would have refused are kept as they are; the rooms
that give them meaning judge them (`podwire.errors.InvalidObject`).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec


class Object(msgspec.Struct, frozen=True, rename="camel", kw_only=True, gc=False):
    """Base: immutable, camelCase on the wire, unknown fields ignored."""


class OwnerReference(Object, frozen=True, kw_only=True):
    kind: str = ""
    name: str = ""
    uid: str = ""


class Metadata(Object, frozen=True, kw_only=True):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str = ""
    generation: int = 0
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    deletion_timestamp: str | None = None
    owner_references: list[OwnerReference] = []


class Resource(Object, frozen=True, kw_only=True):
    """Anything with metadata."""

    metadata: Metadata = Metadata()

    @property
    def key(self) -> tuple[str, str]:
        """``(namespace, name)``; the namespace of cluster-scoped objects is empty."""
        return (self.metadata.namespace, self.metadata.name)


# --- core/v1 -------------------------------------------------------------------------------------


class Namespace(Resource, frozen=True, kw_only=True):
    pass


class NodeAddress(Object, frozen=True, kw_only=True):
    type: str = ""
    address: str = ""


class Taint(Object, frozen=True, kw_only=True):
    key: str = ""


class NodeSpec(Object, frozen=True, kw_only=True):
    pod_cidr: str = msgspec.field(name="podCIDR", default="")
    pod_cidrs: list[str] = msgspec.field(name="podCIDRs", default=[])
    taints: list[Taint] = []
    unschedulable: bool = False


class NodeStatus(Object, frozen=True, kw_only=True):
    addresses: list[NodeAddress] = []
    capacity: dict[str, str] = {}


class Node(Resource, frozen=True, kw_only=True):
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class ENIConfigSpec(Object, frozen=True, kw_only=True):
    subnet: str = ""
    security_groups: list[str] = []


class ENIConfig(Resource, frozen=True, kw_only=True):
    """The subnet and security groups of pods' ENIs (crd.k8s.amazonaws.com/v1alpha1)."""

    spec: ENIConfigSpec = ENIConfigSpec()


class ContainerPort(Object, frozen=True, kw_only=True):
    name: str = ""
    container_port: int = 0
    protocol: str = "TCP"
    host_port: int = 0
    host_ip: str = msgspec.field(name="hostIP", default="")


class Container(Object, frozen=True, kw_only=True):
    name: str = ""
    ports: list[ContainerPort] = []
    restart_policy: str = ""  # "Always" marks a native sidecar among init containers


class PodSpec(Object, frozen=True, kw_only=True):
    node_name: str = ""
    host_network: bool = False
    containers: list[Container] = []
    init_containers: list[Container] = []


class PodIP(Object, frozen=True, kw_only=True):
    ip: str = ""


class PodStatus(Object, frozen=True, kw_only=True):
    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    pod_ips: list[PodIP] = msgspec.field(name="podIPs", default=[])
    host_ip: str = msgspec.field(name="hostIP", default="")


class Pod(Resource, frozen=True, kw_only=True):
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class ServicePort(Object, frozen=True, kw_only=True):
    name: str = ""
    protocol: str = "TCP"
    port: int = 0
    node_port: int = 0


class ClientIPConfig(Object, frozen=True, kw_only=True):
    timeout_seconds: int | None = None


class SessionAffinityConfig(Object, frozen=True, kw_only=True):
    client_ip: ClientIPConfig | None = msgspec.field(name="clientIP", default=None)


class ServiceSpec(Object, frozen=True, kw_only=True):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(name="clusterIP", default="")
    cluster_ips: list[str] = msgspec.field(name="clusterIPs", default=[])
    ports: list[ServicePort] = []
    selector: dict[str, str] | None = None
    external_ips: list[str] = msgspec.field(name="externalIPs", default=[])
    external_name: str = ""
    load_balancer_source_ranges: list[str] = []
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str = ""
    health_check_node_port: int = 0


class LoadBalancerIngress(Object, frozen=True, kw_only=True):
    ip: str = ""
    ip_mode: str | None = None
    hostname: str = ""


class LoadBalancerStatus(Object, frozen=True, kw_only=True):
    ingress: list[LoadBalancerIngress] = []


class ServiceStatus(Object, frozen=True, kw_only=True):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(Resource, frozen=True, kw_only=True):
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()


# --- discovery.k8s.io/v1 -------------------------------------------------------------------------


class EndpointConditions(Object, frozen=True, kw_only=True):
    """`None` means unset: ready and serving then count as true, terminating as false."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hint(Object, frozen=True, kw_only=True):
    name: str = ""


class EndpointHints(Object, frozen=True, kw_only=True):
    for_zones: list[Hint] | None = None
    for_nodes: list[Hint] | None = None


class TargetRef(Object, frozen=True, kw_only=True):
    kind: str = ""
    name: str = ""
    namespace: str = ""


class Endpoint(Object, frozen=True, kw_only=True):
    addresses: list[str] = []
    conditions: EndpointConditions = EndpointConditions()
    node_name: str | None = None
    zone: str | None = None
    hints: EndpointHints | None = None
    hostname: str | None = None
    target_ref: TargetRef | None = None


class EndpointPort(Object, frozen=True, kw_only=True):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class EndpointSlice(Resource, frozen=True, kw_only=True):
    address_type: str = "IPv4"
    endpoints: list[Endpoint] | None = None
    ports: list[EndpointPort] | None = None


# --- networking.k8s.io/v1 ------------------------------------------------------------------------


class ServiceCIDRSpec(Object, frozen=True, kw_only=True):
    cidrs: list[str] = []


class ServiceCIDR(Resource, frozen=True, kw_only=True):
    spec: ServiceCIDRSpec = ServiceCIDRSpec()


class SelectorRequirement(Object, frozen=True, kw_only=True):
    key: str = ""
    operator: str = ""
    values: list[str] | None = None


class LabelSelector(Object, frozen=True, kw_only=True):
    match_labels: dict[str, str] | None = None
    match_expressions: list[SelectorRequirement] | None = None


class IPBlock(Object, frozen=True, kw_only=True):
    cidr: str = ""
    except_: list[str] | None = msgspec.field(name="except", default=None)


class NetworkPolicyPeer(Object, frozen=True, kw_only=True):
    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


class NetworkPolicyPort(Object, frozen=True, kw_only=True):
    protocol: str | None = None
    port: int | str | None = None
    end_port: int | None = None


class NetworkPolicyIngressRule(Object, frozen=True, kw_only=True):
    from_: list[NetworkPolicyPeer] | None = msgspec.field(name="from", default=None)
    ports: list[NetworkPolicyPort] | None = None


class NetworkPolicyEgressRule(Object, frozen=True, kw_only=True):
    to: list[NetworkPolicyPeer] | None = None
    ports: list[NetworkPolicyPort] | None = None


class NetworkPolicySpec(Object, frozen=True, kw_only=True):
    pod_selector: LabelSelector = LabelSelector()
    policy_types: list[str] | None = None
    ingress: list[NetworkPolicyIngressRule] | None = None
    egress: list[NetworkPolicyEgressRule] | None = None


class NetworkPolicy(Resource, frozen=True, kw_only=True):
    spec: NetworkPolicySpec = NetworkPolicySpec()


# --- policy.networking.k8s.io/v1alpha2 -----------------------------------------------------------

Json: TypeAlias = dict[str, Any]


class ClusterNetworkPolicySpec(Object, frozen=True, kw_only=True):
    """Rules stay JSON: a peer of a kind that we do not know must be seen, to fail closed."""

    tier: str = ""
    priority: int = 0
    subject: Json = {}
    ingress: list[Json] | None = None
    egress: list[Json] | None = None


class ClusterNetworkPolicy(Resource, frozen=True, kw_only=True):
    spec: ClusterNetworkPolicySpec = ClusterNetworkPolicySpec()
