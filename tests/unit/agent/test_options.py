from pathlib import Path
from typing import Any

import pytest

from podwire.agent.options import Options, read_kube_proxy_config
from podwire.errors import ConfigError

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"


def read(tmp_path: Path, text: str, options: Options | None = None) -> Options:
    path = tmp_path / "config.yaml"
    path.write_text(HEAD + text)
    return read_kube_proxy_config(path, options or Options())


def test_what_matters_is_taken(tmp_path: Path) -> None:
    options = read(
        tmp_path,
        """
mode: nftables
nodePortAddresses: [primary, 10.0.0.0/8]
detectLocalMode: InterfaceNamePrefix
detectLocal: {interfaceNamePrefix: cali}
clusterCIDR: 10.244.0.0/16,fd00::/48
conntrack: {tcpBeLiberal: true, tcpEstablishedTimeout: 1h30m, udpTimeout: 250ms, maxPerCore: 7}
nftables: {masqueradeAll: true, syncPeriod: 1m}
hostnameOverride: n1
""",
    ).checked()
    assert options.datapath == "nftables"
    assert options.nodeport_addresses == ("primary", "10.0.0.0/8")
    assert options.interface_name_prefix == "cali"
    assert options.cluster_cidrs == ("10.244.0.0/16", "fd00::/48")
    assert options.conntrack.tcp_be_liberal
    assert options.conntrack.tcp_established_timeout_s == 5400
    assert options.conntrack.max_per_core == 7
    assert options.masquerade_all
    assert options.sync_period_s == 60
    assert options.node_name == "n1"
    assert not options.warnings


def test_each_mode_has_its_own_node_port_default(tmp_path: Path) -> None:
    assert read(tmp_path, "mode: nftables\n").nodeport_addresses == ("primary",)
    iptables = read(tmp_path, "mode: iptables\n")
    assert iptables.nodeport_addresses == ("all",)
    assert iptables.localhost_nodeports


def test_conntrack_defaults_are_kube_proxys(tmp_path: Path) -> None:
    found = read(tmp_path, "conntrack: {maxPerCore: null}\n").conntrack
    assert (found.max_per_core, found.min) == (32768, 131072)
    assert (found.tcp_established_timeout_s, found.tcp_close_wait_timeout_s) == (86400, 3600)
    assert (found.udp_timeout_s, found.udp_stream_timeout_s) == (None, None)
    left = read(tmp_path, "conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s}\n").conntrack
    assert left.max_per_core == 0
    assert left.tcp_established_timeout_s is None


def test_ipvs_warns_and_becomes_nftables(tmp_path: Path) -> None:
    options = read(tmp_path, "mode: ipvs\n")
    assert options.datapath == "nftables"
    assert "ipvs" in options.warnings[0]


@pytest.mark.parametrize("text", ["mode: other\n", "conntrack: {udpTimeout: soon}\n", "a: [\n"])
def test_nonsense_is_one_clear_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "options",
    [
        Options(wiring="wifi"),
        Options(nodeport_addresses=("10.0.0.0/33",)),
        Options(parts=("everything",)),
        Options(datapath="ebpf", wiring="vpc"),
        Options(tunnel_protocol="geneve"),
        Options(tunnel_protocol="gre", routing="vxlan"),
    ],
)
def test_flags_are_checked(options: Options) -> None:
    with pytest.raises(ConfigError, match="--"):
        options.checked()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lb_algorithm": "maglev"}, "--lb-algorithm maglev needs --datapath ebpf"),
        ({"maglev_table_size": 1000}, "--maglev-table-size takes one of 251, 509"),
        ({"lb_acceleration": "native"}, "--lb-acceleration native needs --datapath ebpf"),
        ({"lb_mode": "dsr"}, "--lb-mode dsr needs --datapath ebpf"),
        (
            {"lb_mode": "dsr", "datapath": "ebpf", "parts": ("services",)},
            "--lb-mode dsr needs the part nodes",
        ),
        (
            {"lb_mode": "dsr", "datapath": "ebpf", "routing": "vxlan"},
            "--lb-mode dsr needs --routing direct",
        ),
        ({"lb_algorithm": "least"}, "--lb-algorithm takes one of random, maglev"),
    ],
)
def test_balancing_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**fields).checked()
