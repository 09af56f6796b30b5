"""Compares what a case expects with what a call answered and with the live state.

Every function yields one sentence per difference.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

from tests.conformance.cni_live import Live, normal

Done = subprocess.CompletedProcess[str]


def output(expect: dict[str, Any], done: Done, previous: Any) -> Iterator[str]:
    """Exit status, standard output, result and error."""
    wanted, error = expect.get("exit"), expect.get("error")
    either = error is not None and wanted == 0  # a case that accepts both
    if wanted == 0 and done.returncode and not either:
        yield f"exit {done.returncode}: {done.stdout.strip()} {done.stderr.strip()}"
    if wanted == "nonzero" and done.returncode == 0:
        yield f"exit 0, an error was expected: {done.stdout.strip()}"
    stdout = expect.get("stdout")
    if stdout == "empty" and done.stdout.strip():
        yield f"standard output is not empty: {done.stdout.strip()}"
    if isinstance(stdout, dict):
        document = _json(done.stdout)
        keys = {*stdout.get("keys", []), *stdout.get("spec_keys", [])}
        if not isinstance(document, dict) or not keys <= document.keys():
            yield f"not one JSON object with {sorted(keys)}: {done.stdout.strip()}"
    if "result" in expect and done.returncode == 0:
        yield from _result(expect["result"], _json(done.stdout), previous)
    if error is not None and (done.returncode or not either):
        yield from _error(error, expect, done)


def _error(error: dict[str, Any], expect: dict[str, Any], done: Done) -> Iterator[str]:
    document = _json(done.stdout)
    if not isinstance(document, dict) or not {"cniVersion", "code", "msg"} <= document.keys():
        yield f"no error object on standard output: {done.stdout.strip()!r}"
        return
    if "spec_code" in error and not _code_fits(error["spec_code"], document["code"]):
        yield f"code {document['code']}, not {error['spec_code']}: {document['msg']}"
    text = f"{document['msg']} {document.get('details', '')}"
    for name in [*expect.get("names", []), *expect.get("details_name", [])]:
        if str(name) not in text:
            yield f"the error does not name {name}: {text}"


def _code_fits(wanted: Any, code: int) -> bool:
    if isinstance(wanted, list):
        return any(_code_fits(each, code) for each in wanted)
    if isinstance(wanted, str) and wanted.endswith("+"):
        return code >= int(wanted[:-1])
    return code == int(wanted)


def _result(wanted: Any, result: Any, previous: Any) -> Iterator[str]:
    if isinstance(wanted, dict) and wanted.get("equals") == "prevResult":
        if result != previous:
            yield f"the result is not prevResult: {json.dumps(result)}"
        return
    if result is None:
        yield "no JSON on standard output"
        return
    yield from differences(wanted, result, "result")


def differences(wanted: Any, found: Any, where: str) -> Iterator[str]:
    """`wanted` is a subset of `found`; lists have the same length and order."""
    if isinstance(wanted, str) and wanted.startswith("${"):  # ${MAC}, ${ANY}
        if found is None:
            yield f"{where} is missing"
    elif wanted == "absent_or_empty":
        if found:
            yield f"{where} is {found!r}, expected nothing"
    elif isinstance(wanted, dict):
        if set(wanted) == {"length"}:
            if len(found or []) != wanted["length"]:
                yield f"{where} has {len(found or [])} entries, not {wanted['length']}: {found}"
        elif set(wanted) == {"contains"}:
            missing = [each for each in wanted["contains"] if each not in (found or [])]
            if missing:
                yield f"{where} lacks {missing}"
        elif not isinstance(found, dict):
            yield f"{where} is {found!r}, not an object"
        else:
            for key, value in wanted.items():
                yield from differences(value, found.get(key), f"{where}.{key}")
    elif isinstance(wanted, list) and not isinstance(found, list) and found is not None:
        if normal(found) not in map(normal, wanted):  # one of several
            yield f"{where} is {found!r}, not one of {wanted}"
    elif isinstance(wanted, list):
        if len(found or []) != len(wanted):
            yield f"{where} has {len(found or [])} entries, not {len(wanted)}: {found}"
        for i, (one, other) in enumerate(zip(wanted, found or [], strict=False)):
            yield from differences(one, other, f"{where}[{i}]")
    elif normal(wanted) != normal(found):
        yield f"{where} is {found!r}, not {wanted!r}"


# --- live state -----------------------------------------------------------------------------------


def state(expect: dict[str, Any], live: dict[str, Live]) -> Iterator[str]:
    """Links, addresses, routes … of `host` and `pod`."""
    yield from _links(expect.get("links", {}), live)
    for namespace, wanted in expect.get("addresses", {}).items():
        for name, addresses in wanted.items():
            found = sorted(map(normal, live[namespace].addresses(name)))
            if found != sorted(map(normal, addresses)):
                yield f"{namespace}: {name} has {found}, not {addresses}"
    for namespace, look in live.items():
        if look.tentative():
            yield f"{namespace}: tentative addresses {look.tentative()}"
    yield from _routes(expect.get("routes", {}), live)
    yield from _neighbours(expect.get("neighbours", {}), live)
    yield from _ip_rules(expect, live["host"])
    for name, flags in expect.get("bridge_port", {}).items():
        found = live["host"].link(name) or {}
        data = found.get("linkinfo", {}).get("info_slave_data", {})
        for flag, value in flags.items():
            if data.get(flag) != value:
                yield f"port {name}: {flag} is {data.get(flag)}, not {value}"
    for name, wanted in expect.get("bridge_vlans", {}).items():
        yield from _vlans(name, wanted, live["host"])
    yield from _qdiscs(expect, live)
    for name, wanted in expect.get("sysctl", {}).get("pod", {}).items():
        found = live["pod"]._namespace.run("sysctl", "-n", name).strip()
        if found.split() != str(wanted).split():
            yield f"pod: {name} is {found}, not {wanted}"
    for name, value in expect.get("sysctl", {}).get("host_not", {}).items():
        if live["host"]._namespace.run("sysctl", "-n", name).strip() == str(value):
            yield f"host: {name} is {value}"


def _links(wanted: dict[str, Any], live: dict[str, Live]) -> Iterator[str]:
    for key, entries in wanted.items():
        namespace, _, rest = key.partition("_")
        look = live[namespace]
        kinds = [look.kind(each) for each in look.links]
        if rest == "veth_count":
            if kinds.count("veth") != entries:
                yield f"{namespace}: {kinds.count('veth')} veth links, not {entries}"
        elif rest == "kind_count":
            for kind, count in entries.items():
                if kinds.count(kind) != count:
                    yield f"{namespace}: {kinds.count(kind)} {kind} links, not {count}"
        elif rest in ("absent", "lacks"):
            for each in entries:
                name = each["name"] if isinstance(each, dict) else each
                if look.link(name):
                    yield f"{namespace}: there is a link {name}"
        elif rest == "":
            for each in entries:
                yield from _link(each, look, namespace)
        else:
            yield f"the runner does not know links.{key}"


def _link(wanted: dict[str, Any], look: Live, namespace: str) -> Iterator[str]:
    link = look.link(wanted["name"])
    if link is None:
        yield f"{namespace}: there is no link {wanted['name']}"
        return
    found = {
        "name": link["ifname"],
        "kind": look.kind(link),
        "up": "UP" in link.get("flags", []),
        "mac": link.get("address"),
        "mtu": link.get("mtu"),
        "master": link.get("master"),
        "promiscuity": link.get("promiscuity"),
        "vlan_id": link.get("linkinfo", {}).get("info_data", {}).get("id"),
        "txqlen": link.get("txqlen"),
        "alias": link.get("ifalias"),
        "allmulti": "ALLMULTI" in link.get("flags", []),
        "promisc": "PROMISC" in link.get("flags", []),
    }
    yield from differences(wanted, found, f"{namespace}: link {wanted['name']}")


def _routes(wanted: dict[str, Any], live: dict[str, Live]) -> Iterator[str]:
    for key, entries in wanted.items():
        namespace = "pod" if key.startswith("pod") else "host"
        found = live[namespace].routes(4) + live[namespace].routes(6)
        for each in entries:
            entry = {"dst": each} if isinstance(each, str) else each
            hit = any(_route_fits(entry, route) for route in found)
            if key.endswith(("_lacks", "_absent")) == hit:
                yield f"{key}: {'there is' if hit else 'there is no'} route {entry}"


def _route_fits(wanted: dict[str, Any], route: dict[str, Any]) -> bool:
    def short(value: Any) -> Any:
        text = normal(value)
        if isinstance(text, str) and text.endswith(("/32", "/128")):
            return text.rpartition("/")[0]
        return text

    return all(short(route.get(key)) == short(value) for key, value in wanted.items())


def _neighbours(wanted: dict[str, Any], live: dict[str, Live]) -> Iterator[str]:
    for namespace, entries in wanted.items():
        found = live[namespace].neighbours()
        for each in entries:
            if not any(
                normal(one.get("dst")) == normal(each["dst"])
                and each.get("lladdr", one.get("lladdr")) == one.get("lladdr")
                and each.get("state", one["state"][0]) in one["state"]
                for one in found
            ):
                yield f"{namespace}: there is no neighbour {each}"


def _ip_rules(expect: dict[str, Any], host: Live) -> Iterator[str]:
    if not {"ip_rules", "ip_rules_absent"} & expect.keys():
        return
    text = host._namespace.run("ip", "rule") + host._namespace.run("ip", "-6", "rule")
    for rule in expect.get("ip_rules", []):
        words = [f"{rule['priority']}:"] if "priority" in rule else []
        words += [f"{key} {rule[key]}" for key in ("from", "to") if key in rule]
        if not any(all(word in line for word in words) for line in text.splitlines()):
            yield f"there is no ip rule {rule}"
    for absent in expect.get("ip_rules_absent", []):
        if absent in text:
            yield f"there is an ip rule with {absent}"


def _vlans(name: str, wanted: list[dict[str, Any]], host: Live) -> Iterator[str]:
    found = host.vlans(name)
    for each in wanted:
        if not any(
            one["vid"] <= each["vid"] <= one["end"]
            and all(one[flag] == each[flag] for flag in ("pvid", "untagged") if flag in each)
            for one in found
        ):
            yield f"port {name} is no member of VLAN {each}: {found}"


def _qdiscs(expect: dict[str, Any], live: dict[str, Live]) -> Iterator[str]:
    for key, wanted in expect.get("qdiscs", {}).items():
        namespace, _, negated = key.partition("_")
        found = live[namespace].qdiscs()
        for name, kinds in wanted.items():
            have = [each["kind"] for each in found if each.get("dev") == name]
            for kind in kinds:
                if (kind in have) == bool(negated):
                    yield f"{namespace}: {name} has the qdiscs {have}, {key}: {kind}"
    for name, rate in expect.get("qdisc_rates", {}).items():
        text = live["host"]._namespace.run("tc", "qdisc", "show", "dev", name)
        if f"rate {rate.lower()}" not in text.lower():
            yield f"{name} is not limited to {rate}: {text.strip()}"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
