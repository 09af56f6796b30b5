"""The marks on ENIs: who made them, when, for which cluster, and whose they are not."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from podwire.ipam.vpc.cloud import CloudEni
from podwire.ipam.vpc.settings import Settings

INSTANCE_TAG = "node.k8s.amazonaws.com/instance_id"
CREATED_TAG = "node.k8s.amazonaws.com/createdAt"
NO_MANAGE_TAG = "node.k8s.amazonaws.com/no_manage"
CLUSTER_TAG = "cluster.k8s.amazonaws.com/name"
OWNER_TAG = "eks:eni:owner"
OWNER = "amazon-vpc-cni"
DESCRIPTION_PREFIX = "aws-K8S-"


def description(instance_id: str) -> str:
    return DESCRIPTION_PREFIX + instance_id


def creation_tags(settings: Settings, instance_id: str, now: float) -> dict[str, str]:
    """Tags of a new ENI; `now` in seconds since 1970."""
    tags = {**settings.additional_eni_tags, INSTANCE_TAG: instance_id, CREATED_TAG: stamp(now)}
    if settings.cluster_name:
        tags |= {CLUSTER_TAG: settings.cluster_name, OWNER_TAG: OWNER}
    return tags


def stamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def created_at(tags: Mapping[str, str]) -> float | None:
    """Seconds since 1970 when the ENI was made; None when its tags do not say."""
    try:
        return datetime.fromisoformat(tags.get(CREATED_TAG, "")).timestamp()
    except ValueError:
        return None


def unmanaged(eni: CloudEni, settings: Settings) -> bool:
    """Whether somebody else looks after it. The primary ENI is always ours."""
    if eni.primary:
        return False
    if eni.tags.get(NO_MANAGE_TAG) == "true":
        return True
    return INSTANCE_TAG not in eni.tags and not settings.manage_untagged_eni
