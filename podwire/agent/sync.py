"""One sync: change set → table → kernel, for one part of a data path.

A `Sync` owns a compiler and a data path part. What the kernel refuses is counted, logged, and tried
again with the next change or after a growing delay; other parts go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, TypeVar

from podwire.agent.logs import event
from podwire.datapath import Part
from podwire.errors import PodwireError
from podwire.kube.store import ChangeSet, Kind

log = logging.getLogger("podwire.agent.sync")

TableT = TypeVar("TableT")

RETRY_FIRST_S = 0.1
RETRY_MOST_S = 30.0


class Sync(Generic[TableT]):
    """Keeps the kernel at the newest table of one kind."""

    def __init__(
        self,
        name: str,
        kinds: Collection[Kind],
        compile: Callable[[ChangeSet], TableT],
        path: Part[TableT] | None,
    ) -> None:
        self.name = name
        self.kinds = frozenset(kinds)
        self.path = path
        self.table: TableT | None = None
        self.revision = 0  # syncs applied
        self.failures = 0
        self.error = ""
        self.last_duration_s = 0.0
        self.retry_at: float | None = None  # monotonic; None: nothing waits
        self._compile = compile
        self._retry_s = RETRY_FIRST_S
        self.waiting_deletes = False

    def run(self, changes: ChangeSet) -> bool:
        """Compile and apply; True when the kernel holds the new table afterwards.

        Changes of other kinds are none of this part's; an empty change set is: somebody told the
        compiler something else.
        """
        if changes and self.kinds.isdisjoint(changes):
            return self.retry_at is None
        began = time.perf_counter()
        table = self._compile(changes)
        if table is self.table and self.retry_at is None:
            return True
        self.table = table
        return self._apply(began)

    def retry(self) -> bool:
        """Apply the present table again after a failure."""
        return self._apply(time.perf_counter())

    def _apply(self, began: float) -> bool:
        if self.table is None or self.path is None:
            return True
        try:
            self.path.apply(self.table)
        except PodwireError as error:
            self.failures += 1
            self.error = str(error)
            self.retry_at = time.monotonic() + self._retry_s
            event(log, logging.ERROR, "sync failed", part=self.name, error=error,
                  retry_s=self._retry_s)  # fmt: skip
            self._retry_s = min(self._retry_s * 2, RETRY_MOST_S)
            return False
        self.error = ""
        self.retry_at, self._retry_s = None, RETRY_FIRST_S
        self.revision += 1
        self.last_duration_s = time.perf_counter() - began
        self.waiting_deletes = True
        return True

    def flush(self) -> None:
        """Send the deletes that wait, if any."""
        if self.waiting_deletes and self.path is not None:
            self.waiting_deletes = False
            try:
                self.path.flush()
            except PodwireError as error:
                self.waiting_deletes = True
                self.failures += 1
                event(log, logging.ERROR, "deletes failed", part=self.name, error=error)

    def verify(self) -> list[str]:
        """Repairs that the background check made."""
        if self.path is None or self.table is None or self.retry_at is not None:
            return []
        try:
            repairs = self.path.verify()
        except PodwireError as error:
            self.failures += 1
            event(log, logging.ERROR, "integrity check failed", part=self.name, error=error)
            return []
        for repair in repairs:
            event(log, logging.WARNING, "repaired", part=self.name, what=repair)
        return repairs

    @property
    def problems(self) -> Mapping[str, str]:
        """What the table set aside, and why."""
        return getattr(self.table, "problems", {})

    def kernel_status(self) -> dict[str, object]:
        """What the data path says of itself."""
        return self.path.status() if self.path is not None else {}

    def status(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "failures": self.failures,
            "error": self.error,
            "last_sync_ms": round(self.last_duration_s * 1000, 3),
            "problems": {str(name): reason for name, reason in self.problems.items()},
            "kernel": self.kernel_status(),
        }
