"""StatefulSets, DaemonSets and Jobs."""

from __future__ import annotations

from collections.abc import Iterable

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.registry import Registry, timestamp
from podwire.lab.api.storage import Event, Key, Record
from podwire.lab.controllers.base import (
    condition,
    is_done,
    is_going,
    is_ready,
    labels,
    with_condition,
)
from podwire.lab.controllers.owners import OwnerIndex
from podwire.lab.controllers.pods import WorkloadController, count, share, template_hash
from podwire.lab.controllers.scheduler import node_refusal

_REVISION = "controller-revision-hash"


class StatefulSetController(WorkloadController):
    """Pods with ordinals, one after the other unless podManagementPolicy is Parallel."""

    kind = "StatefulSet"

    def sync(self, workload: Record) -> None:
        spec = tree.mapping(workload.obj, "spec")
        start = tree.value(spec, "ordinals", "start") or 0
        wanted = range(start, start + (spec.get("replicas") or 0))
        revision = template_hash(tree.mapping(spec, "template"))
        pods = {
            ordinal: pod
            for pod in self.claimed(workload)
            if (ordinal := _ordinal(workload, pod)) is not None
        }
        parallel = spec.get("podManagementPolicy") == "Parallel"
        if self._fill(workload, pods, wanted, revision, parallel=parallel):
            self._shrink(pods, wanted, parallel=parallel)
            self._update(workload, pods, wanted, revision)
        self._report(workload, wanted, revision)

    def _fill(
        self,
        workload: Record,
        pods: dict[int, Record],
        wanted: range,
        revision: str,
        *,
        parallel: bool,
    ) -> bool:
        """Create what is missing; false while the order makes us wait."""
        for ordinal in wanted:
            pod = pods.get(ordinal)
            if pod and is_done(pod.obj) and not is_going(pod):
                self.remove_pod(pod)
                pod = self.registry.find(self.pods, *pod.key)
            if pod is None and ordinal not in pods:
                pod = self._create(workload, ordinal, revision)
            if not parallel and (pod is None or is_going(pod) or not is_ready(pod.obj)):
                return False
        return True

    def _create(self, workload: Record, ordinal: int, revision: str) -> Record:
        name = f"{workload.key[1]}-{ordinal}"
        extra = {
            "statefulset.kubernetes.io/pod-name": name,
            "apps.kubernetes.io/pod-index": str(ordinal),
            _REVISION: revision,
        }
        spec: Json = {"hostname": name}
        if service := tree.text(workload.obj, "spec", "serviceName"):
            spec["subdomain"] = service
        return self.create_pod(workload, name=name, labels=extra, spec=spec)

    def _shrink(self, pods: dict[int, Record], wanted: range, *, parallel: bool) -> None:
        for ordinal in sorted(set(pods) - set(wanted), reverse=True):
            if not is_going(pods[ordinal]):
                self.remove_pod(pods[ordinal])
            if not parallel:
                return

    def _update(
        self, workload: Record, pods: dict[int, Record], wanted: range, revision: str
    ) -> None:
        """Replace pods of an older template, the highest ordinal first, one at a time."""
        strategy = tree.mapping(workload.obj, "spec", "updateStrategy")
        if strategy.get("type") == "OnDelete":
            return
        partition = tree.value(strategy, "rollingUpdate", "partition") or 0
        for ordinal in reversed(wanted):
            pod = pods.get(ordinal)
            if pod is None or ordinal < partition:
                continue
            if labels(pod).get(_REVISION) != revision and not is_going(pod):
                self.remove_pod(pod)
                return
            if is_going(pod) or not is_ready(pod.obj):
                return

    def _report(self, workload: Record, wanted: range, revision: str) -> None:
        pods = self.owners.controlled(workload, "Pod")
        found = count(pods)
        new = count(pod for pod in pods if labels(pod).get(_REVISION) == revision)
        whole = new.total >= len(wanted) and new.ready == found.ready
        before = tree.text(workload.obj, "status", "currentRevision") or revision
        current = revision if whole else before
        self.set_status(
            workload,
            replicas=found.total,
            readyReplicas=found.ready,
            availableReplicas=found.ready,
            updatedReplicas=new.total,
            currentReplicas=new.total if whole else found.total - new.total,
            currentRevision=current,
            updateRevision=revision,
            collisionCount=0,
        )


def _ordinal(workload: Record, pod: Record) -> int | None:
    base, _, number = pod.key[1].rpartition("-")
    return int(number) if base == workload.key[1] and number.isdigit() else None


class DaemonSetController(WorkloadController):
    """One pod on every node that accepts it; the nodes' events count too."""

    kind = "DaemonSet"

    def __init__(self, registry: Registry, owners: OwnerIndex) -> None:
        super().__init__(registry, owners)
        self.kinds = {self.kind, "Pod", "Node"}
        self._nodes = registry.resource("Node")

    def wants(self, event: Event) -> Iterable[Key]:
        yield from super().wants(event)
        if event.resource == self._nodes:
            yield from list(self.registry.storage.collection(self.resource).records)

    def sync(self, workload: Record) -> None:
        template = tree.mapping(workload.obj, "spec", "template")
        revision = template_hash(template)
        probe = {"spec": _daemon_spec(tree.mapping(template, "spec"))}
        nodes = self.registry.storage.collection(self._nodes).records.values()
        eligible = {node.key[1] for node in nodes if not node_refusal(probe, node.obj)}
        by_node: dict[str, list[Record]] = {}
        for pod in self.claimed(workload):
            by_node.setdefault(tree.text(pod.obj, "spec", "nodeName"), []).append(pod)
        for name, pods in by_node.items():
            for pod in pods[0 if name not in eligible else 1 :]:
                if not is_going(pod):
                    self.remove_pod(pod)
        for name in sorted(eligible):
            here = by_node.get(name, [])
            if here and is_done(here[0].obj) and not is_going(here[0]):
                self.remove_pod(here[0])
            elif not here:
                spec = {"tolerations": probe["spec"]["tolerations"], "nodeName": name}
                self.create_pod(workload, labels={_REVISION: revision}, spec=spec)
        self._update(workload, by_node, eligible, revision)
        self._report(workload, eligible, revision)

    def _update(
        self,
        workload: Record,
        by_node: dict[str, list[Record]],
        eligible: set[str],
        revision: str,
    ) -> None:
        strategy = tree.mapping(workload.obj, "spec", "updateStrategy")
        if strategy.get("type") == "OnDelete":
            return
        limit = tree.value(strategy, "rollingUpdate", "maxUnavailable")
        allowed = max(share(1 if limit is None else limit, len(eligible), round), 1)
        pods = [by_node[name][0] for name in sorted(eligible) if by_node.get(name)]
        away = len(eligible) - sum(1 for p in pods if is_ready(p.obj) and not is_going(p))
        for pod in pods:
            if labels(pod).get(_REVISION) == revision or is_going(pod):
                continue
            serving = is_ready(pod.obj)
            if not serving or away < allowed:
                away += serving
                self.remove_pod(pod)

    def _report(self, workload: Record, eligible: set[str], revision: str) -> None:
        pods = self.owners.controlled(workload, "Pod")
        found = count(pods)
        new = count(pod for pod in pods if labels(pod).get(_REVISION) == revision)
        self.set_status(
            workload,
            desiredNumberScheduled=len(eligible),
            currentNumberScheduled=found.total,
            numberMisscheduled=0,
            numberReady=found.ready,
            numberAvailable=found.ready,
            numberUnavailable=max(len(eligible) - found.ready, 0) or None,
            updatedNumberScheduled=new.total,
        )


_DAEMON_TOLERATIONS = ("not-ready", "unreachable", "unschedulable", "disk-pressure",
                       "memory-pressure", "pid-pressure", "network-unavailable")  # fmt: skip


def _daemon_spec(spec: Json) -> Json:
    """The template's spec with the tolerations that every daemon has."""
    tolerations = [
        *tree.mappings(spec, "tolerations"),
        *({"key": f"node.kubernetes.io/{n}", "operator": "Exists"} for n in _DAEMON_TOLERATIONS),
    ]
    return {**spec, "tolerations": tolerations}


class JobController(WorkloadController):
    """Pods until enough have succeeded, or too many have failed."""

    kind = "Job"
    api_version = "batch/v1"

    def sync(self, workload: Record) -> None:
        job = self._selecting(workload)
        if condition(job.obj, "Complete") or condition(job.obj, "Failed"):
            return
        spec = job.obj["spec"]
        pods = self.owners.controlled(job, "Pod")
        phases = [tree.text(pod.obj, "status", "phase") for pod in pods]
        succeeded, failed = phases.count("Succeeded"), phases.count("Failed")
        active = [pod for pod in pods if not is_done(pod.obj) and not is_going(pod)]
        wanted = min(spec.get("parallelism", 1), max(spec.get("completions", 1) - succeeded, 0))
        result = ""
        if succeeded >= spec.get("completions", 1):
            result = "Complete"
        elif failed > spec.get("backoffLimit", 6):
            result, wanted = "Failed", 0
        if spec.get("suspend"):
            wanted = 0
        for pod in active[wanted:]:
            self.remove_pod(pod)
        for _ in range(wanted - len(active)):
            self._create(job, pods, indexed=spec.get("completionMode") == "Indexed")
            pods = self.owners.controlled(job, "Pod")
        self._report(job, wanted, succeeded, failed, result)

    def _selecting(self, job: Record) -> Record:
        """A Job without selector gets one of its own, as the API server gives it."""
        uid = job.obj["metadata"]["uid"]
        if tree.mapping(job.obj, "spec", "selector"):
            return job
        extra = {"batch.kubernetes.io/controller-uid": uid, "job-name": job.key[1]}
        template = tree.mapping(job.obj, "spec", "template")
        found = tree.mapping(template, "metadata")
        metadata = {**found, "labels": {**tree.mapping(found, "labels"), **extra}}
        spec = {
            **job.obj["spec"],
            "selector": {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}},
            "template": {**template, "metadata": metadata},
        }
        done = self.registry.amend(self.resource, job.key, spec=spec)
        assert done
        return done

    def _create(self, job: Record, pods: list[Record], *, indexed: bool) -> None:
        if not indexed:
            self.create_pod(job)
            return
        name = "batch.kubernetes.io/job-completion-index"
        alive = [pod for pod in pods if tree.text(pod.obj, "status", "phase") != "Failed"]
        taken = {labels(pod).get(name) for pod in alive}
        index = next(str(i) for i in range(len(taken) + 1) if str(i) not in taken)
        self.create_pod(job, labels={name: index}, spec={"hostname": f"{job.key[1]}-{index}"})

    def _report(self, job: Record, active: int, succeeded: int, failed: int, result: str) -> None:
        now = timestamp(self.registry.now())
        conditions = tree.mappings(job.obj, "status", "conditions")
        if result:
            entry = {"type": result, "status": "True"}
            conditions = with_condition(self.registry, job.obj, entry)
        self.set_status(
            job,
            startTime=tree.text(job.obj, "status", "startTime") or now,
            completionTime=now if result == "Complete" else None,
            active=active or None,
            succeeded=succeeded or None,
            failed=failed or None,
            conditions=conditions or None,
            observedGeneration=None,
        )


class ReplicationControllerController(WorkloadController):
    """The ancestor of ReplicaSets, for old manifests: its selector is a plain map."""

    kind = "ReplicationController"
    api_version = "v1"

    def sync(self, workload: Record) -> None:
        pods = self.owners.controlled(workload, "Pod")
        alive = [pod for pod in pods if not is_going(pod) and not is_done(pod.obj)]
        wanted = tree.value(workload.obj, "spec", "replicas") or 0
        for _ in range(wanted - len(alive)):
            self.create_pod(workload)
        for pod in alive[wanted:]:
            self.remove_pod(pod)
        found = count(self.owners.controlled(workload, "Pod"))
        self.set_status(
            workload, replicas=found.total, readyReplicas=found.ready,
            availableReplicas=found.ready,
        )  # fmt: skip
