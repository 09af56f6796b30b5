"""Pods from templates: what all workload controllers share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.registry import Registry, clone
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.selectors import label_selector
from podwire.lab.api.storage import Event, Key, Record, encode
from podwire.lab.controllers.base import (
    Controller,
    controller_of,
    is_done,
    is_going,
    is_ready,
    labels,
    owner_reference,
)
from podwire.lab.controllers.owners import OwnerIndex

_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"


def template_hash(template: Json) -> str:
    """A short name for a template's content, as pod-template-hash has it."""
    number = int.from_bytes(hashlib.sha256(encode(_sorted(template))).digest()[:6], "big")
    out = ""
    for _ in range(9):
        number, digit = divmod(number, len(_ALPHABET))
        out += _ALPHABET[digit]
    return out


def _sorted(value: object) -> object:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}  # pyright: ignore
    if isinstance(value, list):
        return [_sorted(item) for item in value]  # pyright: ignore
    return value


class Counts(NamedTuple):
    """How many pods there are, and how many are ready."""

    total: int
    ready: int


def count(pods: Iterable[Record]) -> Counts:
    """Counts of the pods that are neither done nor going."""
    alive = [pod for pod in pods if not is_going(pod) and not is_done(pod.obj)]
    return Counts(len(alive), sum(1 for pod in alive if is_ready(pod.obj)))


class WorkloadController(Controller):
    """Keys are workloads of one kind; their own events and those of their pods count."""

    kind: str
    api_version = "apps/v1"
    owned = ("Pod",)

    def __init__(self, registry: Registry, owners: OwnerIndex) -> None:
        super().__init__(registry)
        self.owners = owners
        self.kinds = {self.kind, "Pod", *self.owned}
        self.resource: ApiResource = registry.resource(self.kind, self.api_version)
        self.pods: ApiResource = registry.resource("Pod")

    def wants(self, event: Event) -> Iterable[Key]:
        if event.resource == self.resource:
            yield event.record.key
        elif event.resource.kind in self.owned:
            owner = controller_of(event.record.obj)
            if owner.get("kind") == self.kind:
                yield (event.record.key[0], owner["name"])

    def reconcile(self, key: Key) -> None:
        workload = self.registry.find(self.resource, *key)
        if workload is not None and not is_going(workload):
            self.sync(workload)

    def sync(self, workload: Record) -> None:
        raise NotImplementedError

    # --- its pods --------------------------------------------------------------------------------

    def claimed(self, workload: Record) -> list[Record]:
        """The pods it controls, after taking in matching strays and letting go of others."""
        selects = label_selector(tree.mapping(workload.obj, "spec", "selector"))
        mine = self.owners.controlled(workload, "Pod")
        for pod in mine:
            if not selects(labels(pod)) and not is_going(pod):
                uid = workload.obj["metadata"]["uid"]
                references = tree.mappings(pod.obj, "metadata", "ownerReferences")
                self._own(pod, [one for one in references if one.get("uid") != uid])
        for key in self.owners.strays(workload.key[0]):
            pod = self.registry.find(self.pods, *key)
            if pod is None or is_going(pod) or not selects(labels(pod)):
                continue
            references = tree.mappings(pod.obj, "metadata", "ownerReferences")
            self._own(pod, [*references, owner_reference(self.resource, workload)])
        return self.owners.controlled(workload, "Pod")

    def _own(self, pod: Record, references: list[Json]) -> None:
        metadata = {**pod.obj["metadata"], "ownerReferences": references}
        self.registry.amend(self.pods, pod.key, metadata=metadata)

    def create_pod(self, workload: Record, *, name: str = "", **more: Json) -> Record:
        """One pod from the template; `labels` and `spec` among `more` are put on top."""
        template = clone(tree.mapping(workload.obj, "spec", "template"))
        given = tree.mapping(template, "metadata")
        metadata: Json = {
            "labels": {**tree.mapping(given, "labels"), **more.get("labels", {})},
            "ownerReferences": [owner_reference(self.resource, workload)],
        }
        if given.get("annotations"):
            metadata["annotations"] = given["annotations"]
        if name:
            metadata["name"] = name
        else:
            metadata["generateName"] = f"{workload.key[1]}-"
        spec = {**template.get("spec", {}), **more.get("spec", {})}
        return self.registry.create(
            self.pods, workload.key[0], {"metadata": metadata, "spec": spec}
        )

    def remove_pod(self, pod: Record) -> None:
        self.delete(self.pods, pod.key)

    def set_status(self, workload: Record, **fields: object) -> None:
        """Fields of None are removed."""
        current = self.registry.find(self.resource, *workload.key)
        if current is None:
            return
        generation = current.obj["metadata"].get("generation", 0)
        status = {**tree.mapping(current.obj, "status"), "observedGeneration": generation, **fields}
        status = {name: value for name, value in status.items() if value is not None}
        self.registry.amend(self.resource, workload.key, status=status)


def share(value: Any, whole: int, rounded: Callable[[float], int]) -> int:
    """A count that is given in pods or as a percentage of `whole`."""
    if isinstance(value, str) and value.endswith("%"):
        return rounded(whole * int(value[:-1]) / 100)
    return int(value)


def deletion_rank(pod: Record) -> tuple[bool, bool, bool, str]:
    """Who goes first: not placed, not running, not ready, then the youngest."""
    status = tree.mapping(pod.obj, "status")
    return (
        bool(tree.text(pod.obj, "spec", "nodeName")),
        status.get("phase") == "Running",
        is_ready(pod.obj),
        pod.obj["metadata"]["creationTimestamp"],
    )
