"""A Services data path that also ends UDP flows to what no longer serves.

The flows go after the data path's own deletes: until then a packet would take the old way again and
make the entry anew. What changed is judged from the last pass on, so that an endpoint that came
back meanwhile keeps its flows. The first pass judges every Service, also for those that went away
while no agent ran.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from podwire.agent.logs import event
from podwire.conntrack import stale
from podwire.conntrack.stale import Removal
from podwire.datapath import Part, Requirement
from podwire.errors import KernelError
from podwire.kernel.ctnetlink import Table
from podwire.services import ServiceTable
from podwire.services.stale import StaleFlows

log = logging.getLogger("podwire.agent.reaping")


class ReapingPart:
    """Delegates to `path`; `removed` is told of every pass that looked at the table."""

    def __init__(
        self,
        path: Part[ServiceTable],
        removed: Callable[[Removal], None],
        netns_fd: int | None = None,
    ) -> None:
        self._path, self._removed, self._netns = path, removed, netns_fd
        self._table: Table | None = None
        self._applied: ServiceTable | None = None
        self._reaped: ServiceTable | None = None
        self._deleted = 0

    @property
    def requirements(self) -> Sequence[Requirement]:
        return self._path.requirements

    def start(self) -> None:
        self._path.start()
        if self._table is None:
            self._table = Table(self._netns)

    def apply(self, table: ServiceTable) -> None:
        self._path.apply(table)
        self._applied = table

    def flush(self) -> None:
        self._path.flush()
        self._reap()

    def verify(self) -> list[str]:
        repairs = self._path.verify()
        self._reap()  # nothing to do, except after a pass that failed
        return repairs

    def cleanup(self) -> None:
        self._path.cleanup()

    def status(self) -> dict[str, object]:
        return {**self._path.status(), "stale flows deleted": self._deleted}

    def _reap(self) -> None:
        now, before = self._applied, self._reaped
        if now is None or now is before or self._table is None:
            return
        if before is None:
            judge = stale.judge_all(now)
        else:
            changed = StaleFlows(now.delta(before).ports.values(), now.settings)
            if not changed:
                self._reaped = now
                return
            judge = stale.judge_changes(changed)
        try:
            removal = stale.remove(self._table, judge)
        except KernelError as error:
            event(log, logging.ERROR, "stale UDP flows not deleted", error=error)
            return
        self._reaped = now
        count = sum(removal.groups.values())
        self._deleted += count
        self._removed(removal)
        if count:
            event(log, logging.INFO, "stale UDP flows deleted", entries=count,
                  took_ms=round(removal.seconds * 1000, 1))  # fmt: skip
