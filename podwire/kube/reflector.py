"""Keeps a store equal to what the API holds: list, then watch, again and again."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from podwire.errors import ApiError, ConfigError
from podwire.kube.client import Client, Selection, WatchEvent
from podwire.kube.store import Kind, Store

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0
_ABSENT_PAUSE_S = 30.0  # a kind that the cluster does not serve may be defined later


@dataclass(slots=True)
class FollowState:
    """How one kind is doing. `synced`: the store has shown the API's state since the start.

    `error` is why the API is not followed right now, or ``""``; `since` (monotonic seconds) is when
    that last changed. `served` is false while the cluster does not know the kind.
    """

    synced: bool = False
    served: bool = True
    error: str = ""
    since: float = 0.0
    lists: int = 0


class Reflector:
    """Follows a set of kinds into `store`; `run` in a task of the thread that reads the store.

    `changed` is set whenever the store may have new changes or a kind became synced; who waits on
    it clears it. `on_change` is called at the same moments.
    """

    def __init__(
        self,
        client: Client,
        kinds: Sequence[Kind | Selection[Any]],
        store: Store,
        *,
        on_change: Callable[[], None] | None = None,
        watch_timeout_s: float = 300.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.client = client
        self.store = store
        self.changed = asyncio.Event()
        self._progress = asyncio.Event()
        self._selections = [k if isinstance(k, Selection) else Selection(k) for k in kinds]
        self._states = {one.kind: FollowState(since=time.monotonic()) for one in self._selections}
        self._on_change = on_change
        self._watch_timeout_s = watch_timeout_s
        self._jitter = jitter

    @property
    def states(self) -> Mapping[Kind, FollowState]:
        return self._states

    @property
    def synced(self) -> Mapping[Kind, bool]:
        return {kind: state.synced for kind, state in self._states.items()}

    async def wait_synced(self, timeout_s: float | None = None) -> None:
        """Until every kind is synced. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not all(self.synced.values()):
                await self._progress.wait()
                self._progress.clear()

    async def run(self) -> None:
        """Follow until cancelled. Failures of the API are waited out, never raised."""
        async with asyncio.TaskGroup() as group:
            for selection in self._selections:
                group.create_task(self._follow(selection))

    async def _follow(self, selection: Selection[Any]) -> None:
        state = self._states[selection.kind]
        version, pause_s, cached = "", _FIRST_PAUSE_S, True
        while True:
            try:
                if not version:
                    version = await self._list(selection, state, cached=cached)
                    pause_s = _FIRST_PAUSE_S
                began = time.monotonic()
                async for batch in self._watch(selection, version):
                    version = self._take(selection.kind, batch, state) or version
                    pause_s = _FIRST_PAUSE_S
                if time.monotonic() - began > 1:
                    continue
                self._fail(selection.kind, state, "the API closed the watch at once")
            except ApiError as failure:
                if failure.status == 404:
                    self._absent(selection.kind, state)
                    await self._sleep(_ABSENT_PAUSE_S)
                    continue
                if failure.status in (410, 504):
                    # what we knew is too old (or from the future, after the API lost its memory)
                    version, cached = "", False
                else:
                    self._fail(selection.kind, state, str(failure))
            except ConfigError as failure:  # credentials that cannot be had right now
                self._fail(selection.kind, state, str(failure))
            await self._sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _sleep(self, pause_s: float) -> None:
        """Somewhere between half and the whole of the pause: clients do not return in step."""
        await asyncio.sleep(pause_s * (0.5 + self._jitter() / 2))

    async def _list(self, selection: Selection[Any], state: FollowState, *, cached: bool) -> str:
        listing = await self.client.list(selection, version="0" if cached else "")
        self.store.replace(selection.kind, listing.objects, listing.refused)
        state.lists += 1
        self._good(state)
        return listing.version

    def _watch(self, selection: Selection[Any], version: str):
        # not all at the same moment: between one and two times the timeout
        timeout_s = self._watch_timeout_s * (1 + self._jitter())
        return self.client.watch(selection, version, timeout_s)

    def _take(self, kind: Kind, batch: list[WatchEvent[Any]], state: FollowState) -> str:
        """Put events in the store; returns the version of the last."""
        version = ""
        for event in batch:
            if event.object is not None:
                version = event.object.metadata.resource_version or version
            if event.type == "BOOKMARK":
                continue
            if event.type == "DELETED":
                self.store.remove(kind, event.key)
            elif event.object is None:
                self.store.refuse(kind, event.key, event.reason)
            else:
                self.store.put(event.object)
        self._good(state)
        return version

    def _absent(self, kind: Kind, state: FollowState) -> None:
        """The cluster does not serve this kind: there are none, and that is known."""
        state.served = False
        self.store.replace(kind, [])
        self._good(state, served=False)

    def _good(self, state: FollowState, *, served: bool = True) -> None:
        if state.error:
            state.since = time.monotonic()
        state.error, state.served, state.synced = "", served, True
        self._tell()

    def _fail(self, kind: Kind, state: FollowState, error: str) -> None:
        if not state.error:
            state.since = time.monotonic()
            _log.warning("cannot follow %s: %s", kind.__name__, error)
        state.error = error

    def _tell(self) -> None:
        self.changed.set()
        self._progress.set()
        if self._on_change:
            self._on_change()
