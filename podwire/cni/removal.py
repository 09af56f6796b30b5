"""Removes links of silenced pods in the background, many at once.

Removing a link waits for grace periods of the kernel with its lock for all links held, so it is
done when no call has been under way for a moment, and for all links together. By then most of them
are gone anyway, with their pod's namespace. Which links are still to be removed is on disk.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Generator, Mapping
from typing import Protocol

from podwire.ipam.state import State
from podwire.wiring import Wiring

log = logging.getLogger(__name__)

QUIET_S = 0.1
LONGEST_S = 2.0
RETRY_S = 5.0


class Unbinder(Protocol):
    def unbind(self, host_ifname: str) -> None: ...
    def flush(self) -> None: ...


class Remover:
    """`put` returns at once; `flush` waits until everything put so far is gone."""

    def __init__(self, state: State, wirings: Mapping[str, Wiring], guard: Unbinder | None) -> None:
        self._state = state
        self._wirings = wirings
        self._guard = guard
        self._waiting: set[tuple[str, str]] = set()
        self._going: set[tuple[str, str]] = set()
        self._since = 0.0
        self._last_call = 0.0
        self._stopping = False
        self._change = threading.Condition()
        self._working = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="link-remover", daemon=True)
        self._thread.start()

    def put(self, wiring: str, host_ifname: str) -> None:
        with self._change:
            self._last_call = time.monotonic()
            if not self._waiting:
                self._since = self._last_call
                self._change.notify()
            self._waiting.add((wiring, host_ifname))

    @contextlib.contextmanager
    def paused(self) -> Generator[None, None, None]:
        """An ADD is under way: removals keep out of its way for a while."""
        self._last_call = time.monotonic()
        try:
            yield
        finally:
            self._last_call = time.monotonic()

    def flush(self) -> None:
        """Remove what waits, now. Raises KernelError."""
        with self._working:
            with self._change:
                self._going, self._waiting = self._waiting, set()
            try:
                self._remove(self._going)
            except Exception:
                with self._change:
                    self._waiting |= self._going
                raise
            finally:
                self._going = set()

    def reclaim(self, host_ifname: str) -> None:
        """A new link is to have this name: return when no removal of an older one can meet it."""
        with self._change:
            pending = any(host_ifname == name for _, name in self._waiting | self._going)
        if pending:
            self.flush()

    def stop(self) -> None:
        """End the thread; what waits is on disk."""
        with self._change:
            self._stopping = True
            self._change.notify()
        self._thread.join()

    def _remove(self, links: set[tuple[str, str]]) -> None:
        for name, wiring in self._wirings.items():
            wiring.purge([link for kind, link in links if kind == name])
        if self._guard:
            for _, link in links:
                self._guard.unbind(link)
            self._guard.flush()
        if links:
            self._state.removed(links)

    def _run(self) -> None:
        while self._await_quiet():
            try:
                self.flush()
            except Exception:
                log.exception("cannot remove links of deleted pods")
                with self._change:
                    self._since = self._last_call = time.monotonic() + RETRY_S

    def _await_quiet(self) -> bool:
        """Until something waits and it is a good moment; False when it is time to stop."""
        with self._change:
            while not self._stopping:
                if not self._waiting:
                    self._change.wait()
                    continue
                moment = min(self._last_call + QUIET_S, self._since + LONGEST_S)
                left = moment - time.monotonic()
                if left <= 0:
                    return True
                self._change.wait(left)
            return False
