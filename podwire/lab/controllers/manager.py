"""All controllers of one API server, started and stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from podwire.lab.api.registry import Registry
from podwire.lab.api.storage import Event
from podwire.lab.controllers.base import Controller
from podwire.lab.controllers.cron import CronJobController
from podwire.lab.controllers.endpoints import EndpointSliceController
from podwire.lab.controllers.nodes import LoadBalancerController, NodeController
from podwire.lab.controllers.owners import GarbageCollector, NamespaceController, OwnerIndex
from podwire.lab.controllers.replicas import DeploymentController, ReplicaSetController
from podwire.lab.controllers.scheduler import Scheduler
from podwire.lab.controllers.workloads import (
    DaemonSetController,
    JobController,
    ReplicationControllerController,
    StatefulSetController,
)


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """CIDRs are one per family, the primary family first."""

    cluster_cidrs: Sequence[str] = ("10.244.0.0/16",)
    load_balancer_cidrs: Sequence[str] = ("198.51.100.0/25",)


class ControllerManager:
    """`start` inside the loop that serves `registry`; `settle` drives all of it without a loop."""

    def __init__(
        self,
        registry: Registry,
        config: ControllerConfig = ControllerConfig(),
    ) -> None:
        owners = OwnerIndex(registry)
        self._controllers: list[Controller] = [
            NamespaceController(registry),
            GarbageCollector(registry, owners),
            NodeController(registry, config.cluster_cidrs),
            Scheduler(registry),
            LoadBalancerController(registry, config.load_balancer_cidrs),
            EndpointSliceController(registry, owners),
            DeploymentController(registry, owners),
            ReplicaSetController(registry, owners),
            ReplicationControllerController(registry, owners),
            StatefulSetController(registry, owners),
            DaemonSetController(registry, owners),
            JobController(registry, owners),
            CronJobController(registry, owners),
        ]
        self._interested: dict[str, list[Controller]] = {}
        for collection in registry.storage.collections():
            for record in collection.records.values():
                self._observe(Event(collection.resource, "ADDED", record, None))
        registry.storage.observe(self._observe)

    def _observe(self, event: Event) -> None:
        kind = event.resource.kind
        interested = self._interested.get(kind)
        if interested is None:
            interested = self._interested[kind] = [
                one for one in self._controllers if not one.kinds or kind in one.kinds
            ]
        for controller in interested:
            controller.observe(event)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        for controller in self._controllers:
            controller.start(loop)

    def stop(self) -> None:
        for controller in self._controllers:
            controller.stop()

    def settle(self) -> None:
        """Until no controller has anything to do."""
        while sum(controller.settle() for controller in self._controllers):
            pass
