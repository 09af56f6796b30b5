"""The fake cloud behind its real wire protocols: boto3 and our IMDSv2 client are the clients."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import boto3
import botocore.config
import pytest
from aiohttp import web
from botocore.exceptions import ClientError

from podwire.ipam.vpc.cloud import CloudError, NewEni
from podwire.ipam.vpc.ec2 import Ec2, LateInvoke, boto_invoke
from podwire.ipam.vpc.imds import Imds
from podwire.lab.cloud.faults import Fault
from podwire.lab.cloud.server import Cloud, ec2_app, imds_app, serve
from podwire.net import parse_address, parse_prefix


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def with_cloud(play: Callable[[Cloud, str, str], Awaitable[None]]) -> None:
    """Run `play(cloud, EC2 endpoint, IMDS endpoint)` with a VPC and one m5.large in it."""

    async def stage() -> None:
        cloud = Cloud()
        vpc = cloud.model.add_vpc(["10.0.0.0/16"], ["fd00:10::/56"])
        subnet = cloud.model.add_subnet(vpc, "10.0.1.0/24", ipv6_cidr="fd00:10::/64")
        instance = cloud.model.run_instance("m5.large", subnet)
        urls: list[str] = []
        closers: list[Callable[[], Awaitable[None]]] = []
        for app in (ec2_app(cloud), imds_app(cloud, lambda _: instance.id)):
            sites: list[web.TCPSite] = []

            def site(runner: web.AppRunner, sites: list[web.TCPSite] = sites) -> web.TCPSite:
                sites.append(web.TCPSite(runner, "127.0.0.1", 0))
                return sites[0]

            closers.append(await serve(app, site))
            server: Any = sites[0]._server
            urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            await play(cloud, *urls)
        finally:
            for close in closers:
                await close()

    asyncio.run(stage())


def test_an_eni_from_its_creation_to_its_end() -> None:
    async def play(cloud: Cloud, url: str, _: str) -> None:
        ec2 = Ec2(boto_invoke("lab-1", url))
        instance, subnet = next(iter(cloud.model.instances.values())), cloud.model.subnets
        new = NewEni(
            subnet_id=next(iter(subnet)),
            groups=["sg-default"],
            description="aws-K8S-test <&>",
            tags={"team": "net & co"},
            token="once",
            addresses=3,
        )
        eni, again = await ec2.create_eni(new), await ec2.create_eni(new)
        assert eni == again
        assert len(eni.cidrs) == 3
        assert eni.tags == {"team": "net & co"}
        assert eni.description == new.description
        assert eni.device_index is None
        attachment = await ec2.attach_eni(eni.id, instance.id, 1)
        more = await ec2.assign(eni.id, 2, 0)
        blocks = await ec2.assign(eni.id, 0, 1)
        assert [block.length for block in blocks] == [28]
        six = await ec2.assign_ipv6(eni.id, 1)
        assert six == [parse_prefix("fd00:10::1:0:0:0/80")]
        await ec2.delete_on_termination(eni.id, attachment)
        (_, seen) = await ec2.attached_enis(instance.id)
        assert seen.cidrs == {*eni.cidrs, *more, *blocks, *six}
        assert (seen.device_index, seen.attachment_id) == (1, attachment)
        assert seen.delete_on_termination
        await ec2.unassign(eni.id, [*more, *blocks, *six])
        await ec2.tag(eni.id, {"team": "other"})
        (found,) = await ec2.find_enis({"tag:team": "oth*", "status": "in-use"})
        assert found.cidrs == eni.cidrs
        with pytest.raises(CloudError) as caught:
            await ec2.delete_eni(eni.id)
        assert caught.value.code == "InvalidParameterValue"
        await ec2.detach_eni(attachment)
        await ec2.delete_eni(eni.id)
        with pytest.raises(CloudError) as caught:
            await ec2.delete_eni(eni.id)
        assert caught.value.gone

    with_cloud(play)


def test_what_is_refused_and_how() -> None:
    async def play(cloud: Cloud, url: str, _: str) -> None:
        ec2 = Ec2(boto_invoke("lab-1", url))
        (primary,) = cloud.model.enis.values()

        async def code_of(call: Awaitable[object]) -> str:
            with pytest.raises(CloudError) as caught:
                await call
            return caught.value.code

        assert await code_of(ec2.assign(primary.id, 10, 0)) == "PrivateIpAddressLimitExceeded"
        assert await code_of(ec2.find_enis({"nonsense": "x"})) == "InvalidParameterValue"
        assert await code_of(ec2.limits("z99.mega")) == "InvalidInstanceType"
        assert primary.attachment is not None
        assert await code_of(ec2.detach_eni(primary.attachment.id)) == "OperationNotPermitted"
        cloud.faults.add(Fault(code="RequestLimitExceeded", times=1))
        assert await code_of(ec2.assign(primary.id, 1, 0)) == "RequestLimitExceeded"
        cloud.faults.add(Fault("Assign*", lose_answer=True, times=1))
        with pytest.raises(CloudError) as caught:
            await ec2.assign(primary.id, 1, 0)
        assert caught.value.unanswered
        assert len(primary.secondary) == 1  # it was carried out all the same
        limits = await ec2.limits("m5.large")
        assert (limits.enis, limits.ipv4_per_eni, limits.hypervisor) == (3, 10, "nitro")

    with_cloud(play)


def test_lists_come_in_pages() -> None:
    async def play(cloud: Cloud, url: str, _: str) -> None:
        subnet = next(iter(cloud.model.subnets.values()))
        for _ in range(11):
            cloud.model.create_eni(subnet, groups=["sg-default"])

        def pages() -> list[int]:
            client: Any = boto3.client("ec2", region_name="lab-1", endpoint_url=url)
            pager = client.get_paginator("describe_network_interfaces")
            answers = pager.paginate(PaginationConfig={"PageSize": 5})
            return [len(answer["NetworkInterfaces"]) for answer in answers]

        assert await asyncio.to_thread(pages) == [5, 5, 2]
        assert len(await Ec2(boto_invoke("lab-1", url)).find_enis({})) == 12

    with_cloud(play)


def test_requests_must_be_signed() -> None:
    async def play(_cloud: Cloud, url: str, _: str) -> None:
        def call() -> str:
            unsigned = botocore.config.Config(signature_version=botocore.UNSIGNED)
            client: Any = boto3.client(
                "ec2", region_name="lab-1", endpoint_url=url, config=unsigned
            )
            with pytest.raises(ClientError) as caught:
                client.describe_vpcs()
            return caught.value.response["Error"]["Code"]

        assert await asyncio.to_thread(call) == "AuthFailure"

    with_cloud(play)


def test_the_metadata_service_shows_the_instance_and_its_enis() -> None:
    async def play(cloud: Cloud, _: str, url: str) -> None:
        (instance,) = cloud.model.instances.values()
        (eni,) = cloud.model.enis.values()
        eni.secondary += eni.subnet.take(2)
        eni.prefixes += eni.subnet.take_blocks(1)
        cloud.model.changed()
        imds = Imds(url)
        try:
            who = await imds.instance()
            assert (who.id, who.type, who.region) == (instance.id, "m5.large", "lab-1")
            assert who.primary_address == parse_address(eni.primary)
            assert who.vpc_cidrs == (parse_prefix("10.0.0.0/16"), parse_prefix("fd00:10::/56"))
            (seen,) = await imds.enis()
            assert seen.cidrs == {parse_prefix(text) for text in (*eni.secondary, *eni.prefixes)}
            assert (seen.id, seen.device_index, seen.mac) == (eni.id, 0, eni.mac)
            assert seen.subnet == parse_prefix("10.0.1.0/24")
            assert await imds.get("meta-data/network/interfaces/macs/") == f"{eni.mac}/"
            document = await imds.get("dynamic/instance-identity/document")
            assert document is not None
            assert instance.id in document
            assert await imds.get("meta-data/spot/instance-action") is None
        finally:
            await imds.close()

    with_cloud(play)


def test_tokens_are_needed_and_run_out() -> None:
    async def play(cloud: Cloud, _: str, url: str) -> None:
        now = [1000.0]
        cloud.model.clock = lambda: now[0]
        async with aiohttp.ClientSession() as session:

            async def get(token: str) -> int:
                headers = {"X-aws-ec2-metadata-token": token}
                where = url + "/latest/meta-data/instance-id"
                async with session.get(where, headers=headers) as answer:
                    return answer.status

            async def token(ttl: str) -> tuple[int, str]:
                headers = {"X-aws-ec2-metadata-token-ttl-seconds": ttl}
                async with session.put(url + "/latest/api/token", headers=headers) as answer:
                    return answer.status, await answer.text()

            assert await get("") == 401
            assert (await token("0"))[0] == (await token("21601"))[0] == 400

        imds = Imds(url)
        try:
            assert await imds.get("meta-data/instance-id")
            imds._token = "from before the service restarted"
            assert await imds.get("meta-data/instance-id")
        finally:
            await imds.close()

    with_cloud(play)


def test_a_service_that_is_away_is_an_error_with_its_path() -> None:
    async def play() -> None:
        imds = Imds("http://127.0.0.1:1")
        try:
            with pytest.raises(CloudError, match="meta-data/mac"):
                await imds.instance()
        finally:
            await imds.close()

    asyncio.run(play())


def test_credentials_that_come_late_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that was made without them would never sign a request."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")  # nobody

    async def play(_cloud: Cloud, url: str, metadata: str) -> None:
        invoke = LateInvoke(url)
        invoke.region = "lab-1"
        with pytest.raises(CloudError, match="credentials: none") as caught:
            await Ec2(invoke).find_enis({})
        assert caught.value.unanswered
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata)
        assert len(await Ec2(invoke).find_enis({})) == 1

    with_cloud(play)
