"""EC2 through its own API: what the manager asks, as requests and parsed answers.

`Ec2` builds requests and reads answers; `boto_invoke` is the transport. Retries are the manager's
business alone, so boto3's are off.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from podwire.errors import Unsupported
from podwire.ipam.vpc.cloud import CloudEni, CloudError, CloudSubnet, Invoke, NewEni
from podwire.ipam.vpc.limits import InstanceLimits
from podwire.net import Prefix, parse_address, parse_prefix

Observer = Callable[[str, float, str], None]  # operation, seconds, error code


class Ec2:
    """Implements `cloud.Cloud`. `observe` is told of every request."""

    def __init__(self, invoke: Invoke, observe: Observer | None = None) -> None:
        self._invoke = invoke
        self._observe = observe

    async def attached_enis(self, instance_id: str) -> list[CloudEni]:
        """ENIs attached to the instance, as EC2 sees it: authoritative."""
        return await self.find_enis({"attachment.instance-id": instance_id})

    async def find_enis(self, filters: Mapping[str, str]) -> list[CloudEni]:
        """ENIs that match all filters."""
        answer = await self._pages(
            "DescribeNetworkInterfaces", "NetworkInterfaces", {"Filters": _filters(filters)}
        )
        return [_eni(one) for one in answer]

    async def create_eni(self, new: NewEni) -> CloudEni:
        """Make an ENI with all its addresses and tags in one request."""
        parameters: dict[str, Any] = {
            "SubnetId": new.subnet_id,
            "Description": new.description,
            "ClientToken": new.token,
            "TagSpecifications": [
                {"ResourceType": "network-interface", "Tags": _tags(new.tags)},
            ],
        }
        if new.groups:
            parameters["Groups"] = list(new.groups)
        if new.addresses:
            parameters["SecondaryPrivateIpAddressCount"] = new.addresses
        if new.prefixes:
            parameters["Ipv6PrefixCount" if new.ipv6 else "Ipv4PrefixCount"] = new.prefixes
        answer = await self._call("CreateNetworkInterface", parameters)
        return _eni(answer["NetworkInterface"])

    async def attach_eni(self, eni_id: str, instance_id: str, device_index: int) -> str:
        """Attach; what comes back is the attachment's id. The device appears later."""
        answer = await self._call(
            "AttachNetworkInterface",
            {
                "NetworkInterfaceId": eni_id,
                "InstanceId": instance_id,
                "DeviceIndex": device_index,
            },
        )
        return answer["AttachmentId"]

    async def delete_on_termination(self, eni_id: str, attachment_id: str) -> None:
        """Let the ENI go when the instance does."""
        change = {"AttachmentId": attachment_id, "DeleteOnTermination": True}
        await self._call(
            "ModifyNetworkInterfaceAttribute",
            {"NetworkInterfaceId": eni_id, "Attachment": change},
        )

    async def detach_eni(self, attachment_id: str) -> None:
        await self._call("DetachNetworkInterface", {"AttachmentId": attachment_id})

    async def delete_eni(self, eni_id: str) -> None:
        await self._call("DeleteNetworkInterface", {"NetworkInterfaceId": eni_id})

    async def assign(self, eni_id: str, addresses: int, prefixes: int) -> list[Prefix]:
        """More secondary addresses, or /28 prefixes; returns the new ones."""
        parameters: dict[str, Any] = {"NetworkInterfaceId": eni_id}
        if addresses:
            parameters["SecondaryPrivateIpAddressCount"] = addresses
        if prefixes:
            parameters["Ipv4PrefixCount"] = prefixes
        answer = await self._call("AssignPrivateIpAddresses", parameters)
        single = (a["PrivateIpAddress"] for a in answer.get("AssignedPrivateIpAddresses", ()))
        blocks = (b["Ipv4Prefix"] for b in answer.get("AssignedIpv4Prefixes", ()))
        return [parse_prefix(text) for text in (*single, *blocks)]

    async def assign_ipv6(self, eni_id: str, prefixes: int) -> list[Prefix]:
        """More /80 prefixes; returns the new ones."""
        answer = await self._call(
            "AssignIpv6Addresses", {"NetworkInterfaceId": eni_id, "Ipv6PrefixCount": prefixes}
        )
        return [parse_prefix(text) for text in answer.get("AssignedIpv6Prefixes", ())]

    async def unassign(self, eni_id: str, cidrs: Sequence[Prefix]) -> None:
        """Give addresses and prefixes back to the subnet."""
        parameters: dict[str, Any] = {"NetworkInterfaceId": eni_id}
        if single := [str(cidr)[:-3] for cidr in cidrs if cidr.length == 32]:
            parameters["PrivateIpAddresses"] = single
        if blocks := [str(cidr) for cidr in cidrs if cidr.length < 32]:
            parameters["Ipv4Prefixes"] = blocks
        if len(parameters) > 1:
            await self._call("UnassignPrivateIpAddresses", parameters)
        if blocks6 := [str(cidr) for cidr in cidrs if cidr.bits == 128]:
            await self._call(
                "UnassignIpv6Addresses", {"NetworkInterfaceId": eni_id, "Ipv6Prefixes": blocks6}
            )

    async def subnets(self, vpc_id: str, zone: str) -> list[CloudSubnet]:
        """The subnets of a VPC in one availability zone."""
        filters = _filters({"vpc-id": vpc_id, "availability-zone": zone})
        answer = await self._pages("DescribeSubnets", "Subnets", {"Filters": filters})
        return [_subnet(one) for one in answer]

    async def tag(self, resource_id: str, tags: Mapping[str, str]) -> None:
        await self._call("CreateTags", {"Resources": [resource_id], "Tags": _tags(tags)})

    async def limits(self, instance_type: str) -> InstanceLimits:
        """The limits of a type that `known_limits` does not know."""
        answer = await self._call("DescribeInstanceTypes", {"InstanceTypes": [instance_type]})
        facts = answer["InstanceTypes"][0]
        network = facts["NetworkInfo"]
        default = network.get("DefaultNetworkCardIndex", 0)
        cards = {card["NetworkCardIndex"]: card for card in network.get("NetworkCards", ())}
        return InstanceLimits(
            enis=cards.get(default, network)["MaximumNetworkInterfaces"],
            ipv4_per_eni=network["Ipv4AddressesPerInterface"],
            ipv6_per_eni=network["Ipv6AddressesPerInterface"],
            network_cards=network.get("MaximumNetworkCards", 1),
            hypervisor="metal" if facts.get("BareMetal") else facts.get("Hypervisor", "nitro"),
        )

    async def _pages(self, operation: str, key: str, parameters: dict[str, Any]) -> list[Any]:
        items: list[Any] = []
        while True:
            answer = await self._call(operation, parameters)
            items += answer.get(key, ())
            token = answer.get("NextToken")
            if not token:
                return items
            parameters = {**parameters, "NextToken": token}

    async def _call(self, operation: str, parameters: Mapping[str, Any]) -> Any:
        start, code = time.monotonic(), ""
        try:
            return await self._invoke(operation, parameters)
        except CloudError as error:
            code = error.code or "NoAnswer"
            raise
        finally:
            if self._observe:
                self._observe(operation, time.monotonic() - start, code)


class LateInvoke:
    """`boto_invoke` for a region that becomes known later, and once credentials are to be had.

    Raises Unsupported without boto3.
    """

    def __init__(self, endpoint_url: str = "") -> None:
        _need_boto3()
        self.region = ""
        self._endpoint_url = endpoint_url
        self._invoke: Invoke | None = None

    async def __call__(self, operation: str, parameters: Mapping[str, Any]) -> Any:
        if self._invoke is None:  # reading boto3's description of EC2 takes a third of a second
            self._invoke = await asyncio.to_thread(boto_invoke, self.region, self._endpoint_url)
        return await self._invoke(operation, parameters)


def _need_boto3() -> None:
    if importlib.util.find_spec("boto3") is None:
        raise Unsupported("VPC mode needs boto3: pip install 'podwire[vpc]'")


def boto_invoke(region: str, endpoint_url: str = "", timeout_s: float = 15.0) -> Invoke:
    """The transport through boto3, each request in a thread. Raises Unsupported without boto3.

    Credentials come from boto3's own chain (environment, web identity, instance role). Raises
    CloudError while it has none: a client that is made without them never asks for them again.
    """
    _need_boto3()
    import boto3
    import botocore.config
    import botocore.exceptions
    import botocore.session

    config = botocore.config.Config(
        connect_timeout=5,
        read_timeout=timeout_s,
        retries={"mode": "standard", "total_max_attempts": 1},
        parameter_validation=False,
        max_pool_connections=16,
    )
    core: Any = botocore.session.get_session()
    # one second and one try, as boto3 has it, is too little for a node that has just booted
    core.set_config_variable("metadata_service_timeout", 5)
    core.set_config_variable("metadata_service_num_attempts", 3)
    session: Any = boto3.session.Session(botocore_session=core)
    try:
        credentials = session.get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        raise CloudError(str(error), operation="credentials") from None
    if credentials is None:
        raise CloudError("none found: no instance role answers", operation="credentials")
    client: Any = session.client(
        "ec2", region_name=region, endpoint_url=endpoint_url or None, config=config
    )

    def call(operation: str, parameters: Mapping[str, Any]) -> Any:
        try:
            return getattr(client, _snake(operation))(**parameters)
        except botocore.exceptions.ClientError as error:
            facts: Any = error.response.get("Error", {})
            raise CloudError(
                facts.get("Message", ""), code=facts.get("Code", ""), operation=operation
            ) from None
        except botocore.exceptions.BotoCoreError as error:
            raise CloudError(str(error), operation=operation) from None

    def invoke(operation: str, parameters: Mapping[str, Any]) -> Awaitable[Any]:
        return asyncio.to_thread(call, operation, parameters)

    return invoke


def _snake(operation: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", operation).lower()


def _filters(filters: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"Name": name, "Values": [value]} for name, value in filters.items()]


def _tags(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def _eni(facts: Mapping[str, Any]) -> CloudEni:
    attachment: Mapping[str, Any] = facts.get("Attachment") or {}
    primary = facts.get("PrivateIpAddress", "")
    cidrs = [
        *(
            one["PrivateIpAddress"]
            for one in facts.get("PrivateIpAddresses", ())
            if not one.get("Primary") and one["PrivateIpAddress"] != primary
        ),
        *(one["Ipv4Prefix"] for one in facts.get("Ipv4Prefixes", ())),
        *(one["Ipv6Prefix"] for one in facts.get("Ipv6Prefixes", ())),
    ]
    attached = attachment.get("Status") in ("attached", "attaching")
    return CloudEni(
        id=facts["NetworkInterfaceId"],
        mac=facts.get("MacAddress", ""),
        subnet_id=facts.get("SubnetId", ""),
        address=parse_address(primary) if primary else b"",
        cidrs=frozenset(parse_prefix(text) for text in cidrs),
        device_index=attachment.get("DeviceIndex", 0) if attached else None,
        card_index=attachment.get("NetworkCardIndex", 0),
        attachment_id=attachment.get("AttachmentId", ""),
        instance_id=attachment.get("InstanceId", ""),
        delete_on_termination=attachment.get("DeleteOnTermination", False),
        kind=facts.get("InterfaceType", "interface"),
        description=facts.get("Description", ""),
        groups=tuple(group["GroupId"] for group in facts.get("Groups", ())),
        tags={tag["Key"]: tag["Value"] for tag in facts.get("TagSet", ())},
    )


def _subnet(facts: Mapping[str, Any]) -> CloudSubnet:
    blocks6 = [
        one["Ipv6CidrBlock"]
        for one in facts.get("Ipv6CidrBlockAssociationSet", ())
        if one.get("Ipv6CidrBlockState", {}).get("State") == "associated"
    ]
    return CloudSubnet(
        id=facts["SubnetId"],
        cidr=parse_prefix(facts["CidrBlock"]),
        available=facts.get("AvailableIpAddressCount", 0),
        zone=facts.get("AvailabilityZone", ""),
        cidr6=parse_prefix(blocks6[0]) if blocks6 else None,
        tags={tag["Key"]: tag["Value"] for tag in facts.get("Tags", ())},
    )
