"""What this node enforces, told to everybody: an annotation of its own Node object.

The value is the newest resourceVersion of any policy that the kernel holds. Versions of one API
grow (KEP-5504): a policy of version V is in force on a node that reports V or more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from podwire.agent.logs import event
from podwire.errors import ApiError
from podwire.kube.client import Client
from podwire.kube.objects import ClusterNetworkPolicy, NetworkPolicy, Node
from podwire.kube.store import Store

log = logging.getLogger("podwire.agent.report")

ANNOTATION = "podwire.dev/policies-enforced"
PERIOD_S = 1.0  # many changes, one write


def _newest_policy(store: Store) -> int:
    """The highest version among the policies; 0 where there is none."""
    return max(
        (
            int(policy.metadata.resource_version or 0)
            for kind in (NetworkPolicy, ClusterNetworkPolicy)
            for policy in store.all(kind).values()
        ),
        default=0,
    )


def enforced(node: Node) -> int | None:
    """What the node reports; None while it has reported nothing."""
    text = node.metadata.annotations.get(ANNOTATION, "")
    return int(text) if text.isdigit() else None


async def keep_reporting(
    client: Client, node_name: str, store: Store, settled: Callable[[], bool]
) -> None:
    """Write the annotation whenever it changes and nothing waits; until cancelled."""
    told: int | None = None
    while True:
        await asyncio.sleep(PERIOD_S)
        newest = _newest_policy(store)
        if newest == told or not settled():
            continue
        patch = {"metadata": {"annotations": {ANNOTATION: str(newest)}}}
        try:
            await client.patch(Node, node_name, patch)
            told = newest
        except ApiError as error:
            event(log, logging.DEBUG, "enforcement not reported", error=error)
