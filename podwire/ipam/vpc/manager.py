"""The address manager: from demand to EC2 calls, and from EC2's answers to addresses.

One loop looks at the books, at who waits and at what is in flight, and starts the steps that
`plan` names; it never waits for a step itself. Everything is level-triggered: a step that fails
leaves the books as they are, and the next look plans again, after a pause when EC2 complains.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from podwire.ipam.pool import Exhausted
from podwire.ipam.vpc import plan
from podwire.ipam.vpc.cloud import Cloud, CloudEni, CloudError, Instance, Metadata, MetaEni
from podwire.ipam.vpc.datastore import Assignment, DataStore
from podwire.ipam.vpc.limits import PREFIX_ADDRESSES, known_limits
from podwire.ipam.vpc.links import HostNetwork
from podwire.ipam.vpc.metrics import Metrics
from podwire.ipam.vpc.pool import Need, PoolStats, need, surplus
from podwire.ipam.vpc.retry import Backoff, retried
from podwire.ipam.vpc.settings import Settings
from podwire.ipam.vpc.steps import Context, Steps
from podwire.ipam.vpc.subnets import Subnets
from podwire.ipam.vpc.sweeper import sweep
from podwire.ipam.vpc.tags import unmanaged
from podwire.net import Prefix

log = logging.getLogger(__name__)

OwnerT = TypeVar("OwnerT", bound=Hashable)

GATHER_S = 0.02  # ADDs that come together are one request
REFILL_S = 1.0  # what is only kept warm may wait for more of its kind
SHRINK_EVERY_S = 30.0
COMPARE_EVERY_S = 60.0
LOOK_AGAIN_S = 5.0
SWEEP_EVERY_S = 3600.0
SETTLED_S = 60.0  # age from which an ENI is worth the request that ties it to the instance
PATIENCE = 1 << 30  # tries of what nothing can go on without
FAILED = "failed to assign an IP address to container"  # what users search for


@dataclass(frozen=True)
class Node:
    """What the agent knows of its node. `max_pods` 0: by the instance type."""

    max_pods: int = 0
    schedulable: bool = True
    terminating: bool = False
    eni_config_subnet: str = ""
    eni_config_groups: tuple[str, ...] = ()


@dataclass(eq=False)
class Waiter(Generic[OwnerT]):
    """An ADD that waits, until its caller gives up at `until`."""

    owner: OwnerT
    until: float
    future: asyncio.Future[Assignment[OwnerT]]


class Manager(Generic[OwnerT]):
    """The address manager of one node. All methods belong to one event loop.

    `clock` counts seconds and outlives restarts (CLOCK_BOOTTIME), `wall` counts them since 1970.
    """

    def __init__(
        self,
        cloud: Cloud,
        metadata: Metadata,
        network: HostNetwork,
        settings: Settings,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
        randomness: random.Random | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.settings, self.metrics = settings, metrics or Metrics()
        self.store: DataStore[OwnerT] = DataStore(clock, settings.cooldown_s)
        self.node = Node()
        self.last_error = ""
        self._cloud, self._metadata, self._network = cloud, metadata, network
        self._clock, self._wall = clock, wall
        self._random = randomness or random.Random()
        self._waiters: deque[Waiter[OwnerT]] = deque()
        self._wake = asyncio.Event()
        self._backoff = Backoff(self._random)
        self._paused_until = 0.0
        self._short_since: float | None = None
        self._shrink_at = self._compare_at = self._sweep_at = 0.0
        self._must_ask_ec2 = False
        self._tasks: dict[str, asyncio.Task[None]] = {}

    # -- life -------------------------------------------------------------------------------

    async def identify(self) -> Instance:
        """Who we are, as the metadata service says now; waits for it."""
        return await retried(self._metadata.instance, Backoff(self._random), PATIENCE)

    async def start(self) -> None:
        """Learn who we are and what EC2 holds, then keep the pool until `close`.

        Waits for the metadata service. While EC2 does not answer, what the metadata service shows
        is used, so that pods come and go on the addresses that are there.
        """
        self.instance = await self.identify()
        known = known_limits(self.instance.type)
        self.limits = known or await retried(
            lambda: self._cloud.limits(self.instance.type), Backoff(self._random), PATIENCE
        )
        self.subnets = Subnets(
            self._cloud,
            self.settings,
            self.instance,
            self._clock,
            custom=lambda: self.node.eni_config_subnet,
        )
        self.steps = Steps(
            Context(
                cloud=self._cloud,
                network=self._network,
                store=self.store,
                subnets=self.subnets,
                settings=self.settings,
                instance=self.instance,
                groups=self._groups,
                now=self._clock,
                wall=self._wall,
                randomness=self._random,
                reports=self,
            )
        )
        now = self._clock()
        self._compare_at = now + COMPARE_EVERY_S
        shown = await retried(self._metadata.enis, Backoff(self._random), PATIENCE)
        records = [self._from_metadata(eni) for eni in shown]
        try:
            await retried(self.subnets.refresh, Backoff(self._random), tries=3)
            if len(shown) > 1:  # of the primary ENI alone EC2 knows nothing that matters
                records = await self._cloud.attached_enis(self.instance.id)
        except CloudError as error:
            self._note(error)
            self.look_at_ec2_soon()
        for record in sorted(records, key=lambda record: record.device_index or 0):
            await self.steps.adopt(record)
        self._shrink_at = now + SHRINK_EVERY_S
        self._sweep_at = now + self._random.uniform(LOOK_AGAIN_S, 300)
        self._tasks["loop"] = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop. Steps under way are cut off; what they leave is found at the next start."""
        tasks = [flight.task for flight in self.steps.flights if flight.task]
        tasks += self._tasks.values()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for waiter in self._waiters:
            waiter.future.cancel()

    def set_node(self, node: Node) -> None:
        """The node's object changed."""
        self.node = node
        self._wake.set()

    def _groups(self) -> Sequence[str]:
        """Security groups of new ENIs: of the node's ENIConfig, else of the primary ENI."""
        return self.node.eni_config_groups or self.instance.groups

    def _from_metadata(self, eni: MetaEni) -> CloudEni:
        if eni.subnet is not None:
            self.subnets.learn(eni.subnet_id, eni.subnet)
        return CloudEni(
            id=eni.id,
            mac=eni.mac,
            subnet_id=eni.subnet_id,
            address=eni.address,
            cidrs=eni.cidrs,
            device_index=eni.device_index,
            card_index=eni.card_index,
            instance_id=self.instance.id,
        )

    # -- pods -------------------------------------------------------------------------------

    async def assign(self, owner: OwnerT, timeout_s: float) -> Assignment[OwnerT]:
        """The owner's address; the same again for a second call.

        Waits for an address that is on its way. Raises Exhausted: at once when the VPC has none
        to give, naming the subnet and the limit; after `timeout_s` with the last error otherwise.
        """
        self.metrics.add_requests.inc()
        start = self._clock()
        assignment = self.store.assignment(owner)
        if assignment is None and not self._waiters:
            assignment = self.store.assign(owner)
        self._wake.set()
        if assignment is None:
            assignment = await self._wait(owner, timeout_s)
        self.metrics.wait.observe(self._clock() - start)
        return assignment

    async def _wait(self, owner: OwnerT, timeout_s: float) -> Assignment[OwnerT]:
        future: asyncio.Future[Assignment[OwnerT]] = asyncio.get_running_loop().create_future()
        waiter = Waiter(owner, self._clock() + timeout_s, future)
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            self.metrics.no_address.inc()
            raise Exhausted(self._why_late(timeout_s)) from None
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def release(self, owner: OwnerT) -> Assignment[OwnerT] | None:
        """The owner's address rests from now on."""
        self.metrics.del_requests.inc()
        assignment = self.store.release(owner)
        self._wake.set()
        return assignment

    def cancel(self, owner: OwnerT) -> None:
        """Take back an address that no pod ever used."""
        self.store.cancel(owner)
        self._wake.set()

    def _serve(self) -> None:
        """Give addresses to those who wait, in the order they came."""
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.future.done():
                assignment = self.store.assign(waiter.owner)
                if assignment is None:
                    return
                waiter.future.set_result(assignment)
            self._waiters.popleft()

    # -- the loop ---------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                delay = self._look()
            except Exception:  # a bug must not end the loop: pods would wait for ever
                log.exception("the address manager failed to plan")
                self.metrics.errors.labels("plan").inc()
                delay = LOOK_AGAIN_S
            try:
                async with asyncio.timeout(delay):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _look(self) -> float:
        """Serve, grow, refuse, and what no pod waits for. Returns seconds until the next look."""
        now = self._clock()
        self._serve()
        due = [self._grow(now), *self._housekeeping(now)]
        self._refuse(now)
        if wakes := self.store.wake():
            due.append(wakes)
        stats = self.store.stats(self._waiting)
        self.metrics.show(len(self.store.enis), stats, self.limits)
        return max(min(due) - self._clock(), 0.001)

    @property
    def _waiting(self) -> int:
        return sum(not waiter.future.done() for waiter in self._waiters)

    def stats(self) -> PoolStats:
        """The pool, with what is in flight counted in."""
        stats = self.store.stats(self._waiting)
        for flight in self.steps.flights:
            if self.settings.prefix_delegation and not flight.singles:
                stats = replace(
                    stats,
                    total=stats.total + PREFIX_ADDRESSES * flight.units,
                    prefixes=stats.prefixes + flight.units,
                    free_prefixes=stats.free_prefixes + flight.units,
                )
            else:
                stats = replace(stats, total=stats.total + flight.units)
        return stats

    def _grow(self, now: float) -> float:
        """Start the steps that the demand asks for. Returns when to look again."""
        later = now + COMPARE_EVERY_S
        stats = self.stats()
        wanted, singles = self._wanted(stats)
        if not wanted.units:
            self._short_since = None
            return later
        if now < self._paused_until:
            return self._paused_until
        if stats.waiting and stats.spare >= 0:
            return later  # what they wait for is on its way; what is kept warm comes after them
        if self._short_since is None:
            self._short_since = now
        gather = GATHER_S if stats.spare < 0 else REFILL_S if stats.demand else 0.0
        if now < self._short_since + gather:
            return self._short_since + gather
        self._short_since = None
        for step in self._plan(wanted, singles):
            self.steps.start(step, singles)
        return later

    def _wanted(self, stats: PoolStats) -> tuple[Need, bool]:
        """What to ask for, and whether in single addresses although prefixes are the rule."""
        settings = self.settings
        if self.node.terminating:
            return Need(0), False
        if not (self.node.schedulable or settings.manage_enis_non_schedulable):
            # A cordoned node keeps nothing warm, but serves who is there.
            return Need(0 if stats.spare >= 0 else -stats.spare), True
        if settings.prefix_delegation and self.subnets.all_fragmented():
            return Need(max(-stats.spare, 0)), True
        max_pods = self.node.max_pods or self.limits.max_pods
        return need(stats, settings, self.limits, max_pods), False

    def _plan(self, wanted: Need, singles: bool) -> list[plan.Step]:
        flights = self.steps.flights
        prefixes = self.settings.prefix_delegation and not singles
        views: list[plan.EniView] = []
        for eni in sorted(self.store.enis.values(), key=lambda eni: eni.order):
            view = self.store.view(eni, self._slots)
            inflight = sum(flight.units for flight in flights if flight.eni == view.id)
            free = min(
                view.free_slots - inflight, self.subnets.left(eni.record.subnet_id, prefixes)
            )
            views.append(replace(view, free_slots=max(free, 0)))
        for flight in flights:
            if flight.creates:  # what it has room for need not be an ENI of its own
                views.append(plan.EniView(flight.eni, free_slots=self._slots - flight.units))
        steps = plan.grow(wanted, views, self._room(prefixes), self._slots)
        busy = {flight.eni for flight in flights}
        # One request per ENI at a time: what comes meanwhile joins the next one.
        return [s for s in steps if isinstance(s, plan.Create) or s.eni not in busy]

    @property
    def _slots(self) -> int:
        return 1 if self.settings.ipv6 else self.limits.slots_per_eni

    def _room(self, prefixes: bool) -> int:
        """ENIs that may be attached now."""
        if self.settings.ipv6 or not self.subnets.choose(prefixes):
            return 0
        moving = sum(flight.creates or flight.leaves for flight in self.steps.flights)
        enis = self.store.enis.values()
        trunk = self.settings.pod_eni and all(eni.record.kind != "trunk" for eni in enis)
        return plan.eni_room(self.limits, self.settings, len(enis) + moving, trunk)

    def _refuse(self, now: float) -> None:
        """Tell those who wait in vain: nothing is on its way and nothing can be asked for."""
        stats = self.stats()
        if not stats.waiting or now < self._paused_until or self._must_ask_ec2:
            return
        if self.steps.flights or self._plan(*self._wanted(stats)):
            return
        rests = iter(sorted(self.store.cooling.values()))
        for waiter in self._waiters:
            if next(rests, waiter.until) < waiter.until or waiter.future.done():
                continue  # an address that rests will be free in time
            self.metrics.no_address.inc()
            waiter.future.set_exception(Exhausted(self._why_exhausted()))

    # -- what no pod waits for --------------------------------------------------------------

    def _housekeeping(self, now: float) -> list[float]:
        """Compare, shrink, sweep, tie ENIs to the instance. Returns when each is due again."""
        if now >= self._compare_at:
            self._compare_at = now + COMPARE_EVERY_S
            self._background("compare", self._compare)
        if now >= self._sweep_at or self.steps.orphans_likely:
            self.steps.orphans_likely = False
            self._sweep_at = now + SWEEP_EVERY_S + self._random.uniform(0, 300)
            self._background("sweep", self._sweep)
        due = [self._compare_at, self._sweep_at]
        if self._waiters or now < self._paused_until:
            return due
        if now >= self._shrink_at and not self.steps.flights:
            self._shrink_at = now + SHRINK_EVERY_S
            self._shrink()
        return [*due, max(self._shrink_at, now + 1), self._tie(now)]

    def _background(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `work` as a task, unless the last one of that name still runs."""
        running = self._tasks.get(name)
        if running is None or running.done():
            self._tasks[name] = asyncio.create_task(self._guarded(name, work))

    async def _guarded(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except CloudError as error:
            self._note(error)
            again = self._clock() + LOOK_AGAIN_S * self._random.uniform(0.5, 1.5)
            if name == "compare":
                self._compare_at = min(self._compare_at, again)
            else:
                self._sweep_at = min(self._sweep_at, again + SETTLED_S)
        self._wake.set()

    async def _compare(self) -> None:
        """Hold the books against the metadata service, and against EC2 when they differ."""
        await self.steps.mend()
        if not self._must_ask_ec2 and self._same(await self._metadata.enis()):
            return
        self._must_ask_ec2 = True
        asked_at = self.store.turn
        records = await self._cloud.attached_enis(self.instance.id)
        self._must_ask_ec2 = False
        self.metrics.reconciles.labels("ec2").inc()
        busy = {flight.eni for flight in self.steps.flights} | self.steps.own
        for eni_id in busy:
            self.store.touch(eni_id)
        changes = self.store.observe((r for r in records if r.id not in busy), asked_at)
        for record in changes.new:
            await self.steps.adopt(record)
        for record in changes.lost:
            log.warning("ENI %s is gone from EC2; pods on it are cut off", record.id)
            self.metrics.forced_enis.inc()
            await self.steps.tear_down(record)
        self.metrics.forced_ips.inc(changes.lost_cidrs)
        if changes.doubtful:
            self.look_at_ec2_soon(LOOK_AGAIN_S)

    def _same(self, seen: Sequence[MetaEni]) -> bool:
        """Whether the metadata service shows what the books hold. It may lag behind."""
        shown = {eni.id: eni.cidrs for eni in seen}
        return shown == {id: frozenset(eni.cidrs) for id, eni in self.store.enis.items()}

    def _shrink(self) -> None:
        """Give back what the targets do not ask for: whole ENIs first, then single units."""
        usable = [eni for eni in self.store.enis.values() if eni.usable]
        views = [self.store.view(eni, self._slots) for eni in usable]
        for eni_id in plan.enis_to_release(views, self.stats(), self.settings, self.limits):
            self.steps.let_go(eni_id)
        if not self.subnets.all_fragmented():
            for eni in filter(lambda eni: eni.record.id in self.store.enis, usable):
                idle = self.store.idle_cidrs(eni.record.id)
                if wrong := [cidr for cidr in idle if not self._right_kind(cidr)]:
                    self.steps.give_back(eni.record.id, wrong)
        over = surplus(self.stats(), self.settings)
        for eni in sorted(usable, key=lambda eni: eni.order, reverse=True):
            if eni.record.id in self.store.enis and over > 0:
                idle = self.store.idle_cidrs(eni.record.id)
                right = [cidr for cidr in idle if self._right_kind(cidr)][:over]
                over -= len(right)
                if right:
                    self.steps.give_back(eni.record.id, right)

    def _right_kind(self, cidr: Prefix) -> bool:
        """Whether it is what the settings ask for, now that prefix delegation is on or off."""
        return (
            cidr.bits == 128
            or self.settings.ipv6
            or (cidr.length < cidr.bits) == self.settings.prefix_delegation
        )

    async def _sweep(self) -> None:
        if self.settings.disable_leaked_eni_cleanup:
            return
        again = await sweep(
            self._cloud, self.settings, self.instance, busy=self.steps.own, now=self._wall()
        )
        if again:
            self._sweep_at = min(self._sweep_at, self._clock() + SETTLED_S)

    def _tie(self, now: float) -> float:
        """Tie ENIs that stay to the instance, so that they end with it. Returns when next.

        EC2 wants a request of its own for it: not while pods wait, not for ENIs that go soon.
        """
        due = now + COMPARE_EVERY_S
        for id, eni in self.store.enis.items():
            record = eni.record
            if record.primary or record.delete_on_termination or not record.attachment_id:
                continue
            if unmanaged(record, self.settings) or any(f.eni == id for f in self.steps.flights):
                continue
            at = max(eni.added + SETTLED_S, eni.tie_after)
            if now >= at:
                self.steps.tie(id)
            else:
                due = min(due, at)
        return due

    # -- what steps report ------------------------------------------------------------------

    def landed(self) -> None:
        """Something arrived: the pause is over and who waits is served."""
        self._backoff.reset()
        self._paused_until = 0.0
        self.last_error = ""
        self._serve()
        self._wake.set()

    def failed(self, error: Exception) -> None:
        """EC2 or the kernel complains: nothing new is asked for a while."""
        self._note(error)
        self._paused_until = max(self._paused_until, self._clock() + self._backoff.next())
        if not isinstance(error, CloudError) or error.out_of_step or error.unanswered:
            self.look_at_ec2_soon()
        self._wake.set()

    def look_at_ec2_soon(self, delay_s: float = 0.0) -> None:
        """The books may differ from EC2."""
        self._must_ask_ec2 = True
        self._compare_at = min(self._compare_at, self._clock() + delay_s)
        self._wake.set()

    def _note(self, error: Exception) -> None:
        self.last_error = str(error)
        self.metrics.errors.labels(getattr(error, "operation", "network")).inc()
        log.warning("%s", error)

    def _why_late(self, timeout_s: float) -> str:
        flying = ", ".join(sorted({flight.what for flight in self.steps.flights}))
        why = f": {self.last_error}" if self.last_error else ""
        return f"{FAILED} within {timeout_s:g} s (on its way: {flying or 'nothing'}){why}"

    def _why_exhausted(self) -> str:
        if why := self.subnets.why_exhausted():
            return f"{FAILED}: {why}"
        most = min(self.limits.enis, self.settings.max_eni or self.limits.enis)
        unit = "/28 prefixes" if self.settings.prefix_delegation else "addresses"
        return (
            f"{FAILED}: all addresses are in use: {len(self.store.enis)} of {most} ENIs are"
            f" attached, each holds at most {self._slots} {unit} ({self.instance.type},"
            f" {self.subnets.name(self.instance.subnet_id)})"
        )
