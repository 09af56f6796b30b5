"""The kinds that the server knows, and those it learns from CustomResourceDefinitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from podwire.kube.objects import Json
from podwire.lab import tree


@dataclass(frozen=True, slots=True, eq=False)  # one object per resource: `is` will do
class ApiResource:
    """One kind under one group and version.

    `builtin` kinds get strategic merge and defaults; others are kept as they come.
    """

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    has_status: bool = False
    has_scale: bool = False
    categories: tuple[str, ...] = ()
    builtin: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def list_kind(self) -> str:
        return f"{self.kind}List"

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


_ALL = ("all",)

# group/version | kind plural [short names] with flags: c cluster-scoped, s status, S scale, a "all"
_TABLE = """
v1                                | Namespace namespaces ns cs
v1                                | Node nodes no cs
v1                                | Pod pods po sa
v1                                | Service services svc sa
v1                                | Endpoints endpoints ep -
v1                                | ConfigMap configmaps cm -
v1                                | Secret secrets - -
v1                                | ServiceAccount serviceaccounts sa -
v1                                | Event events ev -
v1                                | PersistentVolume persistentvolumes pv cs
v1                                | PersistentVolumeClaim persistentvolumeclaims pvc s
v1                                | ReplicationController replicationcontrollers rc sSa
v1                                | LimitRange limitranges limits -
v1                                | ResourceQuota resourcequotas quota s
v1                                | PodTemplate podtemplates - -
apps/v1                           | Deployment deployments deploy sSa
apps/v1                           | ReplicaSet replicasets rs sSa
apps/v1                           | StatefulSet statefulsets sts sSa
apps/v1                           | DaemonSet daemonsets ds sa
apps/v1                           | ControllerRevision controllerrevisions - -
batch/v1                          | Job jobs - sa
batch/v1                          | CronJob cronjobs cj sa
autoscaling/v2                    | HorizontalPodAutoscaler horizontalpodautoscalers hpa sa
autoscaling/v1                    | HorizontalPodAutoscaler horizontalpodautoscalers hpa s
discovery.k8s.io/v1               | EndpointSlice endpointslices - -
networking.k8s.io/v1              | NetworkPolicy networkpolicies netpol -
networking.k8s.io/v1              | Ingress ingresses ing s
networking.k8s.io/v1              | IngressClass ingressclasses - c
networking.k8s.io/v1              | ServiceCIDR servicecidrs - cs
networking.k8s.io/v1              | IPAddress ipaddresses ip c
policy/v1                         | PodDisruptionBudget poddisruptionbudgets pdb s
rbac.authorization.k8s.io/v1      | Role roles - -
rbac.authorization.k8s.io/v1      | RoleBinding rolebindings - -
rbac.authorization.k8s.io/v1      | ClusterRole clusterroles - c
rbac.authorization.k8s.io/v1      | ClusterRoleBinding clusterrolebindings - c
storage.k8s.io/v1                 | StorageClass storageclasses sc c
scheduling.k8s.io/v1              | PriorityClass priorityclasses pc c
coordination.k8s.io/v1            | Lease leases - -
node.k8s.io/v1                    | RuntimeClass runtimeclasses - c
admissionregistration.k8s.io/v1 | ValidatingWebhookConfiguration validatingwebhookconfigurations - c
admissionregistration.k8s.io/v1 | MutatingWebhookConfiguration mutatingwebhookconfigurations - c
apiregistration.k8s.io/v1         | APIService apiservices - cs
apiextensions.k8s.io/v1           | CustomResourceDefinition customresourcedefinitions crd,crds cs
policy.networking.k8s.io/v1alpha2 | ClusterNetworkPolicy clusternetworkpolicies cnp cx
cilium.io/v2 | CiliumNetworkPolicy ciliumnetworkpolicies cnp,ciliumnp sx
cilium.io/v2 | CiliumClusterwideNetworkPolicy ciliumclusterwidenetworkpolicies ccnp csx
"""


def _builtin() -> Iterator[ApiResource]:
    for line in _TABLE.strip().splitlines():
        api_version, _, rest = line.partition("|")
        kind, plural, short, flags = rest.split()
        group, _, version = api_version.strip().rpartition("/")
        yield ApiResource(
            group=group,
            version=version,
            kind=kind,
            plural=plural,
            namespaced="c" not in flags,
            short_names=() if short == "-" else tuple(short.split(",")),
            has_status="s" in flags,
            has_scale="S" in flags,
            categories=_ALL if "a" in flags else (),
            builtin="x" not in flags,
        )


class Catalogue:
    """All resources, by path and by kind. Grows with CustomResourceDefinitions."""

    def __init__(self) -> None:
        self._by_path: dict[tuple[str, str, str], ApiResource] = {}
        self._by_kind: dict[tuple[str, str], ApiResource] = {}
        self._learned: set[ApiResource] = set()
        for resource in _builtin():
            self.add(resource)

    def add(self, resource: ApiResource) -> None:
        self._by_path[resource.group, resource.version, resource.plural] = resource
        self._by_kind[resource.api_version, resource.kind] = resource

    def remove(self, resource: ApiResource) -> None:
        self._by_path.pop((resource.group, resource.version, resource.plural), None)
        self._by_kind.pop((resource.api_version, resource.kind), None)

    def at(self, group: str, version: str, plural: str) -> ApiResource | None:
        return self._by_path.get((group, version, plural))

    def of(self, api_version: str, kind: str) -> ApiResource | None:
        return self._by_kind.get((api_version, kind))

    def __iter__(self) -> Iterator[ApiResource]:
        return iter(self._by_path.values())

    def groups(self) -> dict[str, list[str]]:
        """Group → its versions, the preferred (newest) first; the core group is left out."""
        out: dict[str, list[str]] = {}
        for group, version, _ in self._by_path:
            if group and version not in out.setdefault(group, []):
                out[group].append(version)
        return out

    def learn(self, obj: Json) -> ApiResource:
        """A resource for an object of a kind that nobody defined."""
        group, _, version = str(obj.get("apiVersion", "")).rpartition("/")
        kind = str(obj.get("kind", ""))
        resource = ApiResource(group, version, kind, _plural(kind), builtin=False)
        self.add(resource)
        self._learned.add(resource)
        return resource

    def is_learned(self, resource: ApiResource) -> bool:
        """Whether nobody defined this kind: it only turned up in a manifest."""
        return resource in self._learned


def _plural(kind: str) -> str:
    """The plural that code generators choose."""
    word = kind.lower()
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def from_definition(definition: Json) -> Iterable[ApiResource]:
    """The served versions of a CustomResourceDefinition."""
    spec = definition.get("spec", {})
    names = spec.get("names", {})
    for version in tree.mappings(spec, "versions"):
        if version.get("served", True):
            subresources = tree.mapping(version, "subresources")
            yield ApiResource(
                group=spec.get("group", ""),
                version=version.get("name", ""),
                kind=names.get("kind", ""),
                plural=names.get("plural", ""),
                namespaced=spec.get("scope") != "Cluster",
                short_names=tuple(tree.texts(names, "shortNames")),
                has_status="status" in subresources,
                has_scale="scale" in subresources,
                categories=tuple(tree.texts(names, "categories")),
                builtin=False,
            )
