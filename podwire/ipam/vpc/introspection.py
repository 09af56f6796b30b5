"""What the address manager holds, in the JSON that users of the AWS VPC CNI know.

Source: aws/amazon-vpc-cni-k8s, pkg/ipamd/introspect.go and datastore (ENIInfos).
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from podwire.ipam.vpc.datastore import Assignment, Eni
from podwire.ipam.vpc.limits import route_table
from podwire.ipam.vpc.manager import Manager
from podwire.ipam.vpc.settings import Settings
from podwire.net import Address, Prefix, format_address
from podwire.wiring import Key, Pod

Json = dict[str, Any]
PodOf = Callable[[Key], Pod]
Answer = Callable[[], object]

NEVER = "0001-01-01T00:00:00Z"  # Go's zero time


def enis(manager: Manager[Key], pod_of: PodOf, now: Callable[[], float]) -> Json:
    """``/v1/enis``: totals, and every ENI with its addresses. Container ids are scrubbed."""
    stats = manager.store.stats()
    return {
        "TotalIPs": stats.total,
        "AssignedIPs": stats.assigned,
        "CoolingIPs": stats.cooling,
        "ENIs": {id: _eni(manager, eni, pod_of, now) for id, eni in manager.store.enis.items()},
    }


def pods(manager: Manager[Key], pod_of: PodOf) -> list[Json]:
    """One row per pod: its address, ENI, device and route table."""
    rows: list[Json] = []
    for assignment in manager.store.owners.values():
        pod, eni = pod_of(assignment.owner), manager.store.eni_of(assignment.address)
        device = eni.record.device_index if eni else None
        rows.append(
            {
                "namespace": pod.namespace,
                "pod": pod.name,
                "address": format_address(assignment.address),
                "eni": eni.record.id if eni else "",
                "device": device,
                "table": route_table(eni.record.card_index, device or 0) if eni else None,
            }
        )
    return sorted(rows, key=lambda row: (row["namespace"], row["pod"], row["address"]))


def settings_in_force(settings: Settings) -> Json:
    """``/v1/ipamd-env-settings``: under the names of the environment."""
    return {
        "WARM_ENI_TARGET": settings.warm_eni_target,
        "WARM_IP_TARGET": _unset(settings.warm_ip_target),
        "MINIMUM_IP_TARGET": _unset(settings.minimum_ip_target),
        "WARM_PREFIX_TARGET": _unset(settings.warm_prefix_target),
        "ENABLE_PREFIX_DELEGATION": settings.prefix_delegation,
        "ENABLE_IPv6": settings.ipv6,
        "MAX_ENI": _unset(settings.max_eni),
        "IP_COOLDOWN_PERIOD": settings.cooldown_s,
        "AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG": settings.custom_networking,
        "ENABLE_SUBNET_DISCOVERY": settings.subnet_discovery,
        "MANAGE_UNTAGGED_ENI": settings.manage_untagged_eni,
        "DISABLE_LEAKED_ENI_CLEANUP": settings.disable_leaked_eni_cleanup,
    }


def network_settings(settings: Settings) -> Json:
    """``/v1/networkutils-env-settings``."""
    return {
        "AWS_VPC_K8S_CNI_EXTERNALSNAT": settings.external_snat,
        "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS": [str(cidr) for cidr in settings.exclude_snat_cidrs],
        "AWS_VPC_K8S_CNI_RANDOMIZESNAT": settings.random_ports,
        "AWS_VPC_K8S_CNI_CONNMARK": settings.connmark,
        "AWS_VPC_K8S_CNI_VETHPREFIX": settings.veth_prefix,
        "AWS_VPC_ENI_MTU": settings.mtu,
        "AWS_EXTERNAL_SERVICE_CIDRS": [str(cidr) for cidr in settings.external_service_cidrs],
    }


def app(answers: Mapping[str, Answer], manager: Manager[Key]) -> web.Application:
    """The HTTP server for localhost: `answers` by path, metrics, and a list of both at ``/``."""

    def handler(answer: Answer) -> Callable[[web.Request], Any]:
        async def handle(_: web.Request) -> web.Response:
            return web.json_response(answer())

        return handle

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(manager.metrics.registry),
            headers={"Content-Type": CONTENT_TYPE_LATEST},
        )

    application = web.Application()
    for path, answer in answers.items():
        application.router.add_get(path, handler(answer))
    application.router.add_get("/metrics", metrics)
    application.router.add_get("/", handler(lambda: {"AvailableCommands": [*answers, "/metrics"]}))
    return application


def _eni(manager: Manager[Key], eni: Eni, pod_of: PodOf, now: Callable[[], float]) -> Json:
    record, family = eni.record, {32: "AvailableIPv4Cidrs", 128: "IPv6Cidrs"}
    cidrs: dict[int, Json] = {32: {}, 128: {}}
    for cidr in eni.cidrs:
        cidrs[cidr.bits][str(cidr)] = _cidr(manager, cidr, pod_of, now)
    return {
        "ID": record.id,
        "IsPrimary": record.primary,
        "IsTrunk": record.kind == "trunk",
        "IsEFA": record.kind.startswith("efa"),
        "DeviceNumber": record.device_index,
        "SubnetID": record.subnet_id,
        "RouteTableID": route_table(record.card_index, record.device_index or 0),
        "IsExcludedForPodIPs": not eni.usable,
        "Fault": eni.fault,
        **{family[bits]: found for bits, found in cidrs.items()},
    }


def _cidr(manager: Manager[Key], cidr: Prefix, pod_of: PodOf, now: Callable[[], float]) -> Json:
    store = manager.store
    owned = {a: one for a, one in store.owners.items() if a in cidr}
    resting = {a: until for a, until in store.cooling.items() if a in cidr}
    addresses = {
        format_address(address): _resting(address, resting[address] - store.cooldown_s, now)
        if address in resting
        else _assigned(owned[address], pod_of, now)
        for address in sorted({*owned, *resting})
    }
    mask = ipaddress.ip_network(str(cidr)).netmask.packed
    return {
        "Cidr": {
            "IP": format_address(cidr.address),
            "Mask": base64.b64encode(mask).decode(),  # as Go encodes a []byte
        },
        "IPAddresses": addresses,
        "IsPrefix": cidr.length < cidr.bits,
        "AddressFamily": "4" if cidr.bits == 32 else "6",
    }


def _resting(address: Address, freed: float, now: Callable[[], float]) -> Json:
    return {
        "Address": format_address(address),
        "IPAMKey": {"networkName": "", "containerID": "", "ifName": ""},
        "IPAMMetadata": {},
        "AssignedTime": NEVER,
        "UnassignedTime": _time(freed, now),
    }


def _assigned(assignment: Assignment[Key], pod_of: PodOf, now: Callable[[], float]) -> Json:
    owner, pod = assignment.owner, pod_of(assignment.owner)
    return {
        "Address": format_address(assignment.address),
        "IPAMKey": {
            "networkName": owner.network,
            "containerID": hashlib.sha256(owner.container.encode()).hexdigest()[:12],
            "ifName": owner.ifname,
        },
        "IPAMMetadata": {"k8sPodNamespace": pod.namespace, "k8sPodName": pod.name},
        "AssignedTime": _time(assignment.at, now),
        "UnassignedTime": NEVER,
    }


def _time(moment: float, now: Callable[[], float]) -> str:
    """A moment of the pool's clock as RFC 3339."""
    wall = datetime.now(UTC).timestamp() - (now() - moment)
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unset(value: int | None) -> int | str:
    return "" if value is None else value
