"""The fake and moto 5 must answer alike where moto is right."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import boto3
import moto
import pytest
from botocore.exceptions import ClientError

from podwire.ipam.vpc.ec2 import _snake
from podwire.lab.cloud.faults import Ec2Error
from podwire.lab.cloud.server import Cloud


class Fake:
    """The fake, called like a boto3 client."""

    def __init__(self) -> None:
        self._cloud = Cloud()
        vpc = self._cloud.model.add_vpc(["10.0.0.0/16"])
        subnet = self._cloud.model.add_subnet(vpc, "10.0.1.0/24")
        self.subnet_id, self.vpc_id = subnet.id, vpc.id
        self.instance_id = self._cloud.model.run_instance("m5.large", subnet).id

    def call(self, operation: str, **parameters: Any) -> Any:
        return asyncio.run(self._cloud.invoke(operation, parameters))


class Moto:
    """moto in this process."""

    def __init__(self) -> None:
        self._client: Any = boto3.client("ec2", region_name="us-east-1")
        self.vpc_id = self._client.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        self.subnet_id = self._client.create_subnet(VpcId=self.vpc_id, CidrBlock="10.0.1.0/24")[
            "Subnet"
        ]["SubnetId"]
        image = self._client.describe_images()["Images"][0]["ImageId"]
        self.instance_id = self._client.run_instances(
            ImageId=image,
            InstanceType="m5.large",
            SubnetId=self.subnet_id,
            MinCount=1,
            MaxCount=1,
        )["Instances"][0]["InstanceId"]

    def call(self, operation: str, **parameters: Any) -> Any:
        try:
            return getattr(self._client, _snake(operation))(**parameters)
        except ClientError as error:
            raise Ec2Error(error.response["Error"]["Code"], "") from None


@pytest.fixture(scope="module", params=["fake", "moto"])
def ec2(request: pytest.FixtureRequest) -> Iterator[Fake | Moto]:
    """One for all tests: moto takes seconds to make an instance."""
    if request.param == "fake":
        yield Fake()
        return
    with pytest.MonkeyPatch.context() as monkeypatch, moto.mock_aws():
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield Moto()


def create(ec2: Fake | Moto, **parameters: Any) -> Any:
    answer = ec2.call("CreateNetworkInterface", SubnetId=ec2.subnet_id, **parameters)
    return answer["NetworkInterface"]


def code_of(ec2: Fake | Moto, operation: str, **parameters: Any) -> str:
    with pytest.raises(Ec2Error) as caught:
        ec2.call(operation, **parameters)
    return caught.value.code


def test_creation(ec2: Fake | Moto) -> None:
    tags = [{"Key": "a", "Value": "b"}]
    eni = create(
        ec2,
        Description="words",
        SecondaryPrivateIpAddressCount=3,
        TagSpecifications=[{"ResourceType": "network-interface", "Tags": tags}],
    )
    assert eni["TagSet"] == tags
    assert (eni["Description"], eni["SubnetId"], eni["VpcId"]) == (
        "words",
        ec2.subnet_id,
        ec2.vpc_id,
    )
    addresses = eni["PrivateIpAddresses"]
    assert [address["Primary"] for address in addresses] == [True, False, False, False]
    assert addresses[0]["PrivateIpAddress"] == eni["PrivateIpAddress"]


def test_life_cycle(ec2: Fake | Moto) -> None:
    eni = create(ec2)["NetworkInterfaceId"]
    attachment = ec2.call(
        "AttachNetworkInterface",
        NetworkInterfaceId=eni,
        InstanceId=ec2.instance_id,
        DeviceIndex=1,
    )["AttachmentId"]
    ec2.call(
        "ModifyNetworkInterfaceAttribute",
        NetworkInterfaceId=eni,
        Attachment={"AttachmentId": attachment, "DeleteOnTermination": True},
    )
    (seen,) = described(ec2, "attachment.instance-id", ec2.instance_id, "network-interface-id", eni)
    assert seen["Status"] == "in-use"
    assert seen["Attachment"]["AttachmentId"] == attachment
    assert seen["Attachment"]["DeviceIndex"] == 1
    assert seen["Attachment"]["InstanceId"] == ec2.instance_id
    ec2.call("DetachNetworkInterface", AttachmentId=attachment)
    (seen,) = described(ec2, "network-interface-id", eni)
    assert seen["Status"] == "available"
    ec2.call("DeleteNetworkInterface", NetworkInterfaceId=eni)
    assert not described(ec2, "network-interface-id", eni)


def described(ec2: Fake | Moto, *filters: str) -> list[Any]:
    pairs = [
        {"Name": name, "Values": [value]}
        for name, value in zip(filters[::2], filters[1::2], strict=True)
    ]
    return ec2.call("DescribeNetworkInterfaces", Filters=pairs)["NetworkInterfaces"]


def test_addresses(ec2: Fake | Moto) -> None:
    eni = create(ec2)["NetworkInterfaceId"]
    ec2.call("AssignPrivateIpAddresses", NetworkInterfaceId=eni, SecondaryPrivateIpAddressCount=2)
    (seen,) = described(ec2, "network-interface-id", eni)
    assert len(seen["PrivateIpAddresses"]) == 3
    gone = seen["PrivateIpAddresses"][2]["PrivateIpAddress"]
    ec2.call("UnassignPrivateIpAddresses", NetworkInterfaceId=eni, PrivateIpAddresses=[gone])
    (seen,) = described(ec2, "network-interface-id", eni)
    assert len(seen["PrivateIpAddresses"]) == 2


def test_filters(ec2: Fake | Moto) -> None:
    eni = create(ec2)["NetworkInterfaceId"]
    ec2.call("CreateTags", Resources=[eni], Tags=[{"Key": "team", "Value": "net"}])
    for filters in (
        ("tag-key", "team"),
        ("tag:team", "net"),
        ("tag:team", "n*"),
        ("tag:team", "net", "status", "available"),
        ("tag:team", "net", "vpc-id", ec2.vpc_id, "subnet-id", ec2.subnet_id),
    ):
        assert [one["NetworkInterfaceId"] for one in described(ec2, *filters)] == [eni], filters
    assert not described(ec2, "tag:team", "net", "status", "in-use")


def test_what_does_not_exist(ec2: Fake | Moto) -> None:
    none = "eni-0000000000000dead"
    assert code_of(ec2, "DeleteNetworkInterface", NetworkInterfaceId=none) == (
        "InvalidNetworkInterfaceID.NotFound"
    )
    assert code_of(ec2, "DetachNetworkInterface", AttachmentId="eni-attach-0dead") == (
        "InvalidAttachmentID.NotFound"
    )
    assert code_of(ec2, "DescribeInstanceTypes", InstanceTypes=["z99.mega"]) == (
        "InvalidInstanceType"
    )
    assert code_of(ec2, "CreateNetworkInterface", SubnetId="subnet-0dead") == (
        "InvalidSubnetID.NotFound"
    )


def test_instance_types(ec2: Fake | Moto) -> None:
    (facts,) = ec2.call("DescribeInstanceTypes", InstanceTypes=["m5.xlarge"])["InstanceTypes"]
    network = facts["NetworkInfo"]
    assert (network["MaximumNetworkInterfaces"], network["Ipv4AddressesPerInterface"]) == (4, 15)
    assert facts["Hypervisor"] == "nitro"


def test_subnets_and_instances(ec2: Fake | Moto) -> None:
    (subnet,) = ec2.call("DescribeSubnets", SubnetIds=[ec2.subnet_id])["Subnets"]
    assert subnet["CidrBlock"] == "10.0.1.0/24"
    before = subnet["AvailableIpAddressCount"]
    create(ec2, SecondaryPrivateIpAddressCount=2)
    (subnet,) = ec2.call("DescribeSubnets", SubnetIds=[ec2.subnet_id])["Subnets"]
    assert subnet["AvailableIpAddressCount"] == before - 3
    answer = ec2.call("DescribeInstances", InstanceIds=[ec2.instance_id])
    (instance,) = answer["Reservations"][0]["Instances"]
    (eni,) = instance["NetworkInterfaces"]
    assert eni["Attachment"]["DeviceIndex"] == 0
    assert instance["InstanceType"] == "m5.large"
