"""What must happen every few seconds, and whenever an interface comes or goes."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable

from podwire.errors import PodwireError
from podwire.kernel.monitor import Group, Monitor

log = logging.getLogger(__name__)
_INTERVAL_S, _HURRIED_S = 5.0, 1.0


class Housekeeping:
    """A thread that does `work` again and again, and `links_changed` when the kernel says so.

    It runs from the first `start` to `stop`, for the interfaces of `netns_fd` (default: the
    caller's namespace). Work that says True is wanted again sooner.
    """

    def __init__(
        self,
        netns_fd: int | None,
        work: Callable[[], bool],
        links_changed: Callable[[], object],
    ) -> None:
        self._netns_fd = netns_fd
        self._work = work
        self._links_changed = links_changed
        self._thread: threading.Thread | None = None
        self._wake = -1

    def start(self) -> None:
        if self._thread is None:
            stopped, self._wake = os.pipe()
            links = Monitor([Group.LINK], self._netns_fd)
            self._thread = threading.Thread(
                target=self._run, args=(stopped, links), name="bpf-housekeeping", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            os.close(self._wake)
            self._thread.join()
            self._thread = None

    def _run(self, stopped: int, links: Monitor) -> None:
        due = time.monotonic() + _INTERVAL_S
        while True:
            left = max(0.0, due - time.monotonic())
            ready = select.select([stopped, links], [], [], left)[0]
            if stopped in ready:
                os.close(stopped)
                links.close()
                return
            if links in ready:
                links.drain()  # that something changed is all that matters
                self._try(self._links_changed)
            if time.monotonic() >= due:
                hurried = self._try(self._work)
                due = time.monotonic() + (_HURRIED_S if hurried else _INTERVAL_S)

    def _try(self, work: Callable[[], object]) -> object:
        try:
            return work()
        except (PodwireError, OSError) as error:  # the next round comes all the same
            log.error("housekeeping of the eBPF data path: %s", error)
            return None
