"""ENIs that nobody looks after any more: ours from before a crash, and those of dead nodes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from podwire.ipam.vpc.cloud import Cloud, CloudEni, CloudError
from podwire.ipam.vpc.settings import Settings
from podwire.ipam.vpc.tags import (
    CLUSTER_TAG,
    CREATED_TAG,
    DESCRIPTION_PREFIX,
    INSTANCE_TAG,
    created_at,
    stamp,
)

log = logging.getLogger(__name__)

OWN_AGE_S = 60.0  # younger ones may belong to a request under way
LEAKED_AGE_S = 300.0  # another node may be about to attach it


async def sweep_own(
    cloud: Cloud, instance_id: str, busy: Collection[str], wall: Callable[[], float]
) -> bool:
    """Delete ENIs that this instance made and never attached.

    Returns whether some are too young to judge. Raises CloudError when EC2 does not list them.
    """
    found = await cloud.find_enis({f"tag:{INSTANCE_TAG}": instance_id, "status": "available"})
    again = False
    for eni in found:
        if eni.id in busy:
            again = True
        else:
            again |= not await _delete_if_old(cloud, eni, OWN_AGE_S, wall())
    return again


async def sweep_leaked(
    cloud: Cloud, settings: Settings, vpc_id: str, busy: Collection[str], wall: Callable[[], float]
) -> None:
    """Delete what dead nodes of this cluster left behind. Raises CloudError.

    An ENI without a creation time gets one, and is judged by it the next time.
    """
    filters = {"tag-key": INSTANCE_TAG, "status": "available", "vpc-id": vpc_id}
    if settings.cluster_name:
        filters[f"tag:{CLUSTER_TAG}"] = settings.cluster_name
    for eni in await cloud.find_enis(filters):
        if eni.id not in busy and eni.description.startswith(DESCRIPTION_PREFIX):
            await _delete_if_old(cloud, eni, LEAKED_AGE_S, wall())


async def _delete_if_old(cloud: Cloud, eni: CloudEni, age_s: float, now: float) -> bool:
    """Whether the ENI is gone or was found to be somebody's."""
    created = created_at(eni.tags)
    try:
        if created is None:
            await cloud.tag(eni.id, {CREATED_TAG: stamp(now)})
        elif now - created >= age_s:
            await cloud.delete_eni(eni.id)
            log.info("deleted the leaked ENI %s of %s", eni.id, eni.tags.get(INSTANCE_TAG))
            return True
    except CloudError as error:
        if error.gone:
            return True
        log.warning("%s", error)
    return False
