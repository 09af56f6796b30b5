"""CronJobs: the five fields of a schedule, and a timer for the next time one is due."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from podwire.lab import tree
from podwire.lab.api.registry import Registry, clone, timestamp
from podwire.lab.api.storage import Event, Key, Record
from podwire.lab.controllers.base import condition, owner_reference
from podwire.lab.controllers.owners import OwnerIndex
from podwire.lab.controllers.pods import WorkloadController

_FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
_NAMED = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_WORDS = {
    **{word: number for number, word in enumerate(_MONTHS, 1)},
    **{word: number for number, word in enumerate(_DAYS)},
}
_LATE_S = 0.05  # a timer that fires a little early would see its minute not yet come


def next_time(schedule: str, after: datetime) -> datetime | None:
    """The first matching minute after `after`, or None: a bad schedule, or no such day."""
    schedule = _NAMED.get(schedule, schedule)
    try:
        minutes, hours, days, months, weekdays = _parse(schedule)
    except ValueError:
        return None
    any_day = schedule.split()[2:3] == ["*"]
    any_weekday = schedule.split()[4:5] == ["*"]
    time = after.replace(second=0, microsecond=0) + timedelta(minutes=1)
    for _ in range(366 * 4):  # days to look at: the next 29 February is at most so far
        weekday = time.isoweekday() % 7
        if any_day or any_weekday:
            fits = time.day in days and weekday in weekdays
        else:  # both given: either will do
            fits = time.day in days or weekday in weekdays
        if fits and time.month in months:
            for hour in (hour for hour in hours if hour >= time.hour):
                first = time.minute if hour == time.hour else 0
                if minute := [m for m in minutes if m >= first]:
                    return time.replace(hour=hour, minute=minute[0])
        time = time.replace(hour=0, minute=0) + timedelta(days=1)
    return None


def _parse(schedule: str) -> list[list[int]]:
    fields = schedule.lower().split()
    if len(fields) != 5:
        raise ValueError(schedule)
    return [_field(text, *limits) for text, limits in zip(fields, _FIELDS, strict=True)]


def _field(text: str, low: int, high: int) -> list[int]:
    out: set[int] = set()
    for part in text.split(","):
        span, _, step = part.partition("/")
        if span in ("*", "?"):
            first, last = low, high
        else:
            begin, dash, end = span.partition("-")
            first = int(_WORDS.get(begin) or begin)
            last = int(_WORDS.get(end) or end) if dash else high if step else first
        if not low <= first <= last <= high + (high == 6):
            raise ValueError(text)
        out |= set(range(first, last + 1, int(step or 1)))
    return sorted({number % 7 for number in out} if high == 6 else out)


class CronJobController(WorkloadController):
    """Creates a Job whenever its time has come."""

    kind = "CronJob"
    api_version = "batch/v1"
    owned = ("Job",)

    def __init__(self, registry: Registry, owners: OwnerIndex) -> None:
        super().__init__(registry, owners)
        self._jobs = registry.resource("Job", "batch/v1")
        self._due: dict[Key, datetime] = {}

    def wants(self, event: Event) -> Iterable[Key]:
        if event.resource == self.resource and event.type == "DELETED":
            self._due.pop(event.record.key, None)
        yield from super().wants(event)

    def sync(self, workload: Record) -> None:
        key, spec, now = workload.key, workload.obj["spec"], self.registry.now()
        jobs = self.owners.controlled(workload, "Job")
        active = [job for job in jobs if not _is_over(job)]
        due = self._due.get(key)
        if due and due <= now and not spec.get("suspend"):
            self._run(workload, active, due)
        upcoming = next_time(tree.text(spec, "schedule"), now)
        if upcoming and upcoming != due:
            self._due[key] = upcoming
            if self._loop:
                delay_s = (upcoming - now).total_seconds() + _LATE_S
                self._loop.call_later(delay_s, self.enqueue, key)
        self._prune(spec, [job for job in jobs if _is_over(job)])

    def _run(self, workload: Record, active: list[Record], due: datetime) -> None:
        policy = tree.text(workload.obj, "spec", "concurrencyPolicy")
        if active and policy == "Forbid":
            return
        if policy == "Replace":
            for job in active:
                self.delete(self._jobs, job.key)
        template = clone(tree.mapping(workload.obj, "spec", "jobTemplate"))
        metadata = {
            **tree.mapping(template, "metadata"),
            "name": f"{workload.key[1]}-{int(due.timestamp()) // 60}",
            "ownerReferences": [owner_reference(self.resource, workload)],
        }
        body = {"metadata": metadata, "spec": template.get("spec", {})}
        self.registry.create(self._jobs, workload.key[0], body)
        self.set_status(workload, lastScheduleTime=timestamp(due), observedGeneration=None)

    def _prune(self, spec: dict[str, object], over: list[Record]) -> None:
        for name, field, default in (
            ("Complete", "successfulJobsHistoryLimit", 3),
            ("Failed", "failedJobsHistoryLimit", 1),
        ):
            limit = spec.get(field, default)
            some = sorted((j for j in over if condition(j.obj, name)), key=lambda j: j.version)
            for job in some[: max(len(some) - int(str(limit)), 0)]:
                self.delete(self._jobs, job.key)


def _is_over(job: Record) -> bool:
    return bool(condition(job.obj, "Complete") or condition(job.obj, "Failed"))
