"""What must happen every few seconds, whatever else the agent does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from podwire.errors import PodwireError

log = logging.getLogger(__name__)
_INTERVAL_S = 5.0


class Housekeeping:
    """A thread that does `work` again and again, from the first `start` to `stop`."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._run, name="bpf-housekeeping", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            try:
                self._work()
            except PodwireError as error:
                log.error("housekeeping of the eBPF maps: %s", error)
