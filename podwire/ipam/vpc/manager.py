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
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from podwire.ipam.pool import Exhausted
from podwire.ipam.vpc import plan
from podwire.ipam.vpc.cloud import Cloud, CloudEni, CloudError, Instance, Metadata, MetaEni
from podwire.ipam.vpc.datastore import Assignment, DataStore
from podwire.ipam.vpc.limits import PREFIX_ADDRESSES, known_limits
from podwire.ipam.vpc.links import HostNetwork
from podwire.ipam.vpc.metrics import Metrics
from podwire.ipam.vpc.pool import Need, PoolStats, need, slots_per_eni
from podwire.ipam.vpc.retry import Backoff, retried
from podwire.ipam.vpc.settings import Settings
from podwire.ipam.vpc.steps import Context, Steps
from podwire.ipam.vpc.subnets import Subnets
from podwire.ipam.vpc.upkeep import COMPARE_EVERY_S, LOOK_AGAIN_S, Upkeep

log = logging.getLogger(__name__)

OwnerT = TypeVar("OwnerT", bound=Hashable)

GATHER_S = 0.02  # ADDs that come together are one request
REFILL_S = 1.0  # what is only kept warm may wait for more of its kind
PATIENCE = 1 << 30  # tries of what nothing can go on without
STOPPED = "the address manager has stopped; try again"
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
        self._loop: asyncio.Task[None] | None = None
        self._ending = False

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
            lambda: self._cloud.limits(self.instance.type), Backoff(self._random), PATIENCE, True
        )
        self.subnets = Subnets(
            self._cloud,
            self.settings,
            self.instance,
            self._clock,
            custom=lambda: self.node.eni_config_subnet,
        )
        context = Context(
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
        self.steps = Steps(context)
        self.upkeep = Upkeep(
            context,
            self.steps,
            self._metadata,
            self.limits,
            self.metrics,
            stats=self.stats,
            wake=self._wake.set,
        )
        await self._adopt_all()
        self._loop = asyncio.create_task(self._run())

    async def _adopt_all(self) -> None:
        """Take over the ENIs that are there."""
        shown = await retried(self._metadata.enis, Backoff(self._random), PATIENCE)
        records = [self._from_metadata(eni) for eni in shown]
        try:
            await retried(self.subnets.refresh, Backoff(self._random), tries=3)
            if len(shown) > 1:  # of the primary ENI alone EC2 knows nothing that matters
                records = await self._cloud.attached_enis(self.instance.id)
        except CloudError as error:
            self.note(error)
            self.upkeep.look_at_ec2_soon()
        for record in sorted(records, key=lambda record: record.device_index or 0):
            await self.steps.adopt(record)

    def dismiss(self) -> None:
        """From now on nobody waits for an address; those who do are told to try again."""
        self._ending = True
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_exception(Exhausted(STOPPED))

    async def close(self) -> None:
        """Stop. Steps under way are cut off; what they leave is found at the next start."""
        tasks = [flight.task for flight in self.steps.flights if flight.task]
        tasks += self.upkeep.tasks.values()
        if self._loop is not None:
            tasks.append(self._loop)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.dismiss()

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
        if self._ending:
            raise Exhausted(STOPPED)
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
        due = [self._grow(now)]
        quiet = not self._waiters and now >= self._paused_until
        due += self.upkeep.look(now, quiet)
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
        return slots_per_eni(self.settings, self.limits)

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
        if not stats.waiting or now < self._paused_until or self.upkeep.must_ask_ec2:
            return
        if self.steps.flights or self._plan(*self._wanted(stats)):
            return
        rests = iter(sorted(self.store.cooling.values()))
        for waiter in self._waiters:
            if next(rests, waiter.until) < waiter.until or waiter.future.done():
                continue  # an address that rests will be free in time
            self.metrics.no_address.inc()
            waiter.future.set_exception(Exhausted(self._why_exhausted()))

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
        self.note(error)
        now = self._clock()
        if now >= self._paused_until:  # requests that fail together are one complaint
            self._paused_until = now + self._backoff.next()
        if not isinstance(error, CloudError) or error.out_of_step or error.unanswered:
            self.upkeep.look_at_ec2_soon()
        self._wake.set()

    def note(self, error: Exception) -> None:
        """For people and for ADDs that give up."""
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
