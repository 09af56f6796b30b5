"""What no pod waits for: compare with EC2, give back, sweep, tie ENIs to the instance's life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any, Generic, TypeVar

from podwire.ipam.vpc import plan
from podwire.ipam.vpc.cloud import CloudError, Metadata, MetaEni
from podwire.ipam.vpc.limits import InstanceLimits
from podwire.ipam.vpc.metrics import Metrics
from podwire.ipam.vpc.pool import PoolStats, slots_per_eni, surplus
from podwire.ipam.vpc.steps import Context, Steps
from podwire.ipam.vpc.sweeper import sweep
from podwire.ipam.vpc.tags import unmanaged
from podwire.net import Prefix

log = logging.getLogger(__name__)

OwnerT = TypeVar("OwnerT", bound=Hashable)

SHRINK_EVERY_S = 30.0
COMPARE_EVERY_S = 60.0
LOOK_AGAIN_S = 5.0
SWEEP_EVERY_S = 3600.0
SWEEP_SPREAD_S = 300.0  # so that the nodes of a cluster do not all ask at once
SETTLED_S = 60.0  # age from which an ENI is worth the request that ties it to the instance


class Upkeep(Generic[OwnerT]):
    """The manager asks it at every look what is due. `stats` counts what is in flight in."""

    def __init__(
        self,
        context: Context[OwnerT],
        steps: Steps[OwnerT],
        metadata: Metadata,
        limits: InstanceLimits,
        metrics: Metrics,
        stats: Callable[[], PoolStats],
        wake: Callable[[], None],
    ) -> None:
        self._c, self._steps, self._store = context, steps, context.store
        self._metadata, self._limits, self._metrics = metadata, limits, metrics
        self._stats, self._wake = stats, wake
        self._random, self._settings = context.randomness, context.settings
        now = context.now()
        self._compare_at = now + COMPARE_EVERY_S
        self._shrink_at = now + SHRINK_EVERY_S
        self._sweep_at = now + self._random.uniform(LOOK_AGAIN_S, SWEEP_SPREAD_S)
        self.must_ask_ec2 = False  # the books may differ from EC2, whatever the metadata shows
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def look(self, now: float, quiet: bool) -> list[float]:
        """Start what is due; some of it only when all is `quiet`. Returns when each is due next."""
        if now >= self._compare_at:
            self._compare_at = now + COMPARE_EVERY_S
            self._background("compare", self._compare)
        if now >= self._sweep_at or self._steps.orphans_likely:
            self._steps.orphans_likely = False
            self._sweep_at = now + SWEEP_EVERY_S + self._random.uniform(0, SWEEP_SPREAD_S)
            self._background("sweep", self._sweep)
        due = [self._compare_at, self._sweep_at]
        if not quiet:
            return due
        if now >= self._shrink_at and not self._steps.flights:
            self._shrink_at = now + SHRINK_EVERY_S
            self._shrink()
        return [*due, max(self._shrink_at, now + 1), self._tie(now)]

    def look_at_ec2_soon(self, delay_s: float = 0.0) -> None:
        """The books may differ from EC2."""
        self.must_ask_ec2 = True
        self._compare_at = min(self._compare_at, self._c.now() + delay_s)
        self._wake()

    def _background(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `work` as a task, unless the last one of that name still runs."""
        running = self.tasks.get(name)
        if running is None or running.done():
            self.tasks[name] = asyncio.create_task(self._guarded(name, work))

    async def _guarded(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except CloudError as error:
            self._c.reports.note(error)
            again = self._c.now() + LOOK_AGAIN_S * self._random.uniform(0.5, 1.5)
            if name == "compare":
                self._compare_at = min(self._compare_at, again)
            else:
                self._sweep_at = min(self._sweep_at, again + SETTLED_S)
        self._wake()

    async def _compare(self) -> None:
        """Hold the books against the metadata service, and against EC2 when they differ."""
        await self._steps.mend()
        if not self.must_ask_ec2 and self._same(await self._metadata.enis()):
            return
        self.must_ask_ec2 = True
        asked_at = self._store.turn
        records = await self._c.cloud.attached_enis(self._c.instance.id)
        self.must_ask_ec2 = False
        self._metrics.reconciles.labels("ec2").inc()
        busy = {flight.eni for flight in self._steps.flights} | self._steps.own
        for eni_id in busy:
            self._store.touch(eni_id)
        changes = self._store.observe((r for r in records if r.id not in busy), asked_at)
        for record in changes.new:
            await self._steps.adopt(record)
        for record in changes.lost:
            log.warning("ENI %s is gone from EC2; pods on it are cut off", record.id)
            self._metrics.forced_enis.inc()
            await self._steps.tear_down(record)
        self._metrics.forced_ips.inc(changes.lost_cidrs)
        if changes.doubtful:
            self.look_at_ec2_soon(LOOK_AGAIN_S)

    def _same(self, seen: Sequence[MetaEni]) -> bool:
        """Whether the metadata service shows what the books hold. It may lag behind."""
        shown = {eni.id: eni.cidrs for eni in seen}
        return shown == {id: frozenset(eni.cidrs) for id, eni in self._store.enis.items()}

    def _shrink(self) -> None:
        """Give back what the targets do not ask for: whole ENIs first, then single units."""
        slots = slots_per_eni(self._settings, self._limits)
        usable = [eni for eni in self._store.enis.values() if eni.usable]
        views = [self._store.view(eni, slots) for eni in usable]
        for eni_id in plan.enis_to_release(views, self._stats(), self._settings, self._limits):
            self._steps.let_go(eni_id)
        if not self._c.subnets.all_fragmented():
            for eni in filter(lambda eni: eni.record.id in self._store.enis, usable):
                idle = self._store.idle_cidrs(eni.record.id)
                if wrong := [cidr for cidr in idle if not self._right_kind(cidr)]:
                    self._steps.give_back(eni.record.id, wrong)
        over = surplus(self._stats(), self._settings)
        for eni in sorted(usable, key=lambda eni: eni.order, reverse=True):
            if eni.record.id in self._store.enis and over > 0:
                idle = self._store.idle_cidrs(eni.record.id)
                right = [cidr for cidr in idle if self._right_kind(cidr)][:over]
                over -= len(right)
                if right:
                    self._steps.give_back(eni.record.id, right)

    def _right_kind(self, cidr: Prefix) -> bool:
        """Whether it is what the settings ask for, now that prefix delegation is on or off."""
        return (
            cidr.bits == 128
            or self._settings.ipv6
            or (cidr.length < cidr.bits) == self._settings.prefix_delegation
        )

    async def _sweep(self) -> None:
        if self._settings.disable_leaked_eni_cleanup:
            return
        again = await sweep(
            self._c.cloud,
            self._settings,
            self._c.instance,
            busy=self._steps.own,
            now=self._c.wall(),
        )
        if again:
            self._sweep_at = min(self._sweep_at, self._c.now() + SETTLED_S)

    def _tie(self, now: float) -> float:
        """Tie ENIs that stay to the instance, so that they end with it. Returns when next.

        EC2 wants a request of its own for it: not while pods wait, not for ENIs that go soon.
        """
        due = now + COMPARE_EVERY_S
        for id, eni in self._store.enis.items():
            record = eni.record
            if record.primary or record.delete_on_termination or not record.attachment_id:
                continue
            if unmanaged(record, self._settings) or any(f.eni == id for f in self._steps.flights):
                continue
            at = max(eni.added + SETTLED_S, eni.tie_after)
            if now >= at:
                self._steps.tie(id)
            else:
                due = min(due, at)
        return due
