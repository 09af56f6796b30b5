"""Lets a pod on the network when its policies are in place.

ADD returns only when the pod's policies are in the kernel. While they cannot be known (the API is
away and nothing was read yet, or the pod's object has not come) it fails with "try again later":
closed, never open. CNI calls come in threads; tables and syncs live in the main loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from podwire.agent.loop import Loop
from podwire.agent.sync import Sync
from podwire.cni.protocol import TRY_AGAIN, CniError
from podwire.kube.objects import Pod
from podwire.kube.store import Store
from podwire.policy import Attachment as PolicyAttachment
from podwire.policy import PolicyCompiler, PolicyTable
from podwire.wiring import Attachment

OBJECT_WAIT_S = 10.0  # the pod's object is watched; it cannot be far behind the runtime
ADMIT_DEADLINE_S = 25.0


class Admission:
    """What the CNI server asks about each pod, in its threads."""

    def __init__(
        self,
        loop: Loop,
        store: Store,
        synced: Callable[[], bool],
        ending: Callable[[], bool],
        compiler: PolicyCompiler,
        sync: Sync[PolicyTable],
    ) -> None:
        """`ending`: whether the agent has been told to stop, so that nobody waits any longer."""
        self._main = asyncio.get_running_loop()
        self._loop, self._store, self._synced, self._ending = loop, store, synced, ending
        self._compiler, self._sync = compiler, sync

    def restore(self, attachments: Sequence[Attachment]) -> None:
        """Tell the compiler of the pods that were here before this process."""
        for attachment in attachments:
            if attachment.wiring and attachment.pod.name:
                self._compiler.attach(_policy_attachment(attachment))

    def admit(self, attachment: Attachment) -> None:
        """Called in a CNI thread. Raises CniError 11."""
        if attachment.pod.name:
            done = asyncio.run_coroutine_threadsafe(self._admit(attachment), self._main)
            try:
                done.result(ADMIT_DEADLINE_S)
            except TimeoutError:
                done.cancel()
                raise CniError(TRY_AGAIN, f"policies of {attachment.pod} take too long") from None

    def dismiss(self, attachment: Attachment) -> None:
        """Called in a CNI thread."""
        if attachment.pod.name:
            asyncio.run_coroutine_threadsafe(self._dismiss(attachment), self._main)

    async def _admit(self, attachment: Attachment) -> None:
        pod = attachment.pod
        until = time.monotonic() + OBJECT_WAIT_S
        while not self._known(attachment):
            if time.monotonic() > until or self._ending():
                raise CniError(
                    TRY_AGAIN, f"the policies of pod {pod} cannot be known yet: {self._why()}"
                )
            await asyncio.sleep(0.01)
        self._compiler.attach(_policy_attachment(attachment))
        if not await self._loop.resync(self._sync):
            self._compiler.detach((pod.namespace, pod.name))
            raise CniError(TRY_AGAIN, f"policies of {pod} not in the kernel: {self._sync.error}")

    def _known(self, attachment: Attachment) -> bool:
        found = self._store.get(Pod, (attachment.pod.namespace, attachment.pod.name))
        if found is None or not self._synced():
            return False
        return not attachment.pod.uid or found.metadata.uid == attachment.pod.uid

    def _why(self) -> str:
        if self._ending():
            return "the agent ends"
        return "the pod's object has not come" if self._synced() else "the API is away"

    async def _dismiss(self, attachment: Attachment) -> None:
        self._compiler.detach((attachment.pod.namespace, attachment.pod.name))
        await self._loop.resync(self._sync)


def _policy_attachment(attachment: Attachment) -> PolicyAttachment:
    pod = attachment.pod
    return PolicyAttachment(
        (pod.namespace, pod.name),
        attachment.host_ifname,
        tuple(each.address for each in attachment.addresses),
        pod.uid,
    )
