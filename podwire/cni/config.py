"""The network configuration: which keys there are, and what is wrong with them. Pure.

The keys are those of the reference plugins (bridge, ptp, host-local, static, portmap, bandwidth,
tuning, firewall), so that a configuration written for them works. Who configures only a name and a
type gets the node's defaults.

Source: https://www.cni.dev/plugins/current/
"""

from __future__ import annotations

from typing import Any

import msgspec

from podwire.cni.protocol import INVALID_CONFIG, Call, CniError
from podwire.cni.result import Dns, Result, Route, decode


class RangeConfig(msgspec.Struct, rename="camel"):
    subnet: str = ""
    range_start: str | None = None
    range_end: str | None = None
    gateway: str | None = None


class StaticAddress(msgspec.Struct):
    address: str
    gateway: str | None = None


class IpamConfig(msgspec.Struct, rename="camel"):
    """host-local's and static's keys; the flat `subnet` … `gateway` are an older spelling."""

    type: str | None = None
    ranges: list[list[RangeConfig]] | None = None
    subnet: str | None = None
    range_start: str | None = None
    range_end: str | None = None
    gateway: str | None = None
    routes: list[Route] | None = None
    addresses: list[StaticAddress] | None = None
    dns: Dns | None = None
    resolv_conf: str | None = None

    @property
    def asks(self) -> bool:
        """Whether addresses are wanted at all: an empty object means a link without any."""
        return bool(self.type or self.ranges or self.subnet or self.addresses)


class PortMapping(msgspec.Struct):
    host_port: int = msgspec.field(name="hostPort", default=0)
    container_port: int = msgspec.field(name="containerPort", default=0)
    protocol: str = "tcp"
    host_ip: str = msgspec.field(name="hostIP", default="")


class BandwidthConfig(msgspec.Struct, rename="camel"):
    """bit/s and bits."""

    ingress_rate: int = 0
    ingress_burst: int = 0
    egress_rate: int = 0
    egress_burst: int = 0


class RuntimeConfig(msgspec.Struct, rename="camel"):
    """What the runtime fills in for the capabilities that the configuration names."""

    mac: str | None = None
    ips: list[str] | None = None
    ip_ranges: list[list[RangeConfig]] | None = None
    port_mappings: list[PortMapping] | None = None
    bandwidth: BandwidthConfig | None = None
    dns: dict[str, Any] | None = None


class CniArgs(msgspec.Struct):
    ips: list[str] | None = None
    mac: str | None = None


class Args(msgspec.Struct):
    cni: CniArgs | None = None


class VlanTrunk(msgspec.Struct):
    id: int | None = None
    minID: int | None = None
    maxID: int | None = None


class NetConf(msgspec.Struct, rename="camel"):
    """Every key of every part; None where it is not given."""

    bridge: str | None = None
    is_gateway: bool | None = None
    is_default_gateway: bool | None = None
    force_address: bool | None = None
    ip_masq: bool | None = None
    ip_masq_backend: str | None = None
    mtu: int | None = None
    hairpin_mode: bool | None = None
    promisc_mode: bool | None = None
    vlan: int | None = None
    vlan_trunk: list[VlanTrunk] | None = None
    preserve_default_vlan: bool | None = None
    macspoofchk: bool | None = None
    port_isolation: bool | None = None
    disable_container_interface: bool | None = None
    dns: Dns | None = None
    ipam: IpamConfig | None = None
    args: Args | None = None
    runtime_config: RuntimeConfig | None = None
    # portmap
    snat: bool | None = None
    masq_all: bool | None = None
    mark_masq_bit: int | None = None
    external_set_mark_chain: str | None = None
    conditions_v4: list[str] | None = None
    conditions_v6: list[str] | None = None
    backend: str | None = None
    # bandwidth
    ingress_rate: int | None = None
    ingress_burst: int | None = None
    egress_rate: int | None = None
    egress_burst: int | None = None
    shaped_subnets: list[str] | None = None
    non_shaped_subnets: list[str] | None = msgspec.field(name="nonShapedSubnets", default=None)
    # tuning
    sysctl: dict[str, str] | None = None
    mac: str | None = None
    promisc: bool | None = None
    allmulti: bool | None = None
    tx_q_len: int | None = msgspec.field(name="txQLen", default=None)
    # firewall
    ingress_policy: str | None = None
    iptables_admin_chain_name: str | None = None


# msgspec resolves a type at its first use; two threads that do so at once crash it. So it is done
# here, while there is one thread.
msgspec.convert({}, NetConf)
msgspec.convert({}, Result)


def parse(call: Call) -> NetConf:
    """The configuration of a call. Raises CniError 7 naming the key."""
    config = dict(call.config)
    mtu = config.get("mtu")
    if isinstance(mtu, str) and mtu.isascii() and mtu.isdigit():  # as the AWS VPC CNI writes it
        config["mtu"] = int(mtu)
    try:
        return msgspec.convert(config, NetConf)
    except msgspec.ValidationError as error:
        raise CniError(INVALID_CONFIG, f"invalid network configuration: {error}") from None


def previous(call: Call) -> Result | None:
    """The result of the plugin before this one. Raises CniError 6 or 7."""
    document = call.config.get("prevResult")
    return None if document is None else decode(document, call.version)
