"""Compares what a case expects of links, addresses, routes … with the live state.

Every function yields one sentence per difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.conformance.cni_expect import differences
from tests.conformance.cni_live import Live, normal
from tests.conformance.cni_vocabulary import by_namespace, split

Lives = Mapping[str, Live]


def state(expect: dict[str, Any], live: Lives) -> Iterator[str]:
    """All that a case expects by namespace: `host`, `pod`, `pod2` …"""
    expect = by_namespace(expect)
    for key, wanted in expect.get("links", {}).items():
        yield from _links(key, wanted, live)
    for key, wanted in expect.get("addresses", {}).items():
        yield from _addresses(key, wanted, live)
    for namespace, look in live.items():
        if look.tentative():
            yield f"{namespace}: tentative addresses {look.tentative()}"
    for name, fits, of in (
        ("routes", _route_fits, lambda look: look.routes(4) + look.routes(6)),
        ("neighbours", _neighbour_fits, Live.neighbours),
        ("fdb", _forward_fits, Live.forwards),
    ):
        for key, wanted in expect.get(name, {}).items():
            yield from _subset(name, key, wanted, live, fits, of)
    yield from _ip_rules(expect.get("ip_rules", {}), live)
    for key, flags in expect.get("bridge_port", {}).items():
        yield from _bridge_port(key, flags, live["host"])
    for key, wanted in expect.get("bridge_vlans", {}).items():
        yield from _vlans(key, wanted, live["host"])
    for key, wanted in expect.get("qdiscs", {}).items():
        yield from _qdiscs(key, wanted, live)
    for name, rate in expect.get("qdisc_rates", {}).items():
        text = live["host"].text("tc", "qdisc", "show", "dev", name)
        if f"rate {str(rate).lower()}" not in text.lower():
            yield f"{name} is not limited to {rate}: {text.strip()}"
    for key, wanted in expect.get("sysctl", {}).items():
        yield from _sysctls(key, wanted, live)


def _namespace(key: str, live: Lives) -> tuple[str, Live, bool]:
    """Name, look and negation of ``pod``, ``pod6``, ``host_absent`` … Raises ValueError."""
    plain, negated = split(key)
    name = plain if plain in live else plain.removesuffix("6").removesuffix("4")
    if name not in live:
        raise ValueError(f"the runner does not know the namespace {key!r}")
    return name, live[name], negated


# --- links and addresses --------------------------------------------------------------------------


def _links(key: str, wanted: Any, live: Lives) -> Iterator[str]:
    namespace, _, rest = key.partition("_")
    if rest in ("veth_count", "kind_count"):
        look = live[namespace]
        kinds = [look.kind(each) for each in look.links]
        counts = {"veth": wanted} if rest == "veth_count" else wanted
        for kind, count in counts.items():
            if kinds.count(kind) != count:
                yield f"{namespace}: {kinds.count(kind)} {kind} links, not {count}"
        return
    name, look, negated = _namespace(key, live)
    for each in wanted:
        entry = {"name": each} if isinstance(each, str) else each
        found = _described(look, entry["name"])
        if not negated and found is None:
            yield f"{name}: there is no link {entry['name']}"
        elif not negated:
            yield from differences(entry, found, f"{name}: link {entry['name']}")
        elif found is not None and not list(differences(entry, found, "")):
            yield f"{name}: there is a link {entry}"


def _described(look: Live, name: str) -> dict[str, Any] | None:
    link = look.link(name)
    if link is None:
        return None
    flags, details = link.get("flags", []), link.get("linkinfo", {}).get("info_data", {})
    return {
        **details,
        **link,
        "name": link["ifname"],
        "kind": look.kind(link),
        "up": "UP" in flags,
        "mac": link.get("address"),
        "vlan_id": details.get("id"),
        "alias": link.get("ifalias"),
        "allmulti": "ALLMULTI" in flags,
        "promisc": "PROMISC" in flags,
        "txQLen": link.get("txqlen"),
    }


def _addresses(key: str, wanted: dict[str, Any], live: Lives) -> Iterator[str]:
    namespace, look, negated = _namespace(key, live)
    for name, addresses in wanted.items():
        found = sorted(map(normal, look.addresses(name)))
        if negated:
            for each in addresses:
                if normal(each) in found or normal(each) in [a.partition("/")[0] for a in found]:
                    yield f"{namespace}: {name} has {each}"
        elif found != sorted(map(normal, addresses)):
            yield f"{namespace}: {name} has {found}, not {addresses}"


# --- routes, neighbours, forwarding entries -------------------------------------------------------

Fits = Callable[[dict[str, Any], dict[str, Any]], bool]


def _subset(
    what: str,
    key: str,
    wanted: list[Any],
    live: Lives,
    fits: Fits,
    of: Callable[[Live], list[dict[str, Any]]],
) -> Iterator[str]:
    namespace, look, negated = _namespace(key, live)
    found = of(look)
    for each in wanted:
        entry = {"dst": each} if isinstance(each, str) else each
        if any(fits(entry, one) for one in found) == negated:
            yield f"{what} of {namespace}: there is {'an' if negated else 'no'} entry {entry}"


def _short(value: Any) -> Any:
    text = normal(value)
    if text in ("0.0.0.0/0", "::/0"):
        return "default"
    if isinstance(text, str) and text.endswith(("/32", "/128")):
        return text.rpartition("/")[0]
    return text if isinstance(text, bool) else str(text)


def _route_fits(wanted: dict[str, Any], route: dict[str, Any]) -> bool:
    return all(_short(route.get(key)) == _short(value) for key, value in wanted.items())


def _neighbour_fits(wanted: dict[str, Any], one: dict[str, Any]) -> bool:
    states = one.get("state", [])
    return all(
        str(value) in states if key == "state" else _short(one.get(key)) == _short(value)
        for key, value in wanted.items()
    )


def _forward_fits(wanted: dict[str, Any], one: dict[str, Any]) -> bool:
    names = {"lladdr": "mac", "dev": "ifname"}
    return all(
        _short(one.get(names.get(key, key))) == _short(value) for key, value in wanted.items()
    )


def _ip_rules(wanted: Any, live: Lives) -> Iterator[str]:
    spread = wanted if isinstance(wanted, dict) else {"host": wanted}
    for key, rules in spread.items():
        _, look, negated = _namespace(key, live)
        lines = look.rules()
        for each in rules:
            if isinstance(each, dict) and each.get("only_if") and each.get("table") == "main":
                continue
            words = _rule_words(each) if isinstance(each, dict) else [each]
            hit = any(all(word in f"{line} " for word in words) for line in lines)
            if hit == negated:
                yield f"there is {'an' if negated else 'no'} ip rule {each}"


def _rule_words(rule: dict[str, Any]) -> list[str]:
    words = [f"{rule['priority']}:"] if "priority" in rule else []
    for key in ("from", "to", "iif", "oif", "fwmark"):
        if key in rule:
            value = str(rule[key])
            words.append(f"{key} {value.removesuffix('/32').removesuffix('/128')} ")
    return [*words, f"lookup {rule['table']} "] if "table" in rule else words


# --- ports, queues, sysctls -----------------------------------------------------------------------


def _bridge_port(key: str, flags: dict[str, Any], host: Live) -> Iterator[str]:
    name, negated = split(key)
    link = host.link(name) or {}
    data = link.get("linkinfo", {}).get("info_slave_data", {})
    for flag, value in flags.items():
        if flag not in data:
            yield f"port {name} has no flag {flag}"
        elif (data[flag] == value) == negated:
            yield f"port {name}: {flag} is {data[flag]}"


def _vlans(key: str, wanted: list[Any], host: Live) -> Iterator[str]:
    name, negated = split(key)
    found = host.vlans(name)
    for each in wanted:
        vlan = each if isinstance(each, dict) else {"vid": each}
        hit = any(
            one["vid"] <= int(vlan["vid"]) <= one["end"]
            and all(one[flag] == vlan[flag] for flag in ("pvid", "untagged") if flag in vlan)
            for one in found
        )
        if hit == negated:
            yield f"port {name}: VLAN {vlan} is {'there' if negated else 'missing'}: {found}"


def _qdiscs(key: str, wanted: dict[str, list[str]], live: Lives) -> Iterator[str]:
    namespace, look, negated = _namespace(key, live)
    found = look.qdiscs()
    for name, kinds in wanted.items():
        have = [each["kind"] for each in found if each.get("dev") == name]
        for kind in kinds:
            if (kind in have) == negated:
                yield f"{namespace}: {name} has the qdiscs {have}, {key}: {kind}"


def _sysctls(key: str, wanted: dict[str, Any], live: Lives) -> Iterator[str]:
    namespace, look, negated = _namespace(key, live)
    for name, value in wanted.items():
        found = look.text("sysctl", "-n", name).split()
        if (found == str(value).split()) == negated:
            yield f"{namespace}: {name} is {' '.join(found)}"
