"""The files that a kubelet puts into its containers: resolv.conf, hosts, hostname. Pure.

Source: kubernetes pkg/kubelet/network/dns, pkg/kubelet/kubelet_pods.go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CLUSTER_DOMAIN = "cluster.local"
_LOOPBACK = """127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


def resolv_conf(
    spec: Mapping[str, Any], namespace: str, servers: Sequence[str], machine: str
) -> str:
    """A pod's resolv.conf; `servers` are the DNS Service's addresses, `machine` the node's file."""
    policy = spec.get("dnsPolicy") or "ClusterFirst"
    config: Mapping[str, Any] = spec.get("dnsConfig") or {}
    if policy == "ClusterFirst" and spec.get("hostNetwork"):
        policy = "Default"
    if policy == "Default" and not config:
        return machine
    nameservers: list[str] = []
    searches: list[str] = []
    options: list[str] = []
    if policy in ("ClusterFirst", "ClusterFirstWithHostNet"):
        nameservers += servers
        searches += [f"{namespace}.svc.{CLUSTER_DOMAIN}", f"svc.{CLUSTER_DOMAIN}", CLUSTER_DOMAIN]
        options.append("ndots:5")
    nameservers += config.get("nameservers") or []
    searches += config.get("searches") or []
    wanted: Sequence[Mapping[str, str]] = config.get("options") or ()
    for option in wanted:
        text = f"{option['name']}:{option['value']}" if option.get("value") else option["name"]
        options = [o for o in options if o.partition(":")[0] != option["name"]] + [text]
    lines = [f"nameserver {server}" for server in dict.fromkeys(nameservers)]
    if searches:
        lines.append(f"search {' '.join(dict.fromkeys(searches))}")
    if options:
        lines.append(f"options {' '.join(options)}")
    if policy == "Default":
        lines.append(machine.rstrip("\n"))
    return "\n".join(lines) + "\n"


def hostname(name: str, spec: Mapping[str, Any]) -> str:
    """A pod's host name: spec.hostname, else its name, cut to what a label may hold."""
    return (spec.get("hostname") or name)[:63].rstrip("-.")


def hosts(name: str, namespace: str, spec: Mapping[str, Any], addresses: Sequence[str]) -> str:
    """A pod's /etc/hosts."""
    host = hostname(name, spec)
    names = host
    if spec.get("subdomain"):
        names = f"{host}.{spec['subdomain']}.{namespace}.svc.{CLUSTER_DOMAIN}\t{host}"
    text = _LOOPBACK + "".join(f"{address}\t{names}\n" for address in addresses)
    aliases: Sequence[Mapping[str, Any]] = spec.get("hostAliases") or ()
    for alias in aliases:
        names = "\t".join(map(str, alias.get("hostnames") or ()))
        text += f"{alias['ip']}\t{names}\n"
    return text
