"""The instance metadata service: the tree an instance sees, and IMDSv2's tokens.

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import NamedTuple

from podwire.lab.cloud.model import Eni, Model

ROLE = "lab-node"
MAX_TOKEN_TTL_S = 21600


class Snapshot(NamedTuple):
    """What one ENI looked like; `ready_at` is when it may be seen."""

    ready_at: float
    mac: str
    facts: dict[str, str]


class Metadata:
    """One instance's view, `delay_s` behind what EC2 knows, as the real one is at times."""

    def __init__(self, model: Model, instance_id: str) -> None:
        self.delay_s = 0.0
        self._model, self._instance_id = model, instance_id
        self._shown: tuple[list[Snapshot], dict[str, str]] = ([], {})
        self._history: list[tuple[float, list[Snapshot]]] = [(-1.0, self._take())]
        model.listeners.append(self._remember)

    def get(self, path: str) -> str | None:
        """The text at `path` below ``/latest/``, a listing for a directory, or None."""
        tree = self.tree()
        path = path.strip("/")
        if path in tree:
            return tree[path]
        below = {key[len(path) + 1 :] for key in tree if key.startswith(path + "/")}
        names = {name.split("/")[0] + ("/" if "/" in name else "") for name in below}
        return "\n".join(sorted(names)) or None

    def tree(self) -> dict[str, str]:
        """Every leaf by its path."""
        enis = self._seen()
        shown, tree = self._shown
        if len(shown) == len(enis) and all(a is b for a, b in zip(shown, enis, strict=True)):
            return tree
        self._shown = enis, self._grow(enis)
        return self._shown[1]

    def _grow(self, enis: list[Snapshot]) -> dict[str, str]:
        instance = self._model.instances[self._instance_id]
        primary = next(one for one in enis if one.facts["device-number"] == "0")
        meta = {
            "instance-id": instance.id,
            "instance-type": instance.type,
            "local-ipv4": primary.facts["local-ipv4s"].split("\n")[0],
            "mac": primary.mac,
            "placement/availability-zone": instance.subnet.zone,
            "placement/region": self._model.region,
            "services/domain": "amazonaws.com",
            "iam/security-credentials/" + ROLE: json.dumps(_credentials()),
        }
        for eni in enis:
            for name, text in eni.facts.items():
                meta[f"network/interfaces/macs/{eni.mac}/{name}"] = text
        document = {
            "instanceId": instance.id,
            "instanceType": instance.type,
            "region": self._model.region,
            "availabilityZone": instance.subnet.zone,
            "privateIp": meta["local-ipv4"],
            "accountId": "123456789012",
        }
        tree = {f"meta-data/{path}": text for path, text in meta.items()}
        tree["dynamic/instance-identity/document"] = json.dumps(document)
        return tree

    def _seen(self) -> list[Snapshot]:
        now = self._model.clock() - self.delay_s
        past = [enis for taken, enis in self._history if taken <= now]
        return [
            eni
            for eni in (past or [self._history[0][1]])[-1]
            if eni.ready_at <= now or eni.facts["device-number"] == "0"
        ]

    def _take(self) -> list[Snapshot]:
        return [self._snapshot(eni) for eni in self._model.enis_of(self._instance_id)]

    def _remember(self) -> None:
        if not self.delay_s:
            self._history.clear()
        self._history.append((self._model.clock() if self._history else -1.0, self._take()))
        del self._history[:-64]

    def _snapshot(self, eni: Eni) -> Snapshot:
        attachment, vpc = eni.attachment, self._model.vpcs[eni.subnet.vpc_id]
        assert attachment is not None
        network6 = eni.subnet.ipv6_network
        facts = {
            "device-number": str(attachment.device_index),
            "interface-id": eni.id,
            "mac": eni.mac,
            "owner-id": "123456789012",
            "local-ipv4s": "\n".join([eni.primary, *eni.secondary]),
            "ipv4-prefix": "\n".join(eni.prefixes),
            "ipv6s": "\n".join(eni.ipv6),
            "ipv6-prefix": "\n".join(eni.ipv6_prefixes),
            "security-group-ids": "\n".join(eni.groups),
            "subnet-id": eni.subnet.id,
            "subnet-ipv4-cidr-block": str(eni.subnet.network),
            "subnet-ipv6-cidr-blocks": str(network6 or ""),
            "vpc-id": vpc.id,
            "vpc-ipv4-cidr-block": vpc.cidrs[0],
            "vpc-ipv4-cidr-blocks": "\n".join(vpc.cidrs),
            "vpc-ipv6-cidr-blocks": "\n".join(vpc.ipv6_cidrs),
        }
        return Snapshot(
            attachment.ready_at, eni.mac, {name: text for name, text in facts.items() if text}
        )


class Tokens:
    """IMDSv2's session tokens: made by PUT, good for the asked number of seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def make(self, ttl_s: int) -> str:
        token = secrets.token_urlsafe(40)
        self._until[token] = self._clock() + ttl_s
        return token

    def good(self, token: str) -> bool:
        return self._until.get(token, 0.0) > self._clock()


def _credentials() -> dict[str, str]:
    """Keys of the lab's role: any signature made with them is taken."""
    return {
        "Code": "Success",
        "Type": "AWS-HMAC",
        "LastUpdated": "2026-01-01T00:00:00Z",
        "AccessKeyId": "ASIALABLABLABLABLABL",
        "SecretAccessKey": "lab",
        "Token": "lab",
        "Expiration": "2099-01-01T00:00:00Z",
    }
