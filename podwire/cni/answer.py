"""What ADD answers, built up from a plan and an attachment; and what CHECK compares with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from podwire.cni.config import NetConf
from podwire.cni.plan import Plan, pod_route
from podwire.cni.protocol import INVALID_CONFIG, CniError
from podwire.cni.result import Dns, Interface, Ip, Result, ip, route
from podwire.errors import InvalidObject
from podwire.net import Address, Prefix, format_address, parse_address
from podwire.wiring import Attachment, HostLink, PodAddress, PodRoute

_DEFAULTS = {4: Prefix(bytes(4), 0), 16: Prefix(bytes(16), 0)}


def with_addresses(
    plan: Plan, attachment: Attachment, addresses: Sequence[PodAddress]
) -> Attachment:
    """The attachment with its addresses and routes."""
    if attachment.bridge and attachment.bridge.gateway:
        addresses = [a if a.gateway else a._replace(gateway=_first_host(a)) for a in addresses]
    routes = [pod_route(each) for each in plan.routes]
    if plan.default_gateway:
        for size, default in _DEFAULTS.items():
            gateway = next((a.gateway for a in addresses if len(a.address) == size), b"")
            if gateway and not any(r.prefix == default and r.gateway for r in routes):
                routes.append(PodRoute(default, gateway))
    return msgspec.structs.replace(attachment, addresses=tuple(addresses), routes=tuple(routes))


def _first_host(address: PodAddress) -> Address:
    first = address.network.first
    return (int.from_bytes(first, "big") + 1).to_bytes(len(first), "big")


def of_addresses(plan: Plan, attachment: Attachment) -> Result:
    """The answer of an address source alone: no interfaces."""
    return Result(
        ips=[ip(each) for each in attachment.addresses],
        routes=[route(each) for each in attachment.routes],
        dns=_dns(plan),
    )


def of_link(plan: Plan, attachment: Attachment) -> Result:
    """The answer of a wiring: what is on the host, then the pod's end, then what else there is."""
    pod_end = Interface(
        attachment.key.ifname, attachment.mac.hex(":"), attachment.mtu, attachment.netns
    )
    before = [_interface(each) for each in attachment.host_links]
    result = of_addresses(plan, attachment)
    result.interfaces = [*before, pod_end, *map(_interface, attachment.further_links)]
    for each in result.ips:
        each.interface = len(before)
    return result


def _interface(link: HostLink) -> Interface:
    return Interface(link.name, link.mac.hex(":"), link.mtu)


def _dns(plan: Plan) -> Dns:
    if plan.dns is not None or not plan.resolv_conf:
        return plan.dns or Dns()
    try:
        lines = Path(plan.resolv_conf).read_text(errors="replace").splitlines()
    except OSError as error:
        raise CniError(INVALID_CONFIG, f"ipam.resolvConf: {error}") from None
    dns = Dns()
    for words in (line.split() for line in lines):
        match words:
            case ["nameserver", server, *_]:
                dns.nameservers = [*dns.nameservers, server]
            case ["domain", domain, *_]:
                dns.domain = domain
            case ["search", *domains]:
                dns.search = domains
            case ["options", *options]:
                dns.options = options
            case _:
                pass
    return dns


# --- results of others ----------------------------------------------------------------------------


def with_interface(result: Result, link: HostLink) -> Result:
    return msgspec.structs.replace(result, interfaces=[*result.interfaces, _interface(link)])


def with_changes(result: Result, ifname: str, changes: Mapping[str, str | int]) -> Result:
    """The result with what was changed on the pod's interface."""
    shown = {name: value for name, value in changes.items() if name in ("mac", "mtu")}
    interfaces = [
        msgspec.structs.replace(each, **shown) if each.sandbox and each.name == ifname else each
        for each in result.interfaces
    ]
    return msgspec.structs.replace(result, interfaces=interfaces)


def pod_addresses(result: Result) -> list[PodAddress]:
    """The addresses of the result that are the pod's."""
    return [_pod_address(each) for each in result.ips if _in_pod(result, each)]


def port_targets(result: Result) -> tuple[PodAddress, ...]:
    """Where host ports lead to: the pod's first address of each family."""
    found: dict[int, PodAddress] = {}
    for each in pod_addresses(result):
        found.setdefault(len(each.address), each)
    return tuple(found.values())


def bridge_name(result: Result) -> str:
    """The first link on the host, which is the bridge where there is one."""
    return next((each.name for each in result.interfaces if not each.sandbox), "")


def _in_pod(result: Result, each: Ip) -> bool:
    index = each.interface
    if index is None or not 0 <= index < len(result.interfaces):
        return True
    return bool(result.interfaces[index].sandbox)


def _pod_address(each: Ip) -> PodAddress:
    address, _, length = each.address.partition("/")
    try:
        packed = parse_address(address)
        gateway = parse_address(each.gateway) if each.gateway else b""
        return PodAddress(packed, int(length or len(packed) * 8), gateway)
    except (InvalidObject, ValueError) as error:
        raise CniError(INVALID_CONFIG, f"prevResult: {error}") from None


def differences(before: Result, known: Attachment) -> list[str]:
    """How a prevResult differs from what ADD recorded."""
    if not known.addresses and not known.wiring:
        return []
    stated = {(each.address, each.length) for each in pod_addresses(before)}
    made = {(each.address, each.length) for each in known.addresses}
    problems = [f"prevResult lacks {format_address(a)}/{n}" for a, n in sorted(made - stated)]
    problems += [
        f"prevResult has {format_address(a)}/{n}, which was not given" for a, n in stated - made
    ]
    if known.wiring and before.interfaces:
        problems += _link_differences(before, known)
    routes = {(each.prefix, each.gateway) for each in map(pod_route, before.routes)}
    given = {(each.prefix, each.gateway) for each in known.routes}
    if known.wiring and routes - given:
        listed = ", ".join(str(prefix) for prefix, _ in routes - given)
        problems.append(f"prevResult has routes that were not given: {listed}")
    return problems


def other_wishes(plan: Plan, conf: NetConf, known: Attachment) -> list[str]:
    """How a configuration asks for other things than ADD was asked for."""
    problems: list[str] = []
    made = known.bridge
    if made and conf.bridge and conf.bridge != made.name:
        problems.append(f"the bridge is {made.name}, the configuration says {conf.bridge}")
    present = {each.address for each in known.addresses}
    problems += [
        f"{format_address(each.address)} was not given"
        for each in plan.fixed
        if each.address not in present
    ]
    return problems


def _link_differences(before: Result, known: Attachment) -> Iterator[str]:
    """Every link that ADD made must be there by its name, with its MAC, where it was."""
    ifname = known.key.ifname
    wanted = [(each.name, each.mac, "") for each in (*known.host_links, *known.further_links)]
    for name, mac, sandbox in [*wanted, (ifname, known.mac, known.netns)]:
        stated = [e for e in before.interfaces if e.name == name and bool(e.sandbox or not sandbox)]
        if not stated:
            yield f"prevResult does not list {name}"
        elif stated[0].mac.lower() not in ("", mac.hex(":")):
            yield f"prevResult has the MAC {stated[0].mac} for {name}, not {mac.hex(':')}"
        elif sandbox and stated[0].sandbox != sandbox:
            yield f"prevResult has {name} in {stated[0].sandbox}, not {sandbox}"
