"""What the agent is told: flags, environment, and kube-proxy's configuration file.

`Options` is the whole of it, checked. `read_kube_proxy_config` takes what matters from a
KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) and warns about the rest.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml

from podwire.datapath.ebpf.balancing import ALGORITHMS, MODES
from podwire.datapath.ebpf.maglev import DEFAULT_SIZE, SIZES
from podwire.datapath.ebpf.uplinks import ACCELERATIONS
from podwire.errors import ConfigError, InvalidObject
from podwire.net import parse_prefix

WIRINGS = ("bridge", "routed", "vpc")
ROUTINGS = ("direct", "vxlan")
TUNNEL_PROTOCOLS = ("vxlan", "geneve")
DATAPATHS = ("auto", "nftables", "iptables", "ebpf")
PARTS = ("services", "policy", "nodes", "cni")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class ConntrackOptions:
    """kube-proxy's `conntrack` section; `None` leaves the kernel's value. Times in seconds."""

    max_per_core: int | None = None
    min: int | None = None
    tcp_established_timeout_s: int | None = None
    tcp_close_wait_timeout_s: int | None = None
    udp_timeout_s: int | None = None
    udp_stream_timeout_s: int | None = None
    tcp_be_liberal: bool = False


@dataclass(frozen=True)
class Options:
    """Everything the agent is told. Defaults are those of a DaemonSet on a real node."""

    node_name: str = ""
    kubeconfig: str = ""  # empty: in-cluster, else $KUBECONFIG
    run_dir: Path = Path("/run/podwire")
    state_dir: Path = Path("/var/lib/podwire")
    cni_conf_dir: Path = Path("/etc/cni/net.d")
    parts: tuple[str, ...] = PARTS
    wiring: str = "bridge"
    routing: str = "direct"
    tunnel_protocol: str = "vxlan"
    datapath: str = "auto"
    # Services, in kube-proxy's words
    nodeport_addresses: tuple[str, ...] = ("primary",)
    localhost_nodeports: bool = False
    detect_local_mode: str = ""  # "": by the node's own pod interfaces or pod CIDR
    cluster_cidrs: tuple[str, ...] = ()
    bridge_interface: str = ""
    interface_name_prefix: str = ""
    masquerade_all: bool = False
    external_ips: tuple[str, ...] | None = None  # None: all; (): none; else only these ranges
    # Services from outside the cluster, in the words of Cilium's loadBalancer section; eBPF only
    lb_algorithm: str = "random"
    maglev_table_size: int = DEFAULT_SIZE
    lb_mode: str = "snat"
    lb_acceleration: str = "disabled"
    conntrack: ConntrackOptions = ConntrackOptions()
    healthz_bind_address: str = "0.0.0.0:10256"
    metrics_bind_address: str = "127.0.0.1:10249"
    sync_period_s: float = 30.0
    # policy
    cut_established: bool = False
    # what leaves the cluster
    masquerade: bool = True
    non_masquerade_cidrs: tuple[str, ...] = ()
    mtu: int = 0  # 0: that of the underlay
    log_level: str = "info"
    warnings: tuple[str, ...] = field(default=())

    def checked(self) -> Options:
        """These options, or ConfigError naming the flag that makes no sense."""
        for flag, value, allowed in (
            ("--wiring", self.wiring, WIRINGS),
            ("--routing", self.routing, ROUTINGS),
            ("--tunnel-protocol", self.tunnel_protocol, TUNNEL_PROTOCOLS),
            ("--datapath", self.datapath, DATAPATHS),
            ("--lb-algorithm", self.lb_algorithm, ALGORITHMS),
            ("--maglev-table-size", self.maglev_table_size, SIZES),
            ("--lb-mode", self.lb_mode, MODES),
            ("--lb-acceleration", self.lb_acceleration, ACCELERATIONS),
        ):
            if value not in allowed:
                known = ", ".join(map(str, allowed))
                raise ConfigError(f"{flag} takes one of {known}, not {value!r}")
        self._check_balancing()
        for part in self.parts:
            if part not in PARTS:
                raise ConfigError(f"--only takes {', '.join(PARTS)}, not {part!r}")
        for flag, values in (
            ("--cluster-cidr", self.cluster_cidrs),
            ("--non-masquerade-cidrs", self.non_masquerade_cidrs),
            ("--external-ips", self.external_ips or ()),
            (
                "--nodeport-addresses",
                [a for a in self.nodeport_addresses if a not in ("primary", "localhost", "all")],
            ),
        ):
            for value in values:
                try:
                    parse_prefix(value)
                except InvalidObject as error:
                    raise ConfigError(f"{flag}: {error}") from None
        if self.tunnel_protocol != "vxlan" and self.routing != "vxlan":
            raise ConfigError(
                f"--tunnel-protocol {self.tunnel_protocol} is for the overlay: --routing vxlan"
            )
        if self.datapath == "ebpf" and self.wiring == "vpc":
            raise ConfigError(
                "--datapath ebpf does not know the pods' ENIs: use --datapath nftables "
                "with --wiring vpc"
            )
        if self.datapath == "ebpf" and self.wiring == "bridge":
            # delivery goes from link to link: there is no bridge on this data path
            return replace(self, wiring="routed").checked()
        name = self.node_name or os.environ.get("NODE_NAME") or socket.gethostname().lower()
        return replace(self, node_name=name)

    def _check_balancing(self) -> None:
        for flag, value, default in (
            ("--lb-algorithm", self.lb_algorithm, "random"),
            ("--lb-mode", self.lb_mode, "snat"),
            ("--lb-acceleration", self.lb_acceleration, "disabled"),
        ):
            if value != default and self.datapath != "ebpf":
                raise ConfigError(f"{flag} {value} needs --datapath ebpf")
        if self.lb_mode == "dsr" and self.routing != "direct":
            raise ConfigError(
                "--lb-mode dsr needs --routing direct: packets travel to the backend's node with "
                "the client's address and an option of their own, which plain VXLAN hides"
            )
        if self.lb_mode == "dsr" and "nodes" not in self.parts:
            raise ConfigError("--lb-mode dsr needs the part nodes: it must know the other nodes")


def _duration_s(value: object, where: str) -> float | None:
    """Seconds of a Go duration (``1h30m``, ``250ms``, ``30s``); 0 and null mean unset."""
    if value is None or value == 0:
        return None
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
    text, total = str(value), 0.0
    while text:
        digits = 0
        while digits < len(text) and (text[digits].isdigit() or text[digits] == "."):
            digits += 1
        letters = digits
        while letters < len(text) and text[letters].isalpha():
            letters += 1
        unit = text[digits:letters]
        if not digits or (unit not in units and text[:digits].strip("0")):
            raise ConfigError(f"{where}: not a duration: {value!r}")
        total += float(text[:digits]) * units.get(unit, 0.0)
        text = text[letters:]
    return total or None


def read_kube_proxy_config(path: Path, options: Options) -> Options:
    """`options` with what the KubeProxyConfiguration at `path` says. Raises ConfigError.

    ``mode: ipvs`` gives a warning. Fields that podwire has no use for are passed over
    (``minSyncPeriod``: a change costs what changed, so it goes out at once).
    """
    try:
        loaded: object = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if not isinstance(loaded, dict) or "kind" not in loaded:
        raise ConfigError(f"--config {path}: not a KubeProxyConfiguration")
    document = cast("dict[str, Any]", loaded)
    if document.get("kind") != "KubeProxyConfiguration":
        raise ConfigError(f"--config {path}: kind is {document.get('kind')!r}")
    warnings = list(options.warnings)
    mode = str(document.get("mode") or "")
    if mode == "ipvs":
        warnings.append("mode: ipvs is not served (deprecated upstream); nftables takes its place")
        mode = "nftables"
    if mode not in ("", "iptables", "nftables"):
        raise ConfigError(f"--config {path}: mode: {mode!r} is not a mode")
    section = cast("dict[str, Any]", document.get(mode or "nftables") or {})
    iptables = cast("dict[str, Any]", document.get("iptables") or {})
    local = cast("dict[str, Any]", document.get("detectLocal") or {})
    # an absent list means the mode's own default: nftables primary, iptables every address
    nodeport = document.get("nodePortAddresses") or (["all"] if mode == "iptables" else ["primary"])
    localhost = mode == "iptables" and iptables.get("localhostNodePorts") is not False
    sync = _duration_s(section.get("syncPeriod"), "syncPeriod")
    client = cast("dict[str, Any]", document.get("clientConnection") or {})
    return replace(
        options,
        node_name=options.node_name or str(document.get("hostnameOverride") or ""),
        kubeconfig=options.kubeconfig or str(client.get("kubeconfig") or ""),
        datapath=(mode or "auto") if options.datapath == "auto" else options.datapath,
        nodeport_addresses=tuple(str(a) for a in nodeport),
        localhost_nodeports=options.localhost_nodeports or localhost,
        detect_local_mode=str(document.get("detectLocalMode") or ""),
        cluster_cidrs=tuple(c for c in str(document.get("clusterCIDR") or "").split(",") if c),
        bridge_interface=str(local.get("bridgeInterface") or ""),
        interface_name_prefix=str(local.get("interfaceNamePrefix") or ""),
        masquerade_all=bool(section.get("masqueradeAll") or iptables.get("masqueradeAll")),
        conntrack=_conntrack(cast("dict[str, Any]", document.get("conntrack") or {})),
        healthz_bind_address=str(document.get("healthzBindAddress") or "0.0.0.0:10256"),
        metrics_bind_address=str(document.get("metricsBindAddress") or "127.0.0.1:10249"),
        sync_period_s=sync or options.sync_period_s,
        warnings=tuple(warnings),
    )


def _conntrack(section: Mapping[str, Any]) -> ConntrackOptions:
    """Absent and null mean kube-proxy's defaults, 0 that the kernel's value stays."""

    def given(name: str, default: object) -> Any:
        value = section.get(name)
        return default if value is None else value

    def whole(name: str, default: str = "") -> int | None:
        value = _duration_s(given(name, default) or None, f"conntrack.{name}")
        return None if value is None else int(value) or None

    return ConntrackOptions(
        max_per_core=given("maxPerCore", 32768),
        min=given("min", 131072),
        tcp_established_timeout_s=whole("tcpEstablishedTimeout", "24h"),
        tcp_close_wait_timeout_s=whole("tcpCloseWaitTimeout", "1h"),
        udp_timeout_s=whole("udpTimeout"),
        udp_stream_timeout_s=whole("udpStreamTimeout"),
        tcp_be_liberal=bool(section.get("tcpBeLiberal")),
    )
