"""From a call and the node's defaults to what ADD shall make. Pure; every bad key is named here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import msgspec

from podwire.cni import chained
from podwire.cni.config import IpamConfig, NetConf, RangeConfig, VlanTrunk, parse, previous
from podwire.cni.protocol import INVALID_CONFIG, INVALID_ENVIRONMENT, Call, CniError
from podwire.cni.result import Dns, Result, Route
from podwire.errors import ConfigError, InvalidObject
from podwire.ipam.pool import Demand
from podwire.ipam.ranges import Range, RangeSet, check_sets, make_range
from podwire.net import Address, Prefix, parse_address, parse_prefix
from podwire.wiring import Attachment, Bridge, Key, Pod, PodAddress, PodRoute, Trunk

NODE_POOL = "*node"
"""The pool of the node's own pod CIDRs, whatever the network is called (no name has a star)."""

LINK, PTP, LOOPBACK, IPAM, CHAINED = "link", "ptp", "loopback", "ipam", "chained"

# What the program does under each of its names; under any other it is "podwire".
_NAMES: dict[str, tuple[str, frozenset[str]]] = {
    "podwire-ptp": (PTP, frozenset()),
    "podwire-loopback": (LOOPBACK, frozenset()),
    "podwire-ipam": (IPAM, frozenset()),
    **{f"podwire-{part}": (CHAINED, frozenset({part})) for part in chained.PARTS},
}
# A firewall of iptables rules is only made for who asks for it by name.
_ALL_PARTS = frozenset(chained.PARTS) - {"firewall"}

# Their work is podwire's own; a configuration that names one of them means what it always did.
_IPAM_TYPES = {None, "", "podwire", "podwire-ipam", "host-local", "static"}


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The node's defaults for what a configuration leaves open."""

    bridge: str = "cni0"
    pod_cidrs: tuple[Prefix, ...] = ()
    mtu: int = 0
    """0: the kernel's default."""
    hairpin: bool = False
    default_gateway: bool = False
    wiring: str = "bridge"
    """Which wiring makes links that are not asked for as ptp."""
    pool: str = ""
    """A pool that needs no ranges and stands in for the pod CIDRs: the VPC's."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ADD shall make. `draft` is the attachment as far as it is known beforehand."""

    role: str
    draft: Attachment
    parts: chained.Parts
    demand: Demand | None = None
    fixed: tuple[PodAddress, ...] = ()
    routes: tuple[Route, ...] = ()
    default_gateway: bool = False
    dns: Dns | None = None
    resolv_conf: str = ""
    previous: Result | None = field(default=None, repr=False)


def key_of(call: Call) -> Key:
    """Under which name the attachment of a call is kept."""
    plugin = call.plugin if call.plugin in _NAMES else "podwire"
    return Key(call.network, call.container, call.ifname, plugin)


def role_of(call: Call) -> str:
    """What the program does by the name that it was executed by."""
    return _NAMES.get(call.plugin, (LINK, _ALL_PARTS))[0]


def make(call: Call, node: NodeConfig) -> Plan:
    """Raises CniError 4, 6 or 7."""
    conf = parse(call)
    before = previous(call)
    role, parts = _NAMES.get(call.plugin, (LINK, _ALL_PARTS))
    if role == LINK and before is not None:
        role = CHAINED
    if role == CHAINED and before is None:
        raise CniError(
            INVALID_CONFIG, "Required prevResult missing: must be called as chained plugin"
        )
    named = len(parts) == 1
    draft = Attachment(key=key_of(call), netns=call.netns, pod=_pod(call))
    plan = Plan(
        role=role,
        draft=draft,
        parts=chained.read(
            conf, parts, named=named, link_mtu=role == CHAINED, mac=call.args.get("MAC", "")
        ),
        previous=before,
    )
    if role in (CHAINED, LOOPBACK):
        return plan
    return _with_addresses(_with_link(plan, conf, call, node), conf, call, node)


def _pod(call: Call) -> Pod:
    args = call.args
    return Pod(
        args.get("K8S_POD_NAMESPACE", ""), args.get("K8S_POD_NAME", ""), args.get("K8S_POD_UID", "")
    )


# --- the link -------------------------------------------------------------------------------------


def _with_link(plan: Plan, conf: NetConf, call: Call, node: NodeConfig) -> Plan:
    if plan.role == IPAM:
        return plan
    mtu = conf.mtu if conf.mtu is not None else node.mtu
    if mtu and not 68 <= mtu <= 65535:
        raise CniError(INVALID_CONFIG, f"invalid MTU {mtu} (must be between 68 and 65535)")
    if conf.ip_masq_backend not in (None, "", "iptables", "nftables"):
        raise CniError(INVALID_CONFIG, f"unknown ipMasqBackend {conf.ip_masq_backend!r}")
    bridge = _bridge(conf, node) if plan.role == LINK else None
    return replace(
        plan,
        draft=msgspec.structs.replace(
            plan.draft,
            wiring="ptp" if plan.role == PTP else node.wiring,
            mtu=mtu,
            mac=_requested_mac(conf, call),
            bridge=bridge,
            masquerade=bool(conf.ip_masq),
        ),
        default_gateway=bridge is not None and bridge.default_gateway,
    )


def _bridge(conf: NetConf, node: NodeConfig) -> Bridge:
    promiscuous = bool(conf.promisc_mode)
    hairpin = conf.hairpin_mode if conf.hairpin_mode is not None else node.hairpin
    if promiscuous and conf.hairpin_mode:
        message = "cannot set hairpin mode and promiscuous mode at the same time"
        raise CniError(INVALID_CONFIG, message)
    vlan = conf.vlan or 0
    if not 0 <= vlan <= 4094:
        message = f"invalid VLAN ID {vlan} (must be between 0 and 4094)"
        raise CniError(INVALID_CONFIG, message)
    name = conf.bridge or node.bridge
    if len(name.encode()) > 15 or name in (".", "..") or re.search(r"[/:\s\0]", name):
        raise CniError(INVALID_CONFIG, f"invalid bridge name {name!r}")
    default = (
        conf.is_default_gateway if conf.is_default_gateway is not None else node.default_gateway
    )
    return Bridge(
        name=name,
        gateway=bool(conf.is_gateway) or default,
        default_gateway=default,
        force_address=bool(conf.force_address),
        hairpin=hairpin and not promiscuous,
        promiscuous=promiscuous,
        isolated=bool(conf.port_isolation),
        check_mac=bool(conf.macspoofchk),
        vlan=vlan,
        trunk=tuple(part for each in conf.vlan_trunk or () for part in _trunk(each)),
        keep_default_vlan=conf.preserve_default_vlan is not False,
        leave_down=bool(conf.disable_container_interface),
    )


def _trunk(trunk: VlanTrunk) -> list[Trunk]:
    """An id, a range, or both."""
    found: list[Trunk] = []
    if trunk.id is not None:
        found.append(Trunk(trunk.id, trunk.id))
    if trunk.minID is not None and trunk.maxID is not None:
        found.append(Trunk(trunk.minID, trunk.maxID))
    elif trunk.minID is not None or trunk.maxID is not None:
        raise CniError(INVALID_CONFIG, "minID and maxID of a vlanTrunk must be given together")
    if not found:
        raise CniError(INVALID_CONFIG, "a vlanTrunk has either id, or minID and maxID")
    for each in found:
        for vlan in each:
            if not 1 <= vlan <= 4094:
                message = f"invalid VLAN trunk ID {vlan} (must be between 1 and 4094)"
                raise CniError(INVALID_CONFIG, message)
        if each.first > each.last:
            message = f"invalid VLAN trunk: minID {each.first} is greater than maxID {each.last}"
            raise CniError(INVALID_CONFIG, message)
    return found


def _requested_mac(conf: NetConf, call: Call) -> bytes:
    """runtimeConfig over args.cni over CNI_ARGS."""
    if conf.runtime_config and conf.runtime_config.mac:
        return chained.parse_mac(conf.runtime_config.mac, INVALID_CONFIG)
    if conf.args and conf.args.cni and conf.args.cni.mac:
        return chained.parse_mac(conf.args.cni.mac, INVALID_CONFIG)
    if call.args.get("MAC"):
        return chained.parse_mac(call.args["MAC"], INVALID_ENVIRONMENT)
    return b""


# --- addresses ------------------------------------------------------------------------------------


def _with_addresses(plan: Plan, conf: NetConf, call: Call, node: NodeConfig) -> Plan:
    ipam = conf.ipam
    runtime_ranges = (conf.runtime_config.ip_ranges if conf.runtime_config else None) or []
    if plan.role == IPAM and ipam is None:
        raise CniError(INVALID_CONFIG, "IPAM config missing 'ipam' key")
    if ipam and ipam.type not in _IPAM_TYPES:
        message = f"failed to find plugin {ipam.type!r}: podwire gives the addresses itself"
        known = ", ".join(sorted(filter(None, _IPAM_TYPES)))
        raise CniError(INVALID_CONFIG, message, f"ipam.type may be {known}, or be left out")
    if plan.draft.bridge and plan.draft.bridge.leave_down:
        if ipam and ipam.asks:
            message = "cannot use IPAM when disableContainerInterface is set"
            raise CniError(INVALID_CONFIG, message)
        return plan
    if ipam is not None and not ipam.asks and plan.role != IPAM and not runtime_ranges:
        return replace(plan, dns=conf.dns, default_gateway=False)
    pool, sets = call.network, _sets(ipam or IpamConfig(), runtime_ranges)
    requested = _requested(conf, call)
    fixed: tuple[PodAddress, ...] = ()
    plain = not sets and (ipam is None or not ipam.addresses) and plan.role != IPAM
    demanded = bool(sets)
    if plain and node.pool:
        pool, demanded = node.pool, True
    elif plain and node.pod_cidrs:
        pool, sets = NODE_POOL, tuple((_whole(cidr),) for cidr in node.pod_cidrs)
        demanded = True
    elif not sets and ipam is not None:
        fixed = _fixed(conf, ipam, call)
        requested = ()
        if not fixed:
            raise CniError(INVALID_CONFIG, "no IP ranges specified in the ipam configuration")
    routes = tuple((ipam.routes if ipam else None) or ())
    for each in routes:
        pod_route(each)
    return replace(
        plan,
        demand=Demand(pool, sets, tuple(a.address for a in requested)) if demanded else None,
        fixed=fixed,
        routes=routes,
        dns=conf.dns or (ipam.dns if ipam else None),
        resolv_conf=(ipam.resolv_conf if ipam else None) or "",
        default_gateway=plan.default_gateway and bool(sets or fixed),
    )


def _sets(ipam: IpamConfig, runtime: list[list[RangeConfig]]) -> tuple[RangeSet, ...]:
    configured = list(runtime)
    if ipam.subnet:
        flat = RangeConfig(ipam.subnet, ipam.range_start, ipam.range_end, ipam.gateway)
        configured.append([flat])
    configured += ipam.ranges or []
    try:
        return check_sets([tuple(_range(each) for each in ranges) for ranges in configured])
    except ConfigError as error:
        raise CniError(INVALID_CONFIG, str(error)) from None


def _range(each: RangeConfig) -> Range:
    return make_range(each.subnet, each.range_start or "", each.range_end or "", each.gateway or "")


def _whole(cidr: Prefix) -> Range:
    try:
        return make_range(str(cidr))
    except ConfigError as error:
        raise CniError(INVALID_CONFIG, f"the node's pod CIDR: {error}") from None


def _requested(conf: NetConf, call: Call) -> tuple[PodAddress, ...]:
    """Addresses asked for by name; a length of -1 means that none was given."""
    texts = [text for text in call.args.get("IP", "").split(",") if text]
    found = [_host(text, INVALID_ENVIRONMENT) for text in texts]
    return tuple(dict.fromkeys(found + [_host(text, INVALID_CONFIG) for text in _instead(conf)]))


def _instead(conf: NetConf) -> list[str]:
    """Addresses that stand in for configured ones."""
    args = (conf.args.cni.ips if conf.args and conf.args.cni else None) or []
    return [*args, *((conf.runtime_config.ips if conf.runtime_config else None) or [])]


def _fixed(conf: NetConf, ipam: IpamConfig, call: Call) -> tuple[PodAddress, ...]:
    """What the static plugin returns: the configured addresses and CNI_ARGS', or those asked for
    by args.cni or the runtime instead of them."""
    gateways = call.args.get("GATEWAY", "")
    routers = [_address(text, INVALID_ENVIRONMENT) for text in gateways.split(",") if text]
    found: list[PodAddress] = []
    instead = [_host(text, INVALID_CONFIG) for text in _instead(conf)]
    for each in () if instead else ipam.addresses or ():
        host = _host(each.address, INVALID_CONFIG)
        gateway = _address(each.gateway, INVALID_CONFIG) if each.gateway else b""
        found.append(host._replace(gateway=gateway))
    asked = instead or _requested(conf, call)
    if any(host.length < 0 for host in (*found, *asked)):
        raise CniError(INVALID_CONFIG, "a static address has no prefix length")
    for host in asked:
        found.append(host._replace(gateway=next((r for r in routers if r in host.network), b"")))
    return tuple(found)


def pod_route(route: Route) -> PodRoute:
    """Raises CniError 7."""
    try:
        if "/" not in route.dst:
            raise InvalidObject(f"not a CIDR: {route.dst!r}")
        prefix = parse_prefix(route.dst)
        gateway = parse_address(route.gw) if route.gw else b""
    except InvalidObject as error:
        raise CniError(INVALID_CONFIG, f"ipam.routes: {error}") from None
    if gateway and len(gateway) != len(prefix.address):
        message = f"ipam.routes: the gateway {route.gw} is not of the family of {route.dst}"
        raise CniError(INVALID_CONFIG, message)
    scope = -1 if route.scope is None else route.scope
    numbers = (route.mtu, route.advmss, route.priority, route.table or 0)
    if not all(0 <= number < 1 << 32 for number in numbers) or not -1 <= scope <= 255:
        raise CniError(INVALID_CONFIG, f"ipam.routes: a number of {route.dst} is out of range")
    return PodRoute(prefix, gateway, *numbers, scope)


def _host(text: str, code: int) -> PodAddress:
    address, slash, length = text.strip().partition("/")
    packed = _address(address, code)
    if not slash:
        return PodAddress(packed, -1)
    if not (length.isascii() and length.isdigit() and int(length) <= len(packed) * 8):
        raise CniError(code, f"not an address with a prefix length: {text!r}")
    return PodAddress(packed, int(length))


def _address(text: str, code: int) -> Address:
    try:
        return parse_address(text)
    except InvalidObject as error:
        raise CniError(code, str(error)) from None
