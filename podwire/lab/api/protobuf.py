"""Protobuf bodies of requests: newer kubectl sends what it creates in this form only.

We always answer in JSON, which every client takes. The table covers what kubectl's own commands
create; a field that it lacks makes the request fail instead of being lost.
Source: the generated.proto files of k8s.io/api and k8s.io/apimachinery.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from podwire.kube.objects import Json
from podwire.lab.api.status import bad_request, unsupported_media

MEDIA_TYPE = "application/vnd.kubernetes.protobuf"
_MAGIC = b"k8s\0"

# message: number name type. Types: str int bool bytes time quantity intstr, map:TYPE, a message, or
# "skip". `[]` repeats; `?` is set on purpose even when it is zero; `^` is inlined in JSON.
_SCHEMA = """
Unknown: 1 typeMeta TypeMeta, 2 raw raw, 3 contentEncoding str, 4 contentType str
TypeMeta: 1 apiVersion str, 2 kind str
ObjectMeta: 1 name str, 2 generateName str, 3 namespace str, 4 selfLink str, 5 uid str,
  6 resourceVersion str, 7 generation int, 8 creationTimestamp time, 9 deletionTimestamp time,
  10 deletionGracePeriodSeconds int?, 11 labels map:str, 12 annotations map:str,
  13 ownerReferences OwnerReference[], 14 finalizers str[], 17 managedFields skip
OwnerReference: 1 kind str, 3 name str, 4 uid str, 5 apiVersion str, 6 controller bool?,
  7 blockOwnerDeletion bool?
LabelSelector: 1 matchLabels map:str, 2 matchExpressions Requirement[]
Requirement: 1 key str, 2 operator str, 3 values str[]
DeleteOptions: 1 gracePeriodSeconds int?, 2 preconditions Preconditions, 3 orphanDependents bool?,
  4 propagationPolicy str?, 5 dryRun str[]
Preconditions: 1 uid str?, 2 resourceVersion str?
Eviction: 1 metadata ObjectMeta, 2 deleteOptions DeleteOptions
Namespace: 1 metadata ObjectMeta, 2 spec NamespaceSpec, 3 status skip
NamespaceSpec: 1 finalizers str[]
ConfigMap: 1 metadata ObjectMeta, 2 data map:str, 3 binaryData map:bytes, 4 immutable bool?
Secret: 1 metadata ObjectMeta, 2 data map:bytes, 3 type str, 4 stringData map:str,
  5 immutable bool?
ServiceAccount: 1 metadata ObjectMeta, 2 secrets Named[], 3 imagePullSecrets LocalName[]
Named: 1 kind str, 2 namespace str, 3 name str
LocalName: 1 name str
ResourceQuota: 1 metadata ObjectMeta, 2 spec QuotaSpec, 3 status skip
QuotaSpec: 1 hard map:quantity, 2 scopes str[]
Service: 1 metadata ObjectMeta, 2 spec ServiceSpec, 3 status skip
ServiceSpec: 1 ports ServicePort[], 2 selector map:str, 3 clusterIP str, 4 type str,
  5 externalIPs str[], 7 sessionAffinity str, 8 loadBalancerIP str,
  9 loadBalancerSourceRanges str[], 10 externalName str, 11 externalTrafficPolicy str,
  12 healthCheckNodePort int, 13 publishNotReadyAddresses bool, 17 ipFamilyPolicy str?,
  18 clusterIPs str[], 19 ipFamilies str[], 20 allocateLoadBalancerNodePorts bool?,
  21 loadBalancerClass str?, 22 internalTrafficPolicy str?, 23 trafficDistribution str?
ServicePort: 1 name str, 2 protocol str, 3 port int, 4 targetPort intstr, 5 nodePort int,
  6 appProtocol str?
Pod: 1 metadata ObjectMeta, 2 spec PodSpec, 3 status skip
PodTemplate: 1 metadata ObjectMeta, 2 spec PodSpec
PodSpec: 2 containers Container[], 3 restartPolicy str, 4 terminationGracePeriodSeconds int?,
  5 activeDeadlineSeconds int?, 6 dnsPolicy str, 7 nodeSelector map:str, 8 serviceAccountName str,
  9 serviceAccount str, 10 nodeName str, 11 hostNetwork bool, 12 hostPID bool, 13 hostIPC bool,
  15 imagePullSecrets LocalName[], 16 hostname str, 17 subdomain str, 19 schedulerName str,
  20 initContainers Container[], 24 priorityClassName str
Container: 1 name str, 2 image str, 3 command str[], 4 args str[], 5 workingDir str,
  6 ports ContainerPort[], 7 env Variable[], 8 resources Resources, 13 terminationMessagePath str,
  14 imagePullPolicy str, 16 stdin bool, 17 stdinOnce bool, 18 tty bool,
  20 terminationMessagePolicy str
ContainerPort: 1 name str, 2 hostPort int, 3 containerPort int, 4 protocol str, 5 hostIP str
Variable: 1 name str, 2 value str
Resources: 1 limits map:quantity, 2 requests map:quantity
Deployment: 1 metadata ObjectMeta, 2 spec DeploymentSpec, 3 status skip
DeploymentSpec: 1 replicas int?, 2 selector LabelSelector, 3 template PodTemplate,
  4 strategy Strategy, 5 minReadySeconds int, 6 revisionHistoryLimit int?, 7 paused bool,
  9 progressDeadlineSeconds int?
Strategy: 1 type str, 2 rollingUpdate RollingUpdate
RollingUpdate: 1 maxUnavailable intstr, 2 maxSurge intstr
Job: 1 metadata ObjectMeta, 2 spec JobSpec, 3 status skip
JobSpec: 1 parallelism int?, 2 completions int?, 3 activeDeadlineSeconds int?,
  4 selector LabelSelector, 5 manualSelector bool?, 6 template PodTemplate, 7 backoffLimit int?,
  8 ttlSecondsAfterFinished int?, 9 completionMode str?, 10 suspend bool?
CronJob: 1 metadata ObjectMeta, 2 spec CronJobSpec, 3 status skip
CronJobSpec: 1 schedule str, 2 startingDeadlineSeconds int?, 3 concurrencyPolicy str,
  4 suspend bool?, 5 jobTemplate JobTemplate, 6 successfulJobsHistoryLimit int?,
  7 failedJobsHistoryLimit int?, 8 timeZone str?
JobTemplate: 1 metadata ObjectMeta, 2 spec JobSpec
Role: 1 metadata ObjectMeta, 2 rules PolicyRule[]
ClusterRole: 1 metadata ObjectMeta, 2 rules PolicyRule[], 3 aggregationRule Aggregation
Aggregation: 1 clusterRoleSelectors LabelSelector[]
PolicyRule: 1 verbs str[], 2 apiGroups str[], 3 resources str[], 4 resourceNames str[],
  5 nonResourceURLs str[]
RoleBinding: 1 metadata ObjectMeta, 2 subjects Subject[], 3 roleRef RoleRef
ClusterRoleBinding: 1 metadata ObjectMeta, 2 subjects Subject[], 3 roleRef RoleRef
Subject: 1 kind str, 2 apiGroup str, 3 name str, 4 namespace str
RoleRef: 1 apiGroup str, 2 kind str, 3 name str
Ingress: 1 metadata ObjectMeta, 2 spec IngressSpec, 3 status skip
IngressSpec: 1 defaultBackend Backend, 2 tls Tls[], 3 rules IngressRule[], 4 ingressClassName str?
Backend: 4 service BackendService
BackendService: 1 name str, 2 port BackendPort
BackendPort: 1 name str, 2 number int
Tls: 1 hosts str[], 2 secretName str
IngressRule: 1 host str, 2 value IngressValue^
IngressValue: 1 http IngressPaths
IngressPaths: 1 paths IngressPath[]
IngressPath: 1 path str, 2 backend Backend, 3 pathType str?
PodDisruptionBudget: 1 metadata ObjectMeta, 2 spec BudgetSpec, 3 status skip
BudgetSpec: 1 minAvailable intstr, 2 selector LabelSelector, 3 maxUnavailable intstr
PriorityClass: 1 metadata ObjectMeta, 2 value int, 3 globalDefault bool, 4 description str,
  5 preemptionPolicy str?
HorizontalPodAutoscaler: 1 metadata ObjectMeta, 2 spec ScalerSpec, 3 status skip
ScalerSpec: 1 scaleTargetRef ScaleTarget, 2 minReplicas int?, 3 maxReplicas int, 4 metrics Metric[]
ScaleTarget: 1 kind str, 2 name str, 3 apiVersion str
Metric: 1 type str, 4 resource ResourceMetric
ResourceMetric: 1 name str, 2 target MetricTarget
MetricTarget: 1 type str, 2 value quantity, 3 averageValue quantity, 4 averageUtilization int?
"""


class _Field(NamedTuple):
    name: str
    type: str
    repeated: bool
    kept: bool
    inlined: bool


@lru_cache(maxsize=1)
def _messages() -> dict[str, dict[int, _Field]]:
    out: dict[str, dict[int, _Field]] = {}
    for line in _SCHEMA.strip().replace("\n  ", " ").splitlines():
        message, _, rest = line.partition(":")
        fields = out[message] = {}
        for entry in rest.split(","):
            number, name, kind = entry.split()
            plain = kind.rstrip("[]?^")
            fields[int(number)] = _Field(name, plain, "[]" in kind, "?" in kind, "^" in kind)
    return out


def decode(body: bytes) -> Json:
    """The object of a request body. Raises StatusError: 400 for bad bytes, 415 for what is not in
    the table.
    """
    if not body.startswith(_MAGIC):
        raise bad_request("the body is no Kubernetes protobuf")
    try:
        envelope = _message("Unknown", body[len(_MAGIC) :])
        meta: Json = envelope.get("typeMeta", {})
        kind = str(meta.get("kind", ""))
        if kind not in _messages():
            raise unsupported_media(f"{kind} is not taken as protobuf; send JSON")
        return {**meta, **_message(kind, envelope.get("raw", b""))}
    except (IndexError, ValueError, OverflowError, OSError):  # the last two: impossible times
        raise bad_request("the protobuf body does not decode") from None


def _message(name: str, data: bytes) -> Json:
    out: Json = {}
    for number, raw in _fields(data):
        field = _messages()[name].get(number)
        if field is None:
            raise unsupported_media(f"field {number} of {name} is not taken as protobuf; send JSON")
        value = _value(field.type, raw)
        if field.inlined:
            out.update(value)
        elif field.type.startswith("map:"):
            out.setdefault(field.name, {}).update(value)
        elif field.repeated:
            out.setdefault(field.name, []).append(value)
        elif value is not None and (value or field.kept or field.type == "intstr"):
            out[field.name] = value
    return out


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
            case 2:
                size, at = _varint(data, at)
                if at + size > len(data):
                    raise IndexError
                yield key >> 3, data[at : at + size]
                at += size
            case _:
                raise IndexError  # no API type has fixed-size fields here


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise OverflowError


def _value(type: str, raw: int | bytes) -> Any:
    if isinstance(raw, int) is not (type in ("int", "bool")):
        raise ValueError("wrong wire type")
    if isinstance(raw, int):
        return bool(raw) if type == "bool" else raw - (1 << 64) if raw >> 63 else raw
    match type:
        case "str":
            return raw.decode()
        case "raw":
            return raw
        case "bytes":
            return base64.b64encode(raw).decode()
        case "skip":
            return None
        case "time":
            seconds = dict(_fields(raw)).get(1)
            if not isinstance(seconds, int):
                return None
            return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        case "quantity":
            return _text(dict(_fields(raw)).get(1, b""))
        case "intstr":
            parts = dict(_fields(raw))
            return _text(parts.get(3, b"")) if parts.get(1) else _value("int", parts.get(2, 0))
        case _ if type.startswith("map:"):
            entry = dict(_fields(raw))
            value = _value(type.removeprefix("map:"), entry.get(2, b""))
            return {_text(entry.get(1, b"")): value}
        case _:
            return _message(type, raw)


def _text(raw: int | bytes) -> str:
    return raw.decode() if isinstance(raw, bytes) else str(raw)
