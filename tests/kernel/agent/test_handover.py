"""kube-proxy's rules go when podwire serves; nobody else's do."""

import shutil

import pytest

from podwire.agent import handover
from podwire.kernel import netns

NFT = """
add table ip kube-proxy
add chain ip kube-proxy services
add table ip mine
add chain ip mine services
"""
IPTABLES = """*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
:KUBE-MARK-MASQ - [0:0]
:MINE - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -j MINE
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -j KUBE-SVC-ABC
-A KUBE-SVC-ABC -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
*filter
:KUBE-FORWARD - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
"""


@pytest.mark.parametrize("tool", ["iptables-nft", "iptables-legacy"])
def test_only_kube_proxys_rules_go(netns_fd: int, tool: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"no {tool} here")
    assert netns.run(netns_fd, ["nft", "-f", "-"], stdin=NFT).returncode == 0
    loaded = netns.run(netns_fd, [f"{tool}-restore", "--noflush"], stdin=IPTABLES)
    assert loaded.returncode == 0, loaded.stderr
    removed = netns.call(netns_fd, handover.remove_kube_proxy)
    assert removed == ["nftables table ip kube-proxy", f"4 chains of {tool}"]
    saved = netns.run(netns_fd, [f"{tool}-save"]).stdout
    assert "-A PREROUTING -j MINE" in saved
    assert [line for line in saved.splitlines() if "KUBE" in line] == [
        ":KUBE-KUBELET-CANARY - [0:0]"
    ]
    tables = netns.run(netns_fd, ["nft", "list", "tables"]).stdout.splitlines()
    assert "table ip mine" in tables
    assert "table ip kube-proxy" not in tables
    assert netns.call(netns_fd, handover.remove_kube_proxy) == []


def test_the_link_of_its_ipvs_goes(netns_fd: int) -> None:
    for name in (handover.IPVS_LINK, "mine"):
        made = netns.run(netns_fd, ["ip", "link", "add", name, "type", "bridge"])
        assert made.returncode == 0, made.stderr
    assert netns.call(netns_fd, handover.remove_kube_proxy) == ["link kube-ipvs0"]
    links = netns.run(netns_fd, ["ip", "-br", "link"]).stdout
    assert "mine" in links
    assert handover.IPVS_LINK not in links
