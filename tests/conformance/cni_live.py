"""The state of a namespace as iproute2 tells it: an observer independent of our own netlink."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

from tests.conformance.cni_node import Namespace


class Live:
    """One look at one namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self.links: list[dict[str, Any]] = []
        if namespace.fd >= 0:  # one that was deleted has nothing
            self.links = self.ask("ip", "-d", "-j", "address", "show")

    def text(self, *command: str) -> str:
        return self._namespace.run(*command) if self._namespace.fd >= 0 else ""

    def ask(self, *command: str) -> list[dict[str, Any]]:
        text = self.text(*command).strip()
        return json.loads(text, object_pairs_hook=_first) if text else []

    def link(self, name: str) -> dict[str, Any] | None:
        return next((each for each in self.links if each.get("ifname") == name), None)

    def kind(self, link: dict[str, Any]) -> str:
        return link.get("linkinfo", {}).get("info_kind", "")

    def addresses(self, name: str) -> list[str]:
        """Without link-local ones."""
        found = (self.link(name) or {}).get("addr_info", [])
        return [
            f"{each['local']}/{each['prefixlen']}"
            for each in found
            if each.get("scope") != "link" and "local" in each
        ]

    def tentative(self) -> list[str]:
        return [
            each["local"]
            for link in self.links
            for each in link.get("addr_info", [])
            if each.get("tentative") and each.get("scope") != "link"
        ]

    def routes(self, family: int) -> list[dict[str, Any]]:
        found = self.ask("ip", f"-{family}", "-j", "route", "show", "table", "all")
        return [{"table": "main", **_named(each)} for each in found]

    def rules(self) -> list[str]:
        """The lines of `ip rule` in both families."""
        return (self.text("ip", "rule") + self.text("ip", "-6", "rule")).splitlines()

    def neighbours(self) -> list[dict[str, Any]]:
        return self.ask("ip", "-j", "neigh", "show")

    def forwards(self) -> list[dict[str, Any]]:
        """Forwarding entries of bridges and VXLAN devices."""
        return self.ask("bridge", "-j", "fdb", "show")

    def qdiscs(self) -> list[dict[str, Any]]:
        return self.ask("tc", "-j", "qdisc", "show")

    def vlans(self, name: str) -> list[dict[str, Any]]:
        for each in self.ask("bridge", "-j", "-compressvlans", "vlan", "show"):
            if each.get("ifname") == name:
                return [_vlan(vlan) for vlan in each.get("vlans", [])]
        return []

    def rule_text(self, *, bridge: bool) -> str:
        """Every rule and element of nf_tables (the bridge family's too) and of iptables."""
        families = ("ip", "ip6", "inet", *(["bridge"] if bridge else []))
        parts = [self._namespace.run("nft", "list", "ruleset", family) for family in families]
        for program in ("iptables-save", "ip6tables-save"):
            done = self._namespace.shell(f"{program} 2>/dev/null || true")
            parts.append(done.stdout)
        return "\n".join(parts)


def normal(text: Any) -> Any:
    """Addresses and prefixes in one spelling; other things as they are."""
    if not isinstance(text, str):
        return text
    if text in ("default",):
        return text
    try:
        return str(ipaddress.ip_interface(text)) if "/" in text else str(ipaddress.ip_address(text))
    except ValueError:
        return text.lower() if text.count(":") == 5 else text


def _first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`ip` says `dst` twice of a route into a tunnel: the route's, then that of the tunnel."""
    named: dict[str, Any] = {}
    for key, value in pairs:
        named.setdefault(key, value)
    return named


def _named(route: dict[str, Any]) -> dict[str, Any]:
    """In the words of the cases."""
    named = {key: value for key, value in route.items() if key not in ("gateway", "metrics")}
    if "gateway" in route:
        named["via"] = named["gw"] = route["gateway"]
    if "metric" in route:
        named["priority"] = route["metric"]
    for metrics in route.get("metrics", []):
        named.update(metrics)
    named["onlink"] = "onlink" in route.get("flags", [])
    return named


def _vlan(vlan: dict[str, Any]) -> dict[str, Any]:
    flags = vlan.get("flags", [])
    return {
        "vid": vlan.get("vlan"),
        "end": vlan.get("vlanEnd", vlan.get("vlan")),
        "pvid": "PVID" in flags,
        "untagged": "Egress Untagged" in flags,
    }
