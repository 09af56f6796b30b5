"""Whether a result has the form that its version of the specification gives it.

Sources: SPEC.md of 0.2.0, 0.3.1, 0.4.0, 1.0.0 and 1.1.0, section "Result".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_DNS = {"nameservers", "domain", "search", "options"}
_HAS, _LACKS = ("has", "keys", "contains", "present"), ("lacks", "absent", "without")
_OLD = {"cniVersion", "ip4", "ip6", "dns"}
_NEW = {"cniVersion", "interfaces", "ips", "routes", "dns"}


def misfits(result: Any, wanted: Any = None) -> Iterator[str]:
    """One sentence per deviation. `wanted` names keys that must or must not be there besides: a
    list, or an object with `has`, `lacks` and their like; prose adds nothing.
    """
    if not isinstance(result, dict):
        yield f"the result is no JSON object: {result!r}"
        return
    version = result.get("cniVersion")
    if version in ("0.1.0", "0.2.0"):
        yield from _old(result)
    else:
        yield from _new(result, str(version))
    present, absent = _named(wanted)
    yield from (f"the result lacks {key}" for key in present if not _has(result, key))
    yield from (f"the result has {key}" for key in absent if _has(result, key))


def _named(wanted: Any) -> tuple[list[str], list[str]]:
    if isinstance(wanted, list):
        return wanted, []
    if not isinstance(wanted, dict):
        return [], []
    present = [k for word in _HAS for k in wanted.get(word, [])]
    absent = [k for word in _LACKS for k in wanted.get(word, [])]
    return [*present, *(wanted.keys() - {*_HAS, *_LACKS})], absent


def _has(result: dict[str, Any], path: str) -> bool:
    """`ip4.gateway`, `ips[].version`."""
    found: list[Any] = [result]
    for word in path.replace("[]", "").split("."):
        values = [each[word] for each in found if isinstance(each, dict) and word in each]
        found = [one for each in values for one in (each if isinstance(each, list) else [each])]
    return bool(found)


def _old(result: dict[str, Any]) -> Iterator[str]:
    yield from _only(result, _OLD, "result")
    if "ip4" not in result and "ip6" not in result:
        yield "a result before 0.3.0 needs ip4 or ip6"
    for key in ("ip4", "ip6"):
        part = result.get(key, {"ip": ""})
        yield from _only(part, {"ip", "gateway", "routes"}, key)
        if "ip" not in part:
            yield f"{key} has no ip"
        for each in part.get("routes", []):
            yield from _only(each, {"dst", "gw"}, f"{key}.routes")
    yield from _only(result.get("dns", {}), _DNS, "dns")


def _new(result: dict[str, Any], version: str) -> Iterator[str]:
    newest, versioned = version == "1.1.0", version in ("0.3.0", "0.3.1", "0.4.0")
    further = {"mtu", "socketPath", "pciID"} if newest else set[str]()
    attributes = {"mtu", "advmss", "priority", "table", "scope"} if newest else set[str]()
    yield from _only(result, _NEW, "result")
    interfaces = result.get("interfaces", [])
    for each in interfaces:
        yield from _only(each, {"name", "mac", "sandbox"} | further, "interfaces")
    for each in result.get("ips", []):
        known = {"address", "gateway", "interface"} | ({"version"} if versioned else set[str]())
        yield from _only(each, known, "ips")
        if versioned and each.get("version") != ("6" if ":" in each["address"] else "4"):
            yield f"ips: {each} has not its version"
        index = each.get("interface")
        if index is not None and not 0 <= index < len(interfaces):
            yield f"ips: {each} names no interface of the result"
    for each in result.get("routes", []):
        yield from _only(each, {"dst", "gw"} | attributes, "routes")
    yield from _only(result.get("dns", {}), _DNS, "dns")


def _only(found: dict[str, Any], known: set[str], where: str) -> Iterator[str]:
    yield from (
        f"{where} has {key}, which its version does not know" for key in found.keys() - known
    )
