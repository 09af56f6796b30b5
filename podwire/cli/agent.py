"""`podwire agent`: the node's daemon."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from podwire.agent.options import (
    ACCELERATIONS,
    ALGORITHMS,
    DATAPATHS,
    LOG_LEVELS,
    MODES,
    PARTS,
    ROUTINGS,
    TUNNEL_PROTOCOLS,
    WIRINGS,
    Options,
    read_kube_proxy_config,
)


def configure(parser: argparse.ArgumentParser) -> None:
    default = Options()
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="a KubeProxyConfiguration; flags win over it")
    add("--node-name", "--hostname-override", default="", help="default: $NODE_NAME, then hostname")
    add("--kubeconfig", default="", help="default: in-cluster, then $KUBECONFIG")
    add("--run-dir", type=Path, default=default.run_dir, help="sockets (%(default)s)")
    add("--state-dir", type=Path, default=default.state_dir, help="state file (%(default)s)")
    add("--cni-conf-dir", type=Path, default=default.cni_conf_dir, help="conflist (%(default)s)")
    add("--only", default=",".join(PARTS), help="parts to run, comma-separated (%(default)s)")
    add("--wiring", choices=WIRINGS, default=default.wiring, help="of pods (%(default)s)")
    add("--routing", choices=ROUTINGS, default=default.routing, help="between nodes (%(default)s)")
    add("--tunnel-protocol", choices=TUNNEL_PROTOCOLS, default=default.tunnel_protocol,
        help="of --routing vxlan, alike on all nodes (%(default)s)")  # fmt: skip
    add("--datapath", "--proxy-mode", choices=(*DATAPATHS, "ipvs"), default=default.datapath,
        help="(%(default)s: eBPF where it can serve all, else nftables)")  # fmt: skip
    add("--nodeport-addresses", metavar="CIDRS", help="CIDRs, primary, localhost or all (primary)")
    add("--cluster-cidr", metavar="CIDRS", help="where the cluster's pods live")
    add("--detect-local-mode", default="", help="ClusterCIDR, NodeCIDR, BridgeInterface, ...")
    add("--pod-bridge-interface", default="", help="for --detect-local-mode=BridgeInterface")
    add("--pod-interface-name-prefix", default="", help="for InterfaceNamePrefix")
    add("--masquerade-all", action="store_true", help="masquerade all traffic to ClusterIPs")
    add("--external-ips", metavar="CIDRS", help="ranges that externalIPs may be in; none: off")
    add("--lb-algorithm", choices=ALGORITHMS, default=default.lb_algorithm,
        help="how traffic from outside gets a backend; needs eBPF (%(default)s)")  # fmt: skip
    add("--maglev-table-size", type=int, default=default.maglev_table_size, metavar="PRIME",
        help="entries: 100 for each backend of the largest Service (%(default)s)")  # fmt: skip
    add("--lb-mode", choices=MODES, default=default.lb_mode,
        help="dsr: backends elsewhere answer clients themselves; needs eBPF")  # fmt: skip
    add("--lb-acceleration", choices=ACCELERATIONS, default=default.lb_acceleration,
        help="XDP for traffic to other nodes' backends; needs eBPF (%(default)s)")  # fmt: skip
    add("--healthz-bind-address", help=f"default {default.healthz_bind_address}")
    add("--metrics-bind-address", help=f"default {default.metrics_bind_address}")
    add("--policy-cut-established", action="store_true",
        help="cut open connections that a changed policy no longer allows")  # fmt: skip
    add("--no-masquerade", action="store_true", help="pod addresses leave the cluster as they are")
    add("--non-masquerade-cidrs", metavar="CIDRS", help="destinations reached without masquerade")
    add("--mtu", type=int, default=0, help="of the pods' links (default: the underlay's)")
    add("--log-level", choices=LOG_LEVELS, default=default.log_level)
    add("--cleanup", action="store_true", help="remove all that podwire left in the kernel, exit")


def _list(text: str | None) -> tuple[str, ...]:
    return tuple(word for word in (text or "").split(",") if word)


def options_from(args: argparse.Namespace) -> Options:
    """The checked options. Raises ConfigError."""
    changes: dict[str, Any] = {
        "node_name": args.node_name,
        "kubeconfig": args.kubeconfig,
        "run_dir": args.run_dir,
        "state_dir": args.state_dir,
        "cni_conf_dir": args.cni_conf_dir,
        "parts": _list(args.only),
        "wiring": args.wiring,
        "routing": args.routing,
        "tunnel_protocol": args.tunnel_protocol,
        "datapath": "nftables" if args.datapath == "ipvs" else args.datapath,
        "cut_established": args.policy_cut_established,
        "lb_algorithm": args.lb_algorithm,
        "lb_mode": args.lb_mode,
        "lb_acceleration": args.lb_acceleration,
        "maglev_table_size": args.maglev_table_size,
        "masquerade": not args.no_masquerade,
        "non_masquerade_cidrs": _list(args.non_masquerade_cidrs),
        "mtu": args.mtu,
        "log_level": args.log_level,
    }
    if args.datapath == "ipvs":
        changes["warnings"] = ("--proxy-mode=ipvs is not served; nftables takes its place",)
    options = replace(Options(), **changes)
    if args.config is not None:
        options = read_kube_proxy_config(args.config, options)
    given: dict[str, Any] = {
        "nodeport_addresses": _list(args.nodeport_addresses),
        "cluster_cidrs": _list(args.cluster_cidr),
        "detect_local_mode": args.detect_local_mode,
        "bridge_interface": args.pod_bridge_interface,
        "interface_name_prefix": args.pod_interface_name_prefix,
        "masquerade_all": args.masquerade_all,
        "healthz_bind_address": args.healthz_bind_address,
        "metrics_bind_address": args.metrics_bind_address,
    }
    present = {name: value for name, value in given.items() if value}
    if args.external_ips is not None:
        present["external_ips"] = () if args.external_ips == "none" else _list(args.external_ips)
    return replace(options, **present).checked()


def run(args: argparse.Namespace) -> int:
    from podwire.agent import logs, start

    options = options_from(args)
    logs.setup(options.log_level)
    if args.cleanup:
        from podwire.agent import main

        return main.cleanup(options)
    return start.run(options)
