"""ENIs that nobody looks after any more: ours from before a crash, and those of dead nodes."""

from __future__ import annotations

import logging
from collections.abc import Collection

from podwire.ipam.vpc.cloud import Cloud, CloudEni, CloudError, Instance
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


async def sweep(
    cloud: Cloud, settings: Settings, instance: Instance, busy: Collection[str], now: float
) -> bool:
    """Delete ENIs of this cluster's nodes that are attached to nothing.

    Returns whether one of this instance's own is too young to judge: look again in a minute. An
    ENI without a creation time gets one, and is judged by it the next time. `now` is in seconds
    since 1970. Raises CloudError when EC2 does not list them.
    """
    filters = {"tag-key": INSTANCE_TAG, "status": "available", "vpc-id": instance.vpc_id}
    if settings.cluster_name:
        filters[f"tag:{CLUSTER_TAG}"] = settings.cluster_name
    again = False
    for eni in await cloud.find_enis(filters):
        if not eni.description.startswith(DESCRIPTION_PREFIX):
            continue
        own = eni.tags.get(INSTANCE_TAG) == instance.id
        if eni.id in busy:
            again = True
        elif not await _delete_if_old(cloud, eni, OWN_AGE_S if own else LEAKED_AGE_S, now):
            again |= own
    return again


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
