"""ReplicaSets, and Deployments that roll from one ReplicaSet to the next."""

from __future__ import annotations

import math
from collections.abc import Iterable

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.registry import Registry, clone
from podwire.lab.api.storage import Event, Key, Record
from podwire.lab.controllers.base import (
    controller_of,
    is_done,
    is_going,
    labels,
    owner_reference,
    with_condition,
)
from podwire.lab.controllers.owners import OwnerIndex
from podwire.lab.controllers.pods import (
    WorkloadController,
    count,
    deletion_rank,
    share,
    template_hash,
)

_HASH = "pod-template-hash"
_REVISION = "deployment.kubernetes.io/revision"
_DESIRED = "deployment.kubernetes.io/desired-replicas"


class ReplicaSetController(WorkloadController):
    """As many pods as wanted; done ones are replaced."""

    kind = "ReplicaSet"

    def sync(self, workload: Record) -> None:
        pods = self.claimed(workload)
        alive = [pod for pod in pods if not is_going(pod) and not is_done(pod.obj)]
        wanted = tree.value(workload.obj, "spec", "replicas") or 0
        for _ in range(wanted - len(alive)):
            self.create_pod(workload)
        if len(alive) > wanted:
            for pod in sorted(alive, key=deletion_rank)[: len(alive) - wanted]:
                self.remove_pod(pod)
        found = count(self.owners.controlled(workload, "Pod"))
        self.set_status(
            workload,
            replicas=found.total,
            fullyLabeledReplicas=found.total,
            readyReplicas=found.ready,
            availableReplicas=found.ready,
        )


class DeploymentController(WorkloadController):
    """One ReplicaSet per template; the rolling update keeps within maxSurge and maxUnavailable."""

    kind = "Deployment"
    owned = ("ReplicaSet",)

    def __init__(self, registry: Registry, owners: OwnerIndex) -> None:
        super().__init__(registry, owners)
        self._sets = registry.resource("ReplicaSet", "apps/v1")

    def wants(self, event: Event) -> Iterable[Key]:
        yield from super().wants(event)
        if event.resource == self.pods and event.type == "DELETED":  # Recreate waits for this
            owner = controller_of(event.record.obj)
            found = self.registry.find(self._sets, event.record.key[0], owner.get("name", ""))
            if found and (deployment := controller_of(found.obj)):
                yield (found.key[0], deployment["name"])

    def sync(self, workload: Record) -> None:
        sets = self.owners.controlled(workload, "ReplicaSet")
        template = tree.mapping(workload.obj, "spec", "template")
        name = template_hash(template)
        new = next((one for one in sets if labels(one).get(_HASH) == name), None)
        old = sorted(
            (one for one in sets if one is not new), key=lambda one: _revision(one), reverse=True
        )
        if not tree.value(workload.obj, "spec", "paused"):
            new = self._current(workload, new, old, name)
            if tree.text(workload.obj, "spec", "strategy", "type") == "Recreate":
                self._recreate(workload, new, old)
            else:
                self._roll(workload, new, old)
            self._forget(workload, old)
        self._report(workload, name)

    # --- ReplicaSets -----------------------------------------------------------------------------

    def _current(
        self, workload: Record, new: Record | None, old: list[Record], name: str
    ) -> Record:
        """The ReplicaSet of the present template, with the highest revision."""
        revision = max(map(_revision, old), default=0) + 1
        if new is None:
            new = self._create(workload, name, revision)
        elif old and _revision(new) < revision:  # rolled back: an old one is the newest again
            new = self._annotate(new, {_REVISION: str(revision)})
        wanted = str(_revision(new))
        if tree.mapping(workload.obj, "metadata", "annotations").get(_REVISION) != wanted:
            annotations = {
                **tree.mapping(workload.obj, "metadata", "annotations"),
                _REVISION: wanted,
            }
            metadata = {**workload.obj["metadata"], "annotations": annotations}
            self.registry.amend(self.resource, workload.key, metadata=metadata)
        return new

    def _create(self, workload: Record, name: str, revision: int) -> Record:
        spec = workload.obj["spec"]
        template = clone(spec["template"])
        found = tree.mapping(template, "metadata", "labels")
        template.setdefault("metadata", {})["labels"] = {**found, _HASH: name}
        selector = clone(spec["selector"])
        selector["matchLabels"] = {**(selector.get("matchLabels") or {}), _HASH: name}
        metadata: Json = {
            "name": f"{workload.key[1]}-{name}",
            "labels": template["metadata"]["labels"],
            "annotations": {
                **_inherited(workload),
                _REVISION: str(revision),
                _DESIRED: str(spec.get("replicas", 1)),
            },
            "ownerReferences": [owner_reference(self.resource, workload)],
        }
        body = {
            "metadata": metadata,
            "spec": {"replicas": 0, "selector": selector, "template": template},
        }
        return self.registry.create(self._sets, workload.key[0], body)

    def _annotate(self, one: Record, annotations: Json) -> Record:
        kept = tree.mapping(one.obj, "metadata", "annotations")
        metadata = {**one.obj["metadata"], "annotations": {**kept, **annotations}}
        done = self.registry.amend(self._sets, one.key, metadata=metadata)
        assert done
        return done

    def _scale(self, one: Record, replicas: int) -> None:
        spec = {**one.obj["spec"], "replicas": replicas}
        self.registry.amend(self._sets, one.key, spec=spec)

    def _forget(self, workload: Record, old: list[Record]) -> None:
        """Empty ReplicaSets beyond the history that is to be kept."""
        limit = tree.value(workload.obj, "spec", "revisionHistoryLimit")
        empty = [one for one in old if not _wanted(one) and not _status(one, "replicas")]
        for one in empty[10 if limit is None else limit :]:
            self.delete(self._sets, one.key)

    # --- the roll --------------------------------------------------------------------------------

    def _recreate(self, workload: Record, new: Record, old: list[Record]) -> None:
        for one in old:
            if _wanted(one):
                self._scale(one, 0)
        # what the old ones still have must be gone before the first new pod
        if not any(self.owners.controlled(one, "Pod") for one in old):
            self._scale(new, tree.value(workload.obj, "spec", "replicas") or 0)

    def _roll(self, workload: Record, new: Record, old: list[Record]) -> None:
        steps = roll(
            tree.value(workload.obj, "spec", "replicas") or 0,
            tree.mapping(workload.obj, "spec", "strategy", "rollingUpdate"),
            (_wanted(new), _status(new, "availableReplicas")),
            [(_wanted(one), _status(one, "availableReplicas")) for one in reversed(old)],
        )
        for one, replicas in zip([new, *reversed(old)], steps, strict=True):
            self._scale(one, replicas)

    # --- status ----------------------------------------------------------------------------------

    def _report(self, workload: Record, name: str) -> None:
        current = self.registry.find(self.resource, *workload.key)
        if current is None:
            return
        wanted = tree.value(current.obj, "spec", "replicas") or 0
        sets = self.owners.controlled(workload, "ReplicaSet")
        new = [one for one in sets if labels(one).get(_HASH) == name]
        total, ready, available = (
            sum(_status(one, field) for one in sets)
            for field in ("replicas", "readyReplicas", "availableReplicas")
        )
        updated = sum(_status(one, "replicas") for one in new)
        rolling = tree.mapping(current.obj, "spec", "strategy", "rollingUpdate")
        least = wanted - _limits(wanted, rolling)[1]
        done = updated == wanted == total == available
        conditions = with_condition(self.registry, current.obj, _available(available >= least))
        conditions = with_condition(
            self.registry,
            {"status": {"conditions": conditions}},
            _progressing(f"{workload.key[1]}-{name}", done),
        )
        self.set_status(
            workload,
            replicas=total,
            updatedReplicas=updated,
            readyReplicas=ready,
            availableReplicas=available,
            unavailableReplicas=max(wanted - available, 0) or None,
            conditions=conditions,
        )


def _available(enough: bool) -> Json:
    return {
        "type": "Available",
        "status": "True" if enough else "False",
        "reason": f"MinimumReplicas{'Available' if enough else 'Unavailable'}",
        "message": f"Deployment {'has' if enough else 'does not have'} minimum availability.",
    }


def _progressing(replica_set: str, done: bool) -> Json:
    how = "has successfully progressed" if done else "is progressing"
    return {
        "type": "Progressing",
        "status": "True",
        "reason": "NewReplicaSetAvailable" if done else "ReplicaSetUpdated",
        "message": f'ReplicaSet "{replica_set}" {how}.',
    }


def roll(wanted: int, rolling: Json, new: tuple[int, int], old: list[tuple[int, int]]) -> list[int]:
    """The next replica counts: the new set's, then the old ones' (the oldest first).

    Sets are given as (replicas, available). Pure. As in pkg/controller/deployment/rolling.go.
    """
    surge, unavailable = _limits(wanted, rolling)
    replicas, available = new
    others = sum(have for have, _ in old)
    room = wanted + surge - replicas - others
    grown = wanted if replicas > wanted else min(wanted, replicas + max(room, 0))
    # every pod of the new set that is not available yet counts against the old ones
    total = replicas + others
    spare = total - (wanted - unavailable) - (replicas - min(available, replicas))
    out: list[int] = []
    for have, ready in old:  # pods that serve nobody go first
        broken = min(have - min(ready, have), max(spare, 0))
        out.append(have - broken)
        spare -= broken
    serving = min(available, replicas) + sum(min(ready, have) for have, ready in old)
    excess = serving - (wanted - unavailable)
    for i, have in enumerate(out):
        down = min(have, max(min(excess, spare), 0))
        out[i] = have - down
        excess -= down
        spare -= down
    return [grown, *out]


def _limits(wanted: int, rolling: Json) -> tuple[int, int]:
    """maxSurge (rounded up) and maxUnavailable (rounded down) in pods; not both zero."""
    surge = share(rolling.get("maxSurge", "25%"), wanted, math.ceil)
    unavailable = share(rolling.get("maxUnavailable", "25%"), wanted, math.floor)
    return (surge, unavailable) if surge or unavailable else (0, 1)


def _revision(one: Record) -> int:
    text = tree.mapping(one.obj, "metadata", "annotations").get(_REVISION, "0")
    return int(text) if text.isdigit() else 0


def _wanted(one: Record) -> int:
    return tree.value(one.obj, "spec", "replicas") or 0


def _status(one: Record, field: str) -> int:
    return tree.value(one.obj, "status", field) or 0


def _inherited(workload: Record) -> Json:
    kept = tree.mapping(workload.obj, "metadata", "annotations")
    dropped = ("kubectl.kubernetes.io/last-applied-configuration", _REVISION)
    return {key: value for key, value in kept.items() if key not in dropped}
