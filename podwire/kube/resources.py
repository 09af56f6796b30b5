"""Where the API serves each kind."""

from __future__ import annotations

from dataclasses import dataclass

from podwire.kube import objects
from podwire.kube.objects import Resource


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`prefix` is ``/api/v1`` or ``/apis/GROUP/VERSION``."""

    prefix: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The path of a collection, an object or its subresource; all namespaces without one."""
        home = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        below = "/".join(part for part in (self.plural, name, subresource) if part)
        return f"{self.prefix}{home}/{below}"


ENDPOINTS: dict[type[Resource], Endpoint] = {
    objects.Namespace: Endpoint("/api/v1", "namespaces", namespaced=False),
    objects.Node: Endpoint("/api/v1", "nodes", namespaced=False),
    objects.Pod: Endpoint("/api/v1", "pods"),
    objects.Service: Endpoint("/api/v1", "services"),
    objects.EndpointSlice: Endpoint("/apis/discovery.k8s.io/v1", "endpointslices"),
    objects.NetworkPolicy: Endpoint("/apis/networking.k8s.io/v1", "networkpolicies"),
    objects.ServiceCIDR: Endpoint("/apis/networking.k8s.io/v1", "servicecidrs", namespaced=False),
    objects.ENIConfig: Endpoint(
        "/apis/crd.k8s.amazonaws.com/v1alpha1", "eniconfigs", namespaced=False
    ),
    objects.ClusterNetworkPolicy: Endpoint(
        "/apis/policy.networking.k8s.io/v1alpha2", "clusternetworkpolicies", namespaced=False
    ),
}
