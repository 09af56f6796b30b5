"""EC2's operations on the model: parameters and answers have the shapes of the public API."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypeVar

from podwire.ipam.vpc.limits import known_limits
from podwire.lab.cloud.faults import Ec2Error
from podwire.lab.cloud.model import Eni, Instance, Model, Subnet

Parameters: TypeAlias = Mapping[str, Any]
Answer: TypeAlias = dict[str, Any]
ItemT = TypeVar("ItemT")

NOT_FOUND = {
    "eni": ("InvalidNetworkInterfaceID.NotFound", "The networkInterface ID '{}' does not exist"),
    "subnet": ("InvalidSubnetID.NotFound", "The subnet ID '{}' does not exist"),
    "i": ("InvalidInstanceID.NotFound", "The instance ID '{}' does not exist"),
}


class Operations:
    """`call` runs one operation; what EC2 refuses raises Ec2Error and changes nothing."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def call(self, operation: str, parameters: Parameters) -> Answer:
        handler: Callable[[Parameters], Answer] | None = getattr(self, operation, None)
        if handler is None or not operation[0].isupper():
            raise Ec2Error("InvalidAction", f"The action {operation} is not valid")
        return handler(parameters)

    # -- network interfaces -----------------------------------------------------------------

    def CreateNetworkInterface(self, p: Parameters) -> Answer:
        token = p.get("ClientToken", "")
        if token and token in self.model.tokens:
            return {"NetworkInterface": _eni(self.model, self._eni(self.model.tokens[token]))}
        subnet = self._subnet(p["SubnetId"])
        named: list[Parameters] = list(p.get("PrivateIpAddresses", ()))
        primary = p.get("PrivateIpAddress") or next(
            (a["PrivateIpAddress"] for a in named if a.get("Primary")), ""
        )
        eni = self.model.create_eni(
            subnet, groups=list(p.get("Groups", ())) or ["sg-default"], primary=primary
        )
        eni.description = p.get("Description", "")
        eni.interface_type = p.get("InterfaceType", "interface")
        eni.tags.update(_tags(p.get("TagSpecifications", ())))
        try:
            for address in named:
                if not address.get("Primary"):
                    eni.secondary.append(subnet.take_this(address["PrivateIpAddress"]))
            eni.secondary += subnet.take(p.get("SecondaryPrivateIpAddressCount", 0))
            eni.prefixes += subnet.take_blocks(p.get("Ipv4PrefixCount", 0))
            if count := p.get("Ipv6AddressCount", 0):
                eni.ipv6 += subnet.take6(count)
            if count := p.get("Ipv6PrefixCount", 0):
                eni.ipv6_prefixes += subnet.take_blocks6(count)
        except Ec2Error:
            self.model.delete(eni)
            raise
        if token:
            self.model.tokens[token] = eni.id
        return {"NetworkInterface": _eni(self.model, eni)}

    def DescribeNetworkInterfaces(self, p: Parameters) -> Answer:
        enis = [self._eni(id) for id in p.get("NetworkInterfaceIds", ())]
        enis = enis or list(self.model.enis.values())
        chosen = _filtered(enis, p.get("Filters", ()), _eni_field)
        page, token = _page(chosen, p)
        return {"NetworkInterfaces": [_eni(self.model, eni) for eni in page], **token}

    def AttachNetworkInterface(self, p: Parameters) -> Answer:
        eni, instance = self._eni(p["NetworkInterfaceId"]), self._instance(p["InstanceId"])
        attachment = self.model.attach(
            eni,
            instance,
            p["DeviceIndex"],
            p.get("NetworkCardIndex", 0),
            ready_at=self.model.clock() + self.model.attach_delay_s,
        )
        return {"AttachmentId": attachment.id, "NetworkCardIndex": attachment.card_index}

    def DetachNetworkInterface(self, p: Parameters) -> Answer:
        self.model.detach(self._attached(p["AttachmentId"]))
        return {}

    def DeleteNetworkInterface(self, p: Parameters) -> Answer:
        self.model.delete(self._eni(p["NetworkInterfaceId"]))
        return {}

    def ModifyNetworkInterfaceAttribute(self, p: Parameters) -> Answer:
        eni = self._eni(p["NetworkInterfaceId"])
        if change := p.get("Attachment"):
            if eni.attachment is None or eni.attachment.id != change["AttachmentId"]:
                raise Ec2Error(
                    "InvalidAttachmentID.NotFound",
                    f"The attachment ID '{change['AttachmentId']}' does not exist",
                )
            eni.attachment.delete_on_termination = change["DeleteOnTermination"]
        if "Groups" in p:
            eni.groups = list(p["Groups"])
        if "Description" in p:
            eni.description = p["Description"]["Value"]
        if "SourceDestCheck" in p:
            eni.source_dest_check = p["SourceDestCheck"]["Value"]
        return {}

    # -- addresses --------------------------------------------------------------------------

    def AssignPrivateIpAddresses(self, p: Parameters) -> Answer:
        eni = self._eni(p["NetworkInterfaceId"])
        count, blocks = p.get("SecondaryPrivateIpAddressCount", 0), p.get("Ipv4PrefixCount", 0)
        named = list(p.get("PrivateIpAddresses", ()))
        if not (count or blocks or named):
            raise Ec2Error("MissingParameter", "Either the IP addresses or a count is missing")
        self.model.check_slots(eni, count + blocks + len(named))
        addresses = eni.subnet.take(count)
        try:
            for text in named:
                addresses.append(eni.subnet.take_this(text))
            prefixes = eni.subnet.take_blocks(blocks)
        except Ec2Error:
            eni.subnet.release(addresses)
            raise
        eni.secondary += addresses
        eni.prefixes += prefixes
        self.model.changed()
        return {
            "NetworkInterfaceId": eni.id,
            "AssignedPrivateIpAddresses": [{"PrivateIpAddress": text} for text in addresses],
            "AssignedIpv4Prefixes": [{"Ipv4Prefix": text} for text in prefixes],
        }

    def UnassignPrivateIpAddresses(self, p: Parameters) -> Answer:
        eni = self._eni(p["NetworkInterfaceId"])
        self._take_away(eni, p.get("PrivateIpAddresses", ()), eni.secondary)
        self._take_away(eni, p.get("Ipv4Prefixes", ()), eni.prefixes)
        self.model.changed()
        return {}

    def AssignIpv6Addresses(self, p: Parameters) -> Answer:
        eni = self._eni(p["NetworkInterfaceId"])
        addresses = eni.subnet.take6(p.get("Ipv6AddressCount", 0))
        prefixes = eni.subnet.take_blocks6(p.get("Ipv6PrefixCount", 0))
        eni.ipv6 += addresses
        eni.ipv6_prefixes += prefixes
        self.model.changed()
        return {
            "NetworkInterfaceId": eni.id,
            "AssignedIpv6Addresses": addresses,
            "AssignedIpv6Prefixes": prefixes,
        }

    def UnassignIpv6Addresses(self, p: Parameters) -> Answer:
        eni = self._eni(p["NetworkInterfaceId"])
        self._take_away(eni, p.get("Ipv6Addresses", ()), eni.ipv6)
        self._take_away(eni, p.get("Ipv6Prefixes", ()), eni.ipv6_prefixes)
        self.model.changed()
        return {"NetworkInterfaceId": eni.id}

    def _take_away(self, eni: Eni, texts: Sequence[str], held: list[str]) -> None:
        for text in texts:
            if text not in held:
                raise Ec2Error(
                    "InvalidParameterValue",
                    f"Some of the specified addresses are not assigned to interface {eni.id}",
                )
        for text in texts:
            held.remove(text)
        eni.subnet.release(texts)

    # -- the rest ---------------------------------------------------------------------------

    def DescribeInstances(self, p: Parameters) -> Answer:
        instances = [self._instance(id) for id in p.get("InstanceIds", ())]
        instances = instances or list(self.model.instances.values())
        chosen = _filtered(instances, p.get("Filters", ()), _instance_field)
        page, token = _page(chosen, p)
        described = [_instance(self.model, instance) for instance in page]
        return {"Reservations": [{"Instances": [one]} for one in described], **token}

    def DescribeInstanceTypes(self, p: Parameters) -> Answer:
        names: list[str] = list(p.get("InstanceTypes", ()))
        if unknown := [name for name in names if known_limits(name) is None]:
            raise Ec2Error(
                "InvalidInstanceType",
                f"The following supplied instance types do not exist: [{', '.join(unknown)}]",
            )
        page, token = _page(names, p)
        return {"InstanceTypes": [_instance_type(name) for name in page], **token}

    def DescribeSubnets(self, p: Parameters) -> Answer:
        subnets = [self._subnet(id) for id in p.get("SubnetIds", ())]
        subnets = subnets or list(self.model.subnets.values())
        page, token = _page(_filtered(subnets, p.get("Filters", ()), _subnet_field), p)
        return {"Subnets": [_subnet(subnet) for subnet in page], **token}

    def DescribeVpcs(self, p: Parameters) -> Answer:
        wanted = p.get("VpcIds") or list(self.model.vpcs)
        if unknown := [id for id in wanted if id not in self.model.vpcs]:
            raise Ec2Error("InvalidVpcID.NotFound", f"The vpc ID '{unknown[0]}' does not exist")
        page, token = _page([self.model.vpcs[id] for id in wanted], p)
        return {
            "Vpcs": [
                {
                    "VpcId": vpc.id,
                    "State": "available",
                    "CidrBlock": vpc.cidrs[0],
                    "CidrBlockAssociationSet": [
                        {"CidrBlock": cidr, "CidrBlockState": {"State": "associated"}}
                        for cidr in vpc.cidrs
                    ],
                    "Ipv6CidrBlockAssociationSet": [
                        {"Ipv6CidrBlock": cidr, "Ipv6CidrBlockState": {"State": "associated"}}
                        for cidr in vpc.ipv6_cidrs
                    ],
                }
                for vpc in page
            ],
            **token,
        }

    def DescribeSecurityGroups(self, p: Parameters) -> Answer:
        vpc_id = next(iter(self.model.vpcs), "")
        groups = sorted({group for eni in self.model.enis.values() for group in eni.groups})
        wanted = p.get("GroupIds") or groups
        page, token = _page([group for group in groups if group in wanted], p)
        return {
            "SecurityGroups": [
                {"GroupId": group, "GroupName": group, "VpcId": vpc_id} for group in page
            ],
            **token,
        }

    def CreateTags(self, p: Parameters) -> Answer:
        holders: list[Eni | Subnet] = []
        for id in p["Resources"]:
            holders.append(self._subnet(id) if id.startswith("subnet-") else self._eni(id))
        for holder in holders:
            holder.tags.update({tag["Key"]: tag["Value"] for tag in p["Tags"]})
        return {}

    def _eni(self, id: str) -> Eni:
        return _find(self.model.enis, id, "eni")

    def _subnet(self, id: str) -> Subnet:
        return _find(self.model.subnets, id, "subnet")

    def _instance(self, id: str) -> Instance:
        return _find(self.model.instances, id, "i")

    def _attached(self, attachment_id: str) -> Eni:
        for eni in self.model.enis.values():
            if eni.attachment is not None and eni.attachment.id == attachment_id:
                return eni
        raise Ec2Error(
            "InvalidAttachmentID.NotFound", f"The attachment ID '{attachment_id}' does not exist"
        )


def _find(things: Mapping[str, ItemT], id: str, kind: str) -> ItemT:
    try:
        return things[id]
    except KeyError:
        code, message = NOT_FOUND[kind]
        raise Ec2Error(code, message.format(id)) from None


def _page(items: Sequence[ItemT], p: Parameters) -> tuple[Sequence[ItemT], Answer]:
    start, size = int(p.get("NextToken") or 0), p.get("MaxResults") or 1000
    rest = {"NextToken": str(start + size)} if start + size < len(items) else {}
    return items[start : start + size], rest


def _filtered(
    items: Iterable[ItemT],
    filters: Sequence[Parameters],
    fields: Callable[[ItemT, str], Iterable[str]],
) -> list[ItemT]:
    """Items for which every filter has a value that matches (``*`` and ``?`` are wildcards)."""
    return [
        item
        for item in items
        if all(
            any(
                fnmatch.fnmatchcase(value, pattern)
                for value in fields(item, one["Name"])
                for pattern in one["Values"]
            )
            for one in filters
        )
    ]


def _eni_field(eni: Eni, name: str) -> Iterable[str]:
    attachment = eni.attachment
    fields: dict[str, Iterable[str]] = {
        "network-interface-id": [eni.id],
        "vpc-id": [eni.subnet.vpc_id],
        "subnet-id": [eni.subnet.id],
        "availability-zone": [eni.subnet.zone],
        "status": ["available" if attachment is None else "in-use"],
        "description": [eni.description],
        "mac-address": [eni.mac],
        "private-ip-address": [eni.primary],
        "addresses.private-ip-address": [eni.primary, *eni.secondary],
        "group-id": eni.groups,
        "interface-type": [eni.interface_type],
        "attachment.instance-id": [attachment.instance_id] if attachment else [],
        "attachment.attachment-id": [attachment.id] if attachment else [],
        "attachment.device-index": [str(attachment.device_index)] if attachment else [],
    }
    return _field(fields, eni.tags, name)


def _subnet_field(subnet: Subnet, name: str) -> Iterable[str]:
    fields: dict[str, Iterable[str]] = {
        "subnet-id": [subnet.id],
        "vpc-id": [subnet.vpc_id],
        "availability-zone": [subnet.zone],
        "cidr-block": [str(subnet.network)],
        "state": ["available"],
    }
    return _field(fields, subnet.tags, name)


def _instance_field(instance: Instance, name: str) -> Iterable[str]:
    fields: dict[str, Iterable[str]] = {
        "instance-id": [instance.id],
        "instance-state-name": [instance.state],
        "vpc-id": [instance.subnet.vpc_id],
        "subnet-id": [instance.subnet.id],
    }
    return _field(fields, {}, name)


def _field(
    fields: Mapping[str, Iterable[str]], tags: Mapping[str, str], name: str
) -> Iterable[str]:
    if name == "tag-key":
        return tags
    if name.startswith("tag:"):
        return [value for key, value in tags.items() if key == name[4:]]
    if name not in fields:
        raise Ec2Error("InvalidParameterValue", f"The filter '{name}' is invalid")
    return fields[name]


def _tags(specifications: Iterable[Parameters]) -> dict[str, str]:
    return {
        tag["Key"]: tag["Value"]
        for specification in specifications
        for tag in specification.get("Tags", ())
    }


def _tag_set(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def _eni(model: Model, eni: Eni) -> Answer:
    answer: Answer = {
        "NetworkInterfaceId": eni.id,
        "MacAddress": eni.mac,
        "SubnetId": eni.subnet.id,
        "VpcId": eni.subnet.vpc_id,
        "AvailabilityZone": eni.subnet.zone,
        "OwnerId": "123456789012",
        "Description": eni.description,
        "InterfaceType": eni.interface_type,
        "SourceDestCheck": eni.source_dest_check,
        "Status": "available" if eni.attachment is None else "in-use",
        "PrivateIpAddress": eni.primary,
        "PrivateIpAddresses": [
            {"PrivateIpAddress": text, "Primary": text == eni.primary}
            for text in (eni.primary, *eni.secondary)
        ],
        "Ipv4Prefixes": [{"Ipv4Prefix": text} for text in eni.prefixes],
        "Ipv6Addresses": [{"Ipv6Address": text} for text in eni.ipv6],
        "Ipv6Prefixes": [{"Ipv6Prefix": text} for text in eni.ipv6_prefixes],
        "Groups": [{"GroupId": group, "GroupName": group} for group in eni.groups],
        "TagSet": _tag_set(eni.tags),
    }
    if attachment := eni.attachment:
        ready = model.clock() >= attachment.ready_at
        answer["Attachment"] = {
            "AttachmentId": attachment.id,
            "InstanceId": attachment.instance_id,
            "DeviceIndex": attachment.device_index,
            "NetworkCardIndex": attachment.card_index,
            "DeleteOnTermination": attachment.delete_on_termination,
            "Status": "attached" if ready else "attaching",
            "AttachTime": datetime.fromtimestamp(attachment.ready_at, UTC),
        }
    return answer


def _subnet(subnet: Subnet) -> Answer:
    answer: Answer = {
        "SubnetId": subnet.id,
        "VpcId": subnet.vpc_id,
        "AvailabilityZone": subnet.zone,
        "CidrBlock": str(subnet.network),
        "AvailableIpAddressCount": subnet.available,
        "State": "available",
        "Tags": _tag_set(subnet.tags),
    }
    if subnet.ipv6_network:
        answer["Ipv6CidrBlockAssociationSet"] = [
            {
                "Ipv6CidrBlock": str(subnet.ipv6_network),
                "Ipv6CidrBlockState": {"State": "associated"},
            }
        ]
    return answer


def _instance(model: Model, instance: Instance) -> Answer:
    return {
        "InstanceId": instance.id,
        "InstanceType": instance.type,
        "State": {"Code": 16, "Name": instance.state},
        "SubnetId": instance.subnet.id,
        "VpcId": instance.subnet.vpc_id,
        "Placement": {"AvailabilityZone": instance.subnet.zone},
        "NetworkInterfaces": [_eni(model, eni) for eni in model.enis_of(instance.id)],
    }


def _instance_type(name: str) -> Answer:
    limits = known_limits(name)
    assert limits is not None
    return {
        "InstanceType": name,
        "BareMetal": limits.hypervisor == "metal",
        **({} if limits.hypervisor == "metal" else {"Hypervisor": limits.hypervisor}),
        "NetworkInfo": {
            "MaximumNetworkInterfaces": limits.enis,
            "Ipv4AddressesPerInterface": limits.ipv4_per_eni,
            "Ipv6AddressesPerInterface": limits.ipv6_per_eni,
            "Ipv6Supported": limits.ipv6_per_eni > 0,
            "MaximumNetworkCards": limits.network_cards,
            "DefaultNetworkCardIndex": 0,
            "NetworkCards": [{"NetworkCardIndex": 0, "MaximumNetworkInterfaces": limits.enis}],
        },
    }
