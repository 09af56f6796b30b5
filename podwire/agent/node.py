"""What the agent knows of its own node, in the forms that the rooms ask for."""

from __future__ import annotations

import contextlib

from podwire.agent.options import Options
from podwire.errors import ConfigError, InvalidObject
from podwire.kube.labels import ZONE
from podwire.kube.objects import Node
from podwire.net import Address, Prefix, parse_addresses, parse_prefix
from podwire.services import DetectLocal, NodeFacts, ProxyConfig

POD_LINKS = "eni"  # how the host ends of pods' links begin in VPC mode
_EVICTING = "ToBeDeletedByClusterAutoscaler"


def internal_ips(node: Node) -> tuple[Address, ...]:
    """The node's InternalIPs in the object's order; what is no address is left out."""
    return parse_addresses(a.address for a in node.status.addresses if a.type == "InternalIP")


def pod_cidrs(node: Node) -> tuple[Prefix, ...]:
    """The node's pod CIDRs, at most one per family."""
    found: dict[int, Prefix] = {}
    for text in node.spec.pod_cidrs or [node.spec.pod_cidr]:
        with contextlib.suppress(InvalidObject):
            prefix = parse_prefix(text)
            found.setdefault(prefix.bits, prefix)
    return tuple(found.values())


def facts(node: Node) -> NodeFacts:
    """For the ServiceCompiler."""
    return NodeFacts(node.metadata.name, internal_ips(node), node.metadata.labels.get(ZONE, ""))


def eligible(node: Node | None) -> bool:
    """Whether load balancers should send traffic here: neither deleted nor about to be."""
    return node is not None and not leaving(node)


def leaving(node: Node) -> bool:
    """Whether the cluster's autoscaler is about to delete it."""
    return any(taint.key == _EVICTING for taint in node.spec.taints)


def proxy_config(options: Options, node: Node) -> ProxyConfig:
    """kube-proxy's words for the ServiceCompiler. Raises ConfigError."""
    return ProxyConfig(
        detect_local=_detect_local(options, node),
        masquerade_all=options.masquerade_all,
        nodeport_addresses=options.nodeport_addresses,
        localhost_nodeports=options.localhost_nodeports,
        external_ips=(
            None
            if options.external_ips is None
            else tuple(parse_prefix(text) for text in options.external_ips)
        ),
    )


def _detect_local(options: Options, node: Node) -> DetectLocal:
    match options.detect_local_mode:
        case "" if options.wiring == "vpc":  # addresses of the VPC say nothing about the node
            return DetectLocal(interface=f"{POD_LINKS}*")
        case "":
            # cluster CIDRs where they are given, as kube-proxy; else where this node's pods live
            prefixes = tuple(parse_prefix(text) for text in options.cluster_cidrs)
            return DetectLocal(prefixes or pod_cidrs(node))
        case "ClusterCIDR":
            return DetectLocal(tuple(parse_prefix(text) for text in options.cluster_cidrs))
        case "NodeCIDR":
            return DetectLocal(pod_cidrs(node))
        case "BridgeInterface" if options.bridge_interface:
            return DetectLocal(interface=options.bridge_interface)
        case "InterfaceNamePrefix" if options.interface_name_prefix:
            return DetectLocal(interface=options.interface_name_prefix + "*")
        case mode:
            raise ConfigError(
                f"--detect-local-mode {mode}: not a mode, or its interface is not given "
                "(--pod-bridge-interface, --pod-interface-name-prefix)"
            )
