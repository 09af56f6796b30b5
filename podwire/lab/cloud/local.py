"""The cloud's clients without wires: the same requests and answers, in one process.

What the manager sends and reads is what `Ec2` and `Imds` make of it; only HTTP is left out. For
tests and benchmarks in virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from podwire.ipam.vpc.cloud import CloudError
from podwire.ipam.vpc.imds import Imds
from podwire.ipam.vpc.links import EniLink, LinkMissing
from podwire.lab.cloud.faults import AnswerLost, Ec2Error
from podwire.lab.cloud.server import Cloud


class LocalEc2:
    """An `Invoke` that calls the cloud."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def __call__(self, operation: str, parameters: Mapping[str, Any]) -> Any:
        try:
            return await self._cloud.invoke(operation, parameters)
        except Ec2Error as error:
            raise CloudError(str(error), code=error.code, operation=operation) from None
        except AnswerLost as error:
            raise CloudError(str(error), operation=operation) from None


class LocalImds(Imds):
    """The metadata client of one instance."""

    def __init__(self, cloud: Cloud, instance_id: str) -> None:
        super().__init__()
        self.away = False
        self._metadata = cloud.metadata(instance_id)

    async def get(self, path: str) -> str | None:
        if self.away:
            raise CloudError("no answer", operation=f"IMDS {path}")
        return self._metadata.get(path)


class LocalNetwork:
    """A `HostNetwork` without a kernel: a link is there once EC2 has attached its ENI."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self.links: dict[str, EniLink] = {}

    async def set_up(self, eni: EniLink, timeout_s: float) -> None:
        until = self._cloud.model.clock() + timeout_s
        while not self._there(eni.mac):
            if self._cloud.model.clock() >= until:
                raise LinkMissing(f"no link with MAC {eni.mac} after {timeout_s:g} s")
            await asyncio.sleep(0.1)
        self.links[eni.mac] = eni

    async def tear_down(self, eni: EniLink) -> None:
        self.links.pop(eni.mac, None)

    def _there(self, mac: str) -> bool:
        model = self._cloud.model
        return any(
            eni.mac == mac and eni.attachment and eni.attachment.ready_at <= model.clock()
            for eni in model.enis.values()
        )
