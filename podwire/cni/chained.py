"""The parts that work on a link that is there already: portmap, bandwidth, tuning, firewall. Pure.

`read` turns their keys into values and names every bad one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from podwire.cni.config import BandwidthConfig, NetConf, PortMapping
from podwire.cni.protocol import (
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    UNSUPPORTED_FIELD,
    CniError,
)
from podwire.errors import InvalidObject
from podwire.net import Protocol, parse_address
from podwire.wiring import Bandwidth, HostPort

PARTS = ("portmap", "bandwidth", "tuning", "firewall")

_PROTOCOLS = {"tcp": Protocol.TCP, "udp": Protocol.UDP, "sctp": Protocol.SCTP}
UNLIMITED = Bandwidth()
_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What to do besides the link; empty values mean nothing."""

    ports: tuple[HostPort, ...] = ()
    masquerade: str = "local"
    bandwidth: Bandwidth = UNLIMITED
    sysctls: dict[str, str] = field(default_factory=dict[str, str])
    tuning: dict[str, str | int] = field(default_factory=dict[str, str | int])
    """Attributes of the pod's interface, in the words of `wiring.tuning.change`."""
    firewall: str = ""
    admin_chain: str = "CNI-ADMIN"


def read(
    conf: NetConf, parts: Collection[str], *, named: bool, link_mtu: bool, mac: str = ""
) -> Parts:
    """Raises CniError 2, 4 or 7.

    `named`: the plugin was executed as this one part, so ambiguous keys (`backend`) are its own.
    `link_mtu`: `mtu` and `mac` are tuning's and not those of a link to be made.
    `mac`: what CNI_ARGS asks for.
    """
    portmap = "portmap" in parts
    if portmap:
        _check_portmap(conf, named=named)
    mappings = (conf.runtime_config.port_mappings if conf.runtime_config else None) or []
    firewall = "firewall" in parts
    return Parts(
        ports=_ports(mappings) if portmap else (),
        masquerade="all" if conf.masq_all else "none" if conf.snat is False else "local",
        bandwidth=_bandwidth(conf) if "bandwidth" in parts else UNLIMITED,
        sysctls=_sysctls(conf.sysctl or {}) if "tuning" in parts else {},
        tuning=_tuning(conf, mac) if "tuning" in parts and link_mtu else {},
        firewall=_firewall(conf) if firewall else "",
        admin_chain=(conf.iptables_admin_chain_name if firewall else None) or "CNI-ADMIN",
    )


def parse_mac(text: str, code: int) -> bytes:
    """A unicast Ethernet address. Raises CniError with that code."""
    if not _MAC.fullmatch(text):
        raise CniError(code, f"invalid MAC address {text!r}")
    mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
    if mac[0] & 1 or mac == bytes(6):
        raise CniError(code, f"{text} is no MAC address of an interface")
    return mac


# --- portmap --------------------------------------------------------------------------------------


def _check_portmap(conf: NetConf, *, named: bool) -> None:
    bit, chain = conf.mark_masq_bit, conf.external_set_mark_chain
    if bit is not None and chain:
        message = "Cannot specify externalSetMarkChain and markMasqBit"
        raise CniError(INVALID_CONFIG, message)
    if bit is not None and not 0 <= bit <= 31:
        raise CniError(INVALID_CONFIG, "MasqMarkBit must be between 0 and 31")
    backend = conf.backend if named else None
    if backend not in (None, "", "iptables", "nftables"):
        raise CniError(INVALID_CONFIG, f"unrecognized backend {backend!r}")
    conditions = {
        "conditionsV4": conf.conditions_v4 or [],
        "conditionsV6": conf.conditions_v6 or [],
    }
    styles = {_style(words) for words in conditions.values() if words}
    if chain:
        styles.add("iptables")
    if len(styles) > 1 or (backend and styles - {backend}):
        message = f"{backend or 'one'} backend was requested but configuration contains {styles}"
        raise CniError(INVALID_CONFIG, message)
    unsupported = {**conditions, "externalSetMarkChain": chain}
    for key, value in unsupported.items():
        if value:
            raise CniError(UNSUPPORTED_FIELD, f"unsupported field {key}: {value}")


def _style(words: list[str]) -> str:
    """Which program's language a condition is written in."""
    iptables = words[0].startswith("-") or words[0] == "!"
    return "iptables" if iptables else "nftables"


def _ports(mappings: list[PortMapping]) -> tuple[HostPort, ...]:
    ports: list[HostPort] = []
    for mapping in mappings:
        for what, port in (("host", mapping.host_port), ("container", mapping.container_port)):
            if not 0 < port < 65536:
                raise CniError(INVALID_CONFIG, f"Invalid {what} port number: {port}")
        protocol = _PROTOCOLS.get(mapping.protocol.lower() or "tcp")
        if protocol is None:
            message = f"unknown protocol {mapping.protocol!r} of host port {mapping.host_port}"
            raise CniError(INVALID_CONFIG, message)
        host_ip = b""
        if mapping.host_ip:
            try:
                host_ip = parse_address(mapping.host_ip)
            except InvalidObject as error:
                raise CniError(INVALID_CONFIG, f"hostIP: {error}") from None
        ports.append(HostPort(mapping.host_port, mapping.container_port, protocol, host_ip))
    if len({port._replace(container_port=0) for port in ports}) < len(ports):
        raise CniError(INVALID_CONFIG, "a host port is mapped twice")
    return tuple(ports)


# --- bandwidth ------------------------------------------------------------------------------------


def _bandwidth(conf: NetConf) -> Bandwidth:
    """A static configuration wins over the runtime's as a whole."""
    for key, value in (
        ("shapedSubnets", conf.shaped_subnets),
        ("nonShapedSubnets", conf.non_shaped_subnets),
    ):
        if value:
            raise CniError(UNSUPPORTED_FIELD, f"unsupported field {key}: {value}")
    static = (conf.ingress_rate, conf.ingress_burst, conf.egress_rate, conf.egress_burst)
    if any(value is not None for value in static):
        limits = Bandwidth(*(value or 0 for value in static))
    else:
        runtime = conf.runtime_config.bandwidth if conf.runtime_config else None
        found = runtime or BandwidthConfig()
        limits = Bandwidth(
            found.ingress_rate, found.ingress_burst, found.egress_rate, found.egress_burst
        )
    for rate, burst in (limits[:2], limits[2:]):
        if rate < 0 or burst < 0:
            raise CniError(INVALID_CONFIG, "rates and bursts cannot be negative")
        if rate and not burst:
            raise CniError(INVALID_CONFIG, "if rate is set, burst must also be set")
        if burst and not rate:
            raise CniError(INVALID_CONFIG, "if burst is set, rate must also be set")
        if burst // 8 >= 1 << 32:
            raise CniError(INVALID_CONFIG, "burst cannot be more than 4GB")
        if rate // 8 >= 1 << 63:
            raise CniError(INVALID_CONFIG, "rate is out of range")
    return limits


# --- tuning ---------------------------------------------------------------------------------------


def _sysctls(sysctls: dict[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in sysctls.items():
        # As sysctl(8): the first separator tells which one is meant as a separator.
        first = re.search(r"[./]", name)
        dotted = name if first and first[0] == "." else name.translate(str.maketrans("./", "/."))
        if not dotted.startswith("net.") or ".." in dotted.split("/") or "//" in dotted:
            message = f"sysctl {name}: only names of the namespace (net.) can be set"
            raise CniError(INVALID_CONFIG, message)
        if dotted in found:
            raise CniError(INVALID_CONFIG, f"sysctl {name} is given twice")
        found[dotted] = value
    return found


def _tuning(conf: NetConf, asked: str) -> dict[str, str | int]:
    mac = asked or conf.mac
    if conf.args and conf.args.cni and conf.args.cni.mac:
        mac = conf.args.cni.mac
    if conf.runtime_config and conf.runtime_config.mac:
        mac = conf.runtime_config.mac
    code = INVALID_ENVIRONMENT if mac and mac == asked else INVALID_CONFIG
    mtu, length = conf.mtu or 0, conf.tx_q_len
    if mtu and not 68 <= mtu <= 65535:
        raise CniError(INVALID_CONFIG, f"invalid MTU {mtu} (must be between 68 and 65535)")
    if length is not None and not 0 <= length < 1 << 31:
        raise CniError(INVALID_CONFIG, f"invalid txQLen {length}")
    wanted: dict[str, str | int | None] = {
        "mac": parse_mac(mac, code).hex(":") if mac else None,
        "mtu": mtu or None,
        "promisc": None if conf.promisc is None else int(conf.promisc),
        "allmulti": None if conf.allmulti is None else int(conf.allmulti),
        "tx_queue_length": length,
    }
    return {name: value for name, value in wanted.items() if value is not None}


# --- firewall -------------------------------------------------------------------------------------


def _firewall(conf: NetConf) -> str:
    if conf.backend not in (None, "", "iptables"):
        raise CniError(INVALID_CONFIG, f"unrecognized firewall backend {conf.backend!r}")
    policy = conf.ingress_policy or "open"
    if policy not in ("open", "same-bridge", "isolated"):
        raise CniError(INVALID_CONFIG, f"unknown ingressPolicy {policy!r}")
    return policy
