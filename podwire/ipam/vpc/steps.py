"""The steps that take time: requests to EC2 and links that appear. Each is a task of its own.

A step changes the books only with what EC2 has confirmed, and reports to the manager: `landed`,
or `failed`, after which the manager plans again. An ENI that a failed or cut-off step leaves behind
carries our tags and is found by `Sweeper`, now or after a restart.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from podwire.errors import KernelError
from podwire.ipam.vpc.cloud import Cloud, CloudEni, CloudError, Instance, NewEni
from podwire.ipam.vpc.datastore import DataStore
from podwire.ipam.vpc.limits import route_table
from podwire.ipam.vpc.links import EniLink, HostNetwork, LinkMissing
from podwire.ipam.vpc.plan import Fill, Step, free_device_index
from podwire.ipam.vpc.retry import Backoff, retried
from podwire.ipam.vpc.settings import Settings
from podwire.ipam.vpc.subnets import Subnets
from podwire.ipam.vpc.tags import creation_tags, description, unmanaged
from podwire.net import Prefix

log = logging.getLogger(__name__)

OwnerT = TypeVar("OwnerT", bound=Hashable)

LINK_TIMEOUT_S = 60.0  # EC2 needs up to ten seconds to attach, more on a bad day
TIE_AGAIN_S = 600.0
DETACH_S = 2.0  # between the detach and the first try to delete


@dataclass(eq=False)
class Flight:
    """A step under way. `units` are addresses or prefixes to come, `singles` always addresses."""

    what: str
    eni: str = ""
    units: int = 0
    singles: bool = False
    creates: bool = False
    leaves: bool = False
    device_index: int | None = None
    task: asyncio.Task[None] | None = None


class Reports(Protocol):
    """What steps tell the manager."""

    def landed(self) -> None: ...
    def failed(self, error: Exception) -> None: ...
    def note(self, error: Exception) -> None: ...


@dataclass
class Context(Generic[OwnerT]):
    """What steps work with."""

    cloud: Cloud
    network: HostNetwork
    store: DataStore[OwnerT]
    subnets: Subnets
    settings: Settings
    instance: Instance
    groups: Callable[[], Sequence[str]]
    now: Callable[[], float]
    wall: Callable[[], float]
    randomness: random.Random
    reports: Reports


class Steps(Generic[OwnerT]):
    """Starts steps and knows which are under way."""

    def __init__(self, context: Context[OwnerT]) -> None:
        self._c = context
        self.flights: list[Flight] = []
        self.own: set[str] = set()  # ENIs that a step is making or taking away
        self.orphans_likely = False  # a request to create was never answered

    def start(self, step: Step, singles: bool = False) -> None:
        """Set out on a step of the plan."""
        if isinstance(step, Fill):
            flight = Flight("addresses on " + step.eni, step.eni, step.units, singles)
            self._fly(flight, lambda: self._fill(flight))
        else:
            index = self._free_index()
            if index is None:
                return
            flight = Flight(
                "a new ENI", f"new-{index}", step.units, singles, creates=True, device_index=index
            )
            self._fly(flight, lambda: self._create(flight))

    def give_back(self, eni_id: str, cidrs: Sequence[Prefix]) -> None:
        """Return idle addresses to the subnet; from now on nobody gets them."""
        self._c.store.remove_cidrs(eni_id, cidrs)
        flight = Flight("unassignment on " + eni_id, eni_id)
        self._fly(flight, lambda: self._unassign(flight, cidrs))

    def let_go(self, eni_id: str) -> None:
        """Detach and delete an idle ENI; from now on nobody gets its addresses."""
        record = self._c.store.enis[eni_id].record
        self._c.store.remove_eni(eni_id)
        self._discard(record, set_up=True)

    def tie(self, eni_id: str) -> None:
        """Let an ENI be deleted with the instance."""
        flight = Flight("an attribute of " + eni_id, eni_id)
        self._fly(flight, lambda: self._tie(eni_id))

    async def adopt(self, record: CloudEni) -> None:
        """Take an attached ENI into the books and set up its link."""
        fault = self._not_for_pods(record)
        if not fault:
            fault = await self._set_up(record)
        elif not unmanaged(record, self._c.settings) and record.card_index == 0:
            await self._set_up(record)  # the primary one of custom networking
        self._c.store.add_eni(record, usable=not fault, fault=fault)

    async def mend(self) -> None:
        """Try again to set up links that failed."""
        for eni in list(self._c.store.enis.values()):
            if eni.fault and not self._not_for_pods(eni.record):
                eni.fault = await self._set_up(eni.record)
                eni.usable = not eni.fault

    async def tear_down(self, record: CloudEni) -> None:
        """Take away what `adopt` set up for it."""
        if link := self.link(record):
            await self._c.network.tear_down(link)

    def link(self, record: CloudEni) -> EniLink | None:
        """How the ENI must look on the host; None while its subnet is unknown."""
        subnet = self._c.subnets.cidr(record.subnet_id)
        if subnet is None or record.device_index is None:
            return None
        return EniLink(
            mac=record.mac,
            address=record.address,
            subnet=subnet,
            table=route_table(record.card_index, record.device_index),
            mtu=self._c.settings.mtu,
            primary=record.primary,
        )

    def _fly(self, flight: Flight, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            landed = False
            try:
                await work()
            except (CloudError, KernelError, LinkMissing) as error:
                self._c.reports.failed(error)
            else:
                landed = True
            finally:
                self.flights.remove(flight)
                self._c.store.touch(flight.eni)
            if landed:
                self._c.reports.landed()

        self.flights.append(flight)
        flight.task = asyncio.create_task(run())

    # -- addresses --------------------------------------------------------------------------

    async def _fill(self, flight: Flight) -> None:
        c, eni = self._c, self._c.store.enis[flight.eni]
        subnet = eni.record.subnet_id
        prefixes = c.settings.prefix_delegation and not flight.singles
        try:
            if c.settings.ipv6:
                cidrs = await c.cloud.assign_ipv6(flight.eni, flight.units)
            elif prefixes:
                cidrs = await c.cloud.assign(flight.eni, 0, flight.units)
            else:
                cidrs = await c.cloud.assign(flight.eni, flight.units, 0)
        except CloudError as error:
            await self._shortage(error, subnet)
            return
        if flight.eni in c.store.enis:
            fresh = [cidr for cidr in cidrs if cidr.address != eni.record.address]
            c.store.add_cidrs(flight.eni, fresh)
            c.subnets.took(subnet, len(fresh))

    async def _unassign(self, flight: Flight, cidrs: Sequence[Prefix]) -> None:
        try:
            await self._c.cloud.unassign(flight.eni, cidrs)
        except CloudError as error:
            if error.throttled and flight.eni in self._c.store.enis:
                self._c.store.add_cidrs(flight.eni, cidrs)  # nothing was done: EC2 has them still
            raise

    async def _shortage(self, error: CloudError, subnet_id: str) -> None:
        """Learn from a subnet that has too little; any other error goes on."""
        if not error.subnet_exhausted:
            raise error
        log.warning("%s", error)
        await self._c.subnets.refused(subnet_id, error.fragmented)

    # -- ENIs -------------------------------------------------------------------------------

    async def _create(self, flight: Flight) -> None:
        c = self._c
        prefixes = c.settings.prefix_delegation and not flight.singles
        await c.subnets.refresh_if_old()
        subnet = c.subnets.choose(prefixes)
        flight.units = min(flight.units, c.subnets.left(subnet, prefixes) - 1)
        if flight.units < 1:
            return
        new = NewEni(
            subnet_id=subnet,
            groups=c.groups(),
            description=description(c.instance.id),
            tags=creation_tags(c.settings, c.instance.id, c.wall()),
            token=str(uuid.UUID(int=c.randomness.getrandbits(128), version=4)),
            addresses=0 if prefixes else flight.units,
            prefixes=flight.units if prefixes else 0,
        )
        try:
            record = await retried(lambda: c.cloud.create_eni(new), Backoff(c.randomness), tries=4)
        except CloudError as error:
            self.orphans_likely |= error.unanswered
            await self._shortage(error, subnet)
            return
        c.subnets.took(subnet, flight.units + 1)
        self.own.add(record.id)
        flight.what = f"{record.id} (being attached)"
        try:
            record = await self._attach(record, flight)
            if fault := await self._set_up(record):
                raise LinkMissing(fault, object=record.id)
        except BaseException as error:
            self.own.discard(record.id)
            if not isinstance(error, asyncio.CancelledError):
                self._discard(record, set_up=False)
            raise
        self.own.discard(record.id)
        c.store.add_eni(record, usable=True)

    async def _attach(self, record: CloudEni, flight: Flight) -> CloudEni:
        """Attach at the flight's device index, or at the next that EC2 finds free."""
        c, backoff = self._c, Backoff(self._c.randomness)
        for left in range(4, -1, -1):
            assert flight.device_index is not None
            try:
                attachment = await c.cloud.attach_eni(record.id, c.instance.id, flight.device_index)
                return replace(
                    record,
                    device_index=flight.device_index,
                    attachment_id=attachment,
                    instance_id=c.instance.id,
                )
            except CloudError as error:
                if error.code == "InvalidNetworkInterface.InUse":
                    # An earlier try did get through, only its answer did not.
                    found = await c.cloud.find_enis({"network-interface-id": record.id})
                    if found and found[0].instance_id == c.instance.id:
                        return found[0]
                    raise
                taken = error.code == "InvalidParameterValue"
                if not left or not (taken or error.throttled or error.unanswered):
                    raise
                if taken:
                    flight.device_index = self._free_index(above=flight.device_index)
                    if flight.device_index is None:
                        raise
            await asyncio.sleep(backoff.next())
        raise AssertionError("no tries")

    def _discard(self, record: CloudEni, set_up: bool) -> None:
        flight = Flight("the end of " + record.id, leaves=True, device_index=record.device_index)
        self.own.add(record.id)
        self._fly(flight, lambda: self._remove(record, set_up))

    async def _remove(self, record: CloudEni, set_up: bool) -> None:
        c = self._c
        try:
            if set_up:
                await self.tear_down(record)
            if record.attachment_id:
                await self._gone(lambda: c.cloud.detach_eni(record.attachment_id), tries=8)
                await asyncio.sleep(DETACH_S)
            await self._gone(lambda: c.cloud.delete_eni(record.id), tries=8)
        except CloudError:
            self.orphans_likely = True
            raise
        finally:
            self.own.discard(record.id)

    async def _gone(self, call: Callable[[], Awaitable[None]], tries: int) -> None:
        """Ask until it is done; that it is gone already is as good."""
        backoff = Backoff(self._c.randomness)
        for left in range(tries - 1, -1, -1):
            try:
                return await call()
            except CloudError as error:
                if error.gone:
                    return None
                still_in_use = error.code in (
                    "InvalidParameterValue",
                    "InvalidNetworkInterface.InUse",
                )
                if not left or not (error.throttled or error.unanswered or still_in_use):
                    raise
            await asyncio.sleep(backoff.next())
        return None

    async def _tie(self, eni_id: str) -> None:
        record = self._c.store.enis[eni_id].record
        try:
            await self._c.cloud.delete_on_termination(eni_id, record.attachment_id)
            record = replace(record, delete_on_termination=True)
        except CloudError as error:  # no pod needs it: the pool goes on without a pause
            log.warning("%s", error)
        if eni := self._c.store.enis.get(eni_id):
            eni.record = record
            eni.tie_after = self._c.now() + TIE_AGAIN_S

    async def _set_up(self, record: CloudEni) -> str:
        """Why the link could not be set up; "" when it is."""
        link = self.link(record)
        if link is None:
            return f"{self._c.subnets.name(record.subnet_id)} is unknown"
        try:
            await self._c.network.set_up(link, LINK_TIMEOUT_S)
        except (KernelError, LinkMissing) as error:
            log.warning("%s: %s", record.id, error)
            return str(error)
        return ""

    def _not_for_pods(self, record: CloudEni) -> str:
        settings = self._c.settings
        if unmanaged(record, settings):
            return "not managed: by its tags"
        if record.card_index or record.kind == "efa-only":
            return f"not for pods: {record.kind} on network card {record.card_index}"
        if record.primary and settings.custom_networking:
            return "not for pods: custom networking"
        if self._c.subnets.excluded(record.subnet_id):
            return "not for pods: by the tags of its subnet"
        if settings.ipv6 and not record.primary:
            return "not for pods: IPv6 uses the primary ENI"
        return ""

    def _free_index(self, above: int = 0) -> int | None:
        used = {eni.record.device_index or 0 for eni in self._c.store.enis.values()}
        used.update(f.device_index for f in self.flights if f.device_index is not None)
        return free_device_index(used | set(range(above + 1)))
