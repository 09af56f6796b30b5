"""`podwire agent --cleanup` takes everything of ours out of the kernel, and only that."""

from podwire.agent import main, parts
from podwire.agent.options import Options
from podwire.datapath.iptables.services import ServicesPart as IptablesServicesPart
from podwire.datapath.nftables.nodes import NodesPart
from podwire.datapath.nftables.policy import PolicyPart
from podwire.datapath.nftables.services import ServicesPart
from podwire.datapath.nftables.spoof import SpoofGuard
from podwire.datapath.nftables.spoof_routed import RoutedSpoofGuard
from podwire.datapath.nftables.vpc import VpcPart
from podwire.kernel import netns
from podwire.services import ProxyConfig
from podwire.wiring import hostports, masquerade


def test_nothing_of_ours_remains(netns_fd: int, run_prefix: str) -> None:
    options = Options(node_name=run_prefix)

    def make() -> None:
        NodesPart().start()
        PolicyPart(bridge="cni0").start()
        ServicesPart(ProxyConfig()).start()
        IptablesServicesPart(ProxyConfig()).start()
        SpoofGuard().start()
        RoutedSpoofGuard().start()
        VpcPart().start()

    netns.call(netns_fd, make)
    for table in ("ip mine", f"inet {hostports.TABLE}", f"inet {masquerade.TABLE}"):
        assert netns.run(netns_fd, ["nft", "add", "table", *table.split()]).returncode == 0
    before = netns.run(netns_fd, ["nft", "list", "tables"]).stdout
    assert before.count("podwire-") >= 8
    assert netns.call(netns_fd, lambda: main.cleanup(options)) == 0
    after = netns.run(netns_fd, ["nft", "list", "tables"]).stdout
    assert "podwire" not in after
    assert "table ip mine" in after
    saved = netns.run(netns_fd, ["iptables-save"]).stdout
    assert "PODWIRE" not in saved
    names = [name for name, _ in netns.call(netns_fd, lambda: list(parts.all_paths(options)))]
    assert len(names) == len(set(names))
