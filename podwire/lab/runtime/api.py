"""What the runtime asks of the API server: watches of pods and Services, writes of status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from podwire.agent.logs import event
from podwire.errors import ApiError
from podwire.kube import kubeconfig, objects
from podwire.kube.client import Client
from podwire.kube.objects import Json
from podwire.kube.reflector import Reflector
from podwire.kube.store import ChangeSet, Kind, Store
from podwire.lab.runtime.objects import Pod
from podwire.lab.state import LabDir

log = logging.getLogger("podwire.lab.runtime")

T = TypeVar("T")

RETRY_FIRST_S, RETRY_MOST_S = 0.05, 5.0


class Api:
    """Use as ``async with Api(lab) as api``. An absent API is waited for, refusals are raised."""

    def __init__(self, lab: LabDir) -> None:
        self._client = Client(kubeconfig.from_file(lab.kubeconfig))

    async def __aenter__(self) -> Api:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.__aexit__(*exc)

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` returns, tried until the API answers. Raises ApiError for a refusal."""
        delay = RETRY_FIRST_S
        while True:
            try:
                return await call()
            except ApiError as error:
                if error.status:
                    raise
                event(log, logging.WARNING, "API unreachable", error=error)
            await asyncio.sleep(delay)
            delay = min(delay * 2, RETRY_MOST_S)

    async def register(self, node: Json) -> None:
        """Make the Node object, or bring the status of the one there up to date."""
        try:
            await self._insist(lambda: self._client.create(objects.Node, node))
        except ApiError as error:
            if error.status != 409:
                raise
            await self.node_status(node["metadata"]["name"], node["status"])

    async def node_status(self, name: str, status: Json) -> None:
        await self._insist(
            lambda: self._client.patch(objects.Node, name, {"status": status}, subresource="status")
        )

    async def remove_node(self, name: str) -> None:
        await self._gone(lambda: self._client.delete(objects.Node, name))

    async def pod_status(self, pod: Pod, status: Json) -> None:
        """Of that very pod: another one with its name is left alone."""
        meta = pod.metadata
        patch = {"metadata": {"uid": meta.uid}, "status": status}
        await self._gone(
            lambda: self._client.patch(
                objects.Pod, meta.name, patch, meta.namespace, subresource="status"
            )
        )

    async def remove_pod(self, pod: Pod) -> None:
        """Take the object away now: its containers have ended."""
        meta = pod.metadata
        await self._gone(
            lambda: self._client.delete(
                Pod, meta.name, meta.namespace, grace_period_s=0, uid=meta.uid
            )
        )

    async def _gone(self, call: Callable[[], Awaitable[Any]]) -> None:
        """Like `_insist`, but an object that is gone or another one now is no error."""
        try:
            await self._insist(call)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def watch(self, store: Store, kinds: Sequence[Kind]) -> AsyncIterator[ChangeSet]:
        """What changed, whenever something did, once everything is known; for ever."""
        reflector = Reflector(self._client, kinds, store)
        following = asyncio.create_task(reflector.run())
        await reflector.wait_synced()
        while not following.done():
            reflector.changed.clear()
            if changes := store.take():
                yield changes
            await reflector.changed.wait()
        await following
