"""The result of ADD, in every version of the specification.

Inside podwire a result is a `Result`, the newest form. Sources: SPEC.md of 1.1.0, 1.0.0, 0.4.0,
0.3.1 and 0.2.0, section "Result".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from podwire.cni.protocol import (
    DECODE_FAILURE,
    INVALID_CONFIG,
    NEWEST,
    NOT_EXPRESSIBLE,
    VERSIONS,
    Call,
    CniError,
)
from podwire.net import format_address
from podwire.wiring import PodAddress, PodRoute


class Interface(msgspec.Struct, omit_defaults=True):
    """`sandbox` is the namespace's path, "" on the host. `mtu` and what follows: from 1.1.0 on."""

    name: str
    mac: str = ""
    mtu: int = 0
    sandbox: str = ""
    socketPath: str = ""
    pciID: str = ""


class Ip(msgspec.Struct, omit_defaults=True):
    """`interface` is an index into the result's interfaces."""

    address: str
    gateway: str = ""
    interface: int | None = None


class Route(msgspec.Struct, omit_defaults=True):
    """All but `dst` and `gw`: from 1.1.0 on."""

    dst: str
    gw: str = ""
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int | None = None
    scope: int | None = None


class Dns(msgspec.Struct, omit_defaults=True):
    nameservers: list[str] = []
    domain: str = ""
    search: list[str] = []
    options: list[str] = []


class Result(msgspec.Struct, omit_defaults=True):
    interfaces: list[Interface] = []
    ips: list[Ip] = []
    routes: list[Route] = []
    dns: Dns = msgspec.field(default_factory=Dns)


def ip(address: PodAddress, interface: int | None = None) -> Ip:
    gateway = format_address(address.gateway) if address.gateway else ""
    return Ip(f"{format_address(address.address)}/{address.length}", gateway, interface)


def route(route: PodRoute) -> Route:
    return Route(
        str(route.prefix),
        format_address(route.gateway) if route.gateway else "",
        route.mtu,
        route.advmss,
        route.priority,
        route.table or None,
        route.scope if route.scope >= 0 else None,
    )


def encode(result: Result, version: str) -> dict[str, Any]:
    """The JSON object in the form of that version. Raises CniError 104 where it does not fit."""
    if version in ("0.1.0", "0.2.0"):
        return _encode_old(result, version)
    document: dict[str, Any] = {"cniVersion": version, **msgspec.to_builtins(result)}
    if version == NEWEST:
        return document
    for interface in document.get("interfaces", []):
        for key in ("mtu", "socketPath", "pciID"):
            interface.pop(key, None)
    document_routes = document.get("routes", [])
    for i, each in enumerate(document_routes):
        document_routes[i] = {key: each[key] for key in ("dst", "gw") if key in each}
    if version < "1.0.0":
        ips = document.get("ips", [])
        for i, each in enumerate(ips):
            ips[i] = {"version": "6" if ":" in each["address"] else "4", **each}
        document.setdefault("dns", {})
    return document


def decode(document: Any, version: str) -> Result:
    """A `prevResult`, in the form of its own version, or else of the configuration's.

    Raises CniError 6 or 7.
    """
    if not isinstance(document, Mapping):
        raise CniError(INVALID_CONFIG, "prevResult is no JSON object")
    found: Mapping[str, Any] = document  # pyright: ignore[reportUnknownVariableType]
    stated = found.get("cniVersion") or version
    if stated not in VERSIONS:
        raise CniError(DECODE_FAILURE, f"prevResult has an unknown cniVersion: {stated!r}")
    try:
        if stated in ("0.1.0", "0.2.0"):
            return _decode_old(found)
        plain = {key: value for key, value in found.items() if value is not None}
        return msgspec.convert(plain, Result)
    except (msgspec.ValidationError, AttributeError, TypeError) as error:
        raise CniError(INVALID_CONFIG, f"prevResult makes no sense: {error}") from None


def passed_on(document: dict[str, Any], call: Call) -> dict[str, Any]:
    """A `prevResult` that nothing changed: as it came where its version is the one asked for.

    Raises CniError 6, 7 or 104.
    """
    if document.get("cniVersion") == call.version:
        return document
    return encode(decode(document, call.version), call.version)


def _encode_old(result: Result, version: str) -> dict[str, Any]:
    document: dict[str, Any] = {"cniVersion": version}
    for ip in result.ips:
        key = "ip6" if ":" in ip.address else "ip4"
        if key in document:
            raise CniError(
                NOT_EXPRESSIBLE,
                f"CNI version {version} does not support more than 1 address per family",
            )
        document[key] = {"ip": ip.address} | ({"gateway": ip.gateway} if ip.gateway else {})
        routes = [
            {"dst": route.dst} | ({"gw": route.gw} if route.gw else {})
            for route in result.routes
            if (":" in route.dst) == (key == "ip6")
        ]
        if routes:
            document[key]["routes"] = routes
    if len(document) == 1:
        raise CniError(NOT_EXPRESSIBLE, f"CNI version {version} needs at least one address")
    document["dns"] = msgspec.to_builtins(result.dns)
    return document


def _decode_old(document: Mapping[str, Any]) -> Result:
    result = Result(dns=msgspec.convert(document.get("dns") or {}, Dns))
    for key in ("ip4", "ip6"):
        part = document.get(key)
        if part:
            result.ips.append(Ip(part["ip"], part.get("gateway") or ""))
            result.routes += msgspec.convert(part.get("routes") or [], list[Route])
    return result
