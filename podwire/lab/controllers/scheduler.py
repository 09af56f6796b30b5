"""Puts pods on nodes: hard rules first, then the node with the fewest siblings and pods.

Resource requests and soft preferences are not weighed: a lab's pods cost next to nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.registry import Registry
from podwire.lab.api.selectors import label_selector
from podwire.lab.api.storage import Event, Key, Record
from podwire.lab.controllers.base import (
    Controller,
    condition,
    controller_of,
    is_done,
    is_going,
    is_ready,
    labels,
    with_condition,
)

_NO_NEW_PODS = ("NoSchedule", "NoExecute")


class Scheduler(Controller):
    """Keys are pods that wait for a node."""

    kinds = ("Pod", "Node")

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        self._pods = registry.resource("Pod")
        self._nodes = registry.resource("Node")
        self._waiting: dict[Key, None] = {}
        self._placed: dict[str, dict[Key, Record]] = {}
        self._siblings: Counter[tuple[str, str]] = Counter()  # (node, owner) → pods

    def wants(self, event: Event) -> Iterable[Key]:
        if event.resource == self._nodes:
            if event.type != "MODIFIED" or _offers(event.record.obj) != _offers(
                event.old.obj if event.old else {}
            ):
                yield from self._waiting
        elif event.resource == self._pods:
            key = event.record.key
            if self._note(event) and self._waiting:
                yield from self._waiting  # a place became free
            if event.type != "DELETED" and not tree.text(event.record.obj, "spec", "nodeName"):
                self._waiting[key] = None
                if event.type == "ADDED":
                    yield key
            else:
                self._waiting.pop(key, None)

    def _note(self, event: Event) -> bool:
        """Keep the index of pods by node; says whether a node lost a pod."""
        key = event.record.key
        node = tree.text(event.record.obj, "spec", "nodeName")
        family = (node, str(controller_of(event.record.obj).get("uid")))
        if event.type == "DELETED" or is_done(event.record.obj):
            if self._placed.get(node, {}).pop(key, None) is None:
                return False
            self._siblings[family] -= 1
            return True
        if node:
            there = self._placed.setdefault(node, {})
            self._siblings[family] += key not in there
            there[key] = event.record
        return False

    def reconcile(self, key: Key) -> None:
        pod = self.registry.find(self._pods, *key)
        if pod is None or is_going(pod) or tree.text(pod.obj, "spec", "nodeName"):
            self._waiting.pop(key, None)
            return
        if tree.mappings(pod.obj, "spec", "schedulingGates"):
            return
        nodes = self.registry.storage.collection(self._nodes).records.values()
        refusals: Counter[str] = Counter()
        fitting: list[Record] = []
        for node in nodes:
            if why := self._refusal(pod, node):
                refusals[why] += 1
            else:
                fitting.append(node)
        if not fitting:
            reasons = ", ".join(f"{count} {why}" for why, count in sorted(refusals.items()))
            message = f"0/{len(nodes)} nodes are available: {reasons or 'there is no node'}."
            self._unschedulable(pod, message)
            return
        best = min(fitting, key=lambda node: self._rank(pod, node))
        new = {"type": "PodScheduled", "status": "True"}
        conditions = with_condition(self.registry, pod.obj, new)
        self.registry.amend(
            self._pods,
            key,
            spec={**pod.obj["spec"], "nodeName": best.key[1]},
            status={**pod.obj["status"], "conditions": conditions},
        )

    def _unschedulable(self, pod: Record, message: str) -> None:
        new = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": message,
        }
        conditions = with_condition(self.registry, pod.obj, new)
        status = {**pod.obj["status"], "conditions": conditions}
        self.registry.amend(self._pods, pod.key, status=status)

    def _rank(self, pod: Record, node: Record) -> tuple[int, int, str]:
        name = node.key[1]
        owner = controller_of(pod.obj).get("uid")
        siblings = self._siblings[name, owner] if owner else 0
        return siblings, len(self._placed.get(name, ())), name

    def _refusal(self, pod: Record, node: Record) -> str:
        """Why the pod may not go to the node, or ``""``."""
        if why := node_refusal(pod.obj, node.obj):
            return why
        there = self._placed.get(node.key[1], {})
        limit = int(tree.value(node.obj, "status", "allocatable", "pods") or 0)
        if limit and len(there) >= limit:
            return "Too many pods"
        wanted = _host_ports(pod.obj)
        if wanted and any(wanted & _host_ports(one.obj) for one in there.values()):
            return "node(s) didn't have free ports for the requested pod ports"
        return self._affinity_refusal(pod, node)

    def _affinity_refusal(self, pod: Record, node: Record) -> str:
        affinity = tree.mapping(pod.obj, "spec", "affinity")
        hard = "requiredDuringSchedulingIgnoredDuringExecution"
        for term in tree.mappings(affinity, "podAntiAffinity", hard):
            if any(self._near(pod, node, term)):
                return "node(s) didn't match pod anti-affinity rules"
        for term in tree.mappings(affinity, "podAffinity", hard):
            if not any(self._near(pod, node, term)) and not self._is_first(pod, term):
                return "node(s) didn't match pod affinity rules"
        return ""

    def _near(self, pod: Record, node: Record, term: Json) -> Iterable[bool]:
        """Of every pod in the node's topology domain: whether the term selects it."""
        key = tree.text(term, "topologyKey")
        domain = labels(node).get(key)
        matches = _term_matcher(pod, term)
        for name, there in self._placed.items():
            other = self.registry.find(self._nodes, "", name)
            if other and domain is not None and labels(other).get(key) == domain:
                yield from (matches(one) for one in there.values())

    def _is_first(self, pod: Record, term: Json) -> bool:
        """A pod that its own affinity selects may be the first of its kind anywhere."""
        matches = _term_matcher(pod, term)
        others = (one for there in self._placed.values() for one in there.values())
        return matches(pod) and not any(map(matches, others))


def _term_matcher(pod: Record, term: Json) -> Callable[[Record], bool]:
    selects = label_selector(term.get("labelSelector"))
    homes = tree.texts(term, "namespaces") or [pod.key[0]]
    return lambda other: other.key[0] in homes and selects(labels(other))


def _offers(node: Json) -> list[object]:
    """What of a node matters to waiting pods."""
    return [
        tree.mapping(node, "metadata", "labels"),
        tree.mappings(node, "spec", "taints"),
        tree.value(node, "spec", "unschedulable"),
        tree.value(node, "status", "allocatable", "pods"),
        is_ready(node),
    ]


def _host_ports(pod: Json) -> set[tuple[int, str]]:
    return {
        (port["hostPort"], port.get("protocol", "TCP"))
        for container in tree.mappings(pod, "spec", "containers")
        for port in tree.mappings(container, "ports")
        if port.get("hostPort")
    }


# --- the rules that need only the pod and the node -----------------------------------------------


def node_refusal(pod: Json, node: Json) -> str:
    """Why the node's own state keeps the pod away, or ``""``."""
    for taint in _node_taints(node):
        if taint.get("effect") in _NO_NEW_PODS and not _tolerated(pod, taint):
            return f"node(s) had untolerated taint {{{taint.get('key')}: {taint.get('value', '')}}}"
    if not selects_node(tree.mapping(pod, "spec"), node):
        return "node(s) didn't match Pod's node affinity/selector"
    return ""


def _node_taints(node: Json) -> list[Json]:
    """The taints of the spec, and those that the node's state implies."""
    taints = list(tree.mappings(node, "spec", "taints"))
    if tree.value(node, "spec", "unschedulable"):
        taints.append({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"})
    if condition(node, "Ready").get("status") != "True":
        taints.append({"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"})
    return taints


def _tolerated(pod: Json, taint: Json) -> bool:
    for toleration in tree.mappings(pod, "spec", "tolerations"):
        if toleration.get("effect") not in (None, "", taint.get("effect")):
            continue
        key = toleration.get("key")
        if toleration.get("operator", "Equal") == "Exists":
            if key in (None, "", taint.get("key")):
                return True
        elif key == taint.get("key") and toleration.get("value", "") == taint.get("value", ""):
            return True
    return False


def selects_node(spec: Json, node: Json) -> bool:
    """Whether a pod spec's nodeSelector and required node affinity accept a node."""
    found = tree.mapping(node, "metadata", "labels")
    if any(found.get(k) != v for k, v in tree.mapping(spec, "nodeSelector").items()):
        return False
    hard = "requiredDuringSchedulingIgnoredDuringExecution"
    terms = tree.mappings(spec, "affinity", "nodeAffinity", hard, "nodeSelectorTerms")
    return not terms or any(_term_accepts(term, node) for term in terms)


def _term_accepts(term: Json, node: Json) -> bool:
    found = tree.mapping(node, "metadata", "labels")
    names = {"metadata.name": node["metadata"]["name"]}
    expressions = tree.mappings(term, "matchExpressions")
    fields = tree.mappings(term, "matchFields")
    return bool(expressions or fields) and all(
        [_accepts(one, found) for one in expressions] + [_accepts(one, names) for one in fields]
    )


def _accepts(requirement: Json, found: Json) -> bool:
    value = found.get(requirement.get("key", ""))
    values = tree.texts(requirement, "values")
    match requirement.get("operator"):
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt" as operator:
            try:
                have, limit = int(value or ""), int(values[0])
            except (ValueError, IndexError):
                return False
            return have > limit if operator == "Gt" else have < limit
        case _:
            return False
