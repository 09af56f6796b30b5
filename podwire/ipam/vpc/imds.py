"""The instance metadata service, version 2: who this machine is and which ENIs it sees.

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configuring-instance-metadata-service.html
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp

from podwire.errors import InvalidObject
from podwire.ipam.vpc.cloud import CloudError, Instance, MetaEni
from podwire.net import Prefix, parse_address, parse_prefix

DEFAULT_ENDPOINT = "http://169.254.169.254"
TOKEN_TTL_S = 21600
TOKEN_HEADER = "X-aws-ec2-metadata-token"
MACS = "meta-data/network/interfaces/macs/"


class Imds:
    """Implements `cloud.Metadata`. A token is fetched once and renewed when it runs out."""

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._clock = clock
        self._token, self._token_until = "", 0.0
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str) -> str | None:
        """The text at ``/latest/<path>``; None where there is none. Raises CloudError."""
        try:
            for fresh in (False, True):
                headers = {TOKEN_HEADER: await self._fresh_token(fresh)}
                async with self._http().get(self._url(path), headers=headers) as answer:
                    if answer.status == 404:
                        return None
                    if answer.status == 401 and not fresh:
                        continue  # the service restarted or the clock jumped: one new token
                    if answer.status != 200:
                        raise CloudError(f"HTTP {answer.status}", operation=f"IMDS {path}")
                    return await answer.text()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise CloudError(reason, operation=f"IMDS {path}") from None
        raise CloudError("unauthorized", operation=f"IMDS {path}")

    async def instance(self) -> Instance:
        """Who we are. Raises CloudError when the service is away or says nonsense."""
        mac = await self._need("meta-data/mac")
        base = f"{MACS}{mac}/"
        cidrs = await self._lines(base + "vpc-ipv4-cidr-blocks")
        cidrs6 = await self._lines(base + "vpc-ipv6-cidr-blocks")
        try:
            return Instance(
                id=await self._need("meta-data/instance-id"),
                type=await self._need("meta-data/instance-type"),
                region=await self._need("meta-data/placement/region"),
                zone=await self._need("meta-data/placement/availability-zone"),
                vpc_id=await self._need(base + "vpc-id"),
                primary_mac=mac,
                primary_address=parse_address(await self._need("meta-data/local-ipv4")),
                groups=tuple(await self._lines(base + "security-group-ids")),
                subnet_id=await self._need(base + "subnet-id"),
                vpc_cidrs=tuple(parse_prefix(text) for text in (*cidrs, *cidrs6)),
            )
        except InvalidObject as error:
            raise CloudError(str(error), operation="IMDS") from None

    async def enis(self) -> list[MetaEni]:
        """The ENIs this instance sees. One that is only half there is left out."""
        macs = [line.strip("/") for line in await self._lines(MACS)]
        found = await asyncio.gather(*(self._eni(mac) for mac in macs))
        return [eni for eni in found if eni is not None]

    async def _eni(self, mac: str) -> MetaEni | None:
        base = f"{MACS}{mac}/"
        names = (
            *("interface-id", "device-number", "local-ipv4s", "ipv4-prefix", "ipv6-prefix"),
            *("subnet-id", "subnet-ipv4-cidr-block", "network-card"),
        )
        texts = await asyncio.gather(*(self.get(base + name) for name in names))
        facts = {name: text or "" for name, text in zip(names, texts, strict=True)}
        addresses = facts["local-ipv4s"].split()
        if not (facts["interface-id"] and facts["device-number"] and addresses):
            return None
        cidrs: set[Prefix] = set()
        subnet = facts["subnet-ipv4-cidr-block"]
        try:
            for text in (
                *addresses[1:],
                *facts["ipv4-prefix"].split(),
                *facts["ipv6-prefix"].split(),
            ):
                cidrs.add(parse_prefix(text))
            return MetaEni(
                id=facts["interface-id"],
                mac=mac,
                device_index=int(facts["device-number"]),
                address=parse_address(addresses[0]),
                cidrs=frozenset(cidrs),
                subnet_id=facts["subnet-id"],
                subnet=parse_prefix(subnet) if subnet else None,
                card_index=int(facts["network-card"] or 0),
            )
        except (InvalidObject, ValueError) as error:
            raise CloudError(str(error), operation=f"IMDS {base}") from None

    async def _need(self, path: str) -> str:
        text = await self.get(path)
        if not text:
            raise CloudError("nothing there", operation=f"IMDS {path}")
        return text.strip()

    async def _lines(self, path: str) -> list[str]:
        return (await self.get(path) or "").split()

    async def _fresh_token(self, renew: bool) -> str:
        if renew or self._clock() >= self._token_until:
            headers = {f"{TOKEN_HEADER}-ttl-seconds": str(TOKEN_TTL_S)}
            async with self._http().put(self._url("api/token"), headers=headers) as answer:
                if answer.status != 200:
                    raise CloudError(f"HTTP {answer.status}", operation="IMDS token")
                self._token = await answer.text()
                self._token_until = self._clock() + TOKEN_TTL_S - 300
        return self._token

    def _url(self, path: str) -> str:
        return f"{self._endpoint}/latest/{path}"

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self._session
