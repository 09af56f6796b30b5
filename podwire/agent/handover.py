"""Taking Services over from kube-proxy: once ours are complete, its rules go.

Whose rules there are at all, also those of our own data paths in netfilter, is told here too.

While both are in the kernel either may translate a new connection, to the same backends.
Connections that kube-proxy translated go on: conntrack keeps their addresses. What is removed is
told by kube-proxy's fixed names (kubernetes pkg/proxy/nftables/proxier.go: tables ``kube-proxy``;
pkg/proxy/iptables/proxier.go: chains ``KUBE-…``; pkg/proxy/ipvs/proxier.go: the link that makes
all Services' addresses the node's own), so nothing of anybody else goes. Virtual servers of IPVS
stay: without that link no packet comes to them.
"""

from __future__ import annotations

import errno
import logging
import shutil

from podwire.agent.logs import event
from podwire.datapath.nftables import nodes, policy_rules, services_rules
from podwire.errors import KernelError
from podwire.kernel import link, netns
from podwire.kernel.iptables import parse_save, targets
from podwire.kernel.netlink import NetlinkSocket
from podwire.kernel.nftables import INET, IP, IP6, NfTables

log = logging.getLogger("podwire.agent.handover")

TABLE = "kube-proxy"
IPVS_LINK = "kube-ipvs0"
OWN_TABLES = (services_rules.TABLE, policy_rules.TABLE, nodes.TABLE)
_PREFIXES = ("KUBE-SERVICES", "PODWIRE-")
# Chains that kubelet (pkg/kubelet/kubelet_network_linux.go) or a network plugin owns although they
# carry the prefix.
_NOT_KUBE_PROXYS = (
    "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT", "KUBE-FIREWALL",
    "KUBE-ROUTER", "KUBE-POD-FW", "KUBE-NWPLCY",
)  # fmt: skip
_TOOLS = ("iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft")


def predecessors() -> list[str]:
    """Whose rules in netfilter serve Services or policies here, in words. Raises KernelError."""
    found: list[str] = []
    with NfTables() as nft:
        for family in (IP, IP6, INET):
            ours = [name for name in nft.tables(family) if name == TABLE or name in OWN_TABLES]
            found += [f"nftables table {name}" for name in ours]
    for tool in _TOOLS:
        if shutil.which(f"{tool}-save"):
            saved = netns.run(None, [f"{tool}-save"], timeout_s=60).stdout
            found += [f"chains of {tool}" for prefix in _PREFIXES if f":{prefix}" in saved]
    return found


def remove_kube_proxy() -> list[str]:
    """What was removed, in words. Raises KernelError."""
    removed: list[str] = []
    with NfTables() as nft:
        for family, word in ((IP, "ip"), (IP6, "ip6")):
            if TABLE in nft.tables(family):
                nft.run(f"delete table {word} {TABLE}\n")
                removed.append(f"nftables table {word} {TABLE}")
    for tool in _TOOLS:
        if shutil.which(f"{tool}-save"):
            removed += _remove_chains(tool)
    with NetlinkSocket() as netlink:
        if link.find(netlink, IPVS_LINK):
            netlink.run(link.delete(IPVS_LINK).tolerating(errno.ENODEV))
            removed.append(f"link {IPVS_LINK}")
    for what in removed:
        event(log, logging.INFO, "removed what kube-proxy left", what=what)
    return removed


def _remove_chains(tool: str) -> list[str]:
    dump = netns.run(None, [f"{tool}-save"], timeout_s=60)
    if dump.returncode != 0 or ":KUBE-" not in dump.stdout:
        return []
    script, count = removal_script(dump.stdout)
    if not count:
        return []
    done = netns.run(
        None, [f"{tool}-restore", "--noflush", "-w", "10"], stdin=script, timeout_s=120
    )
    if done.returncode != 0:
        raise KernelError(f"{tool}-restore refused to remove kube-proxy's chains: {done.stderr}")
    return [f"{count} chains of {tool}"]


def removal_script(dump: str) -> tuple[str, int]:
    """Input for ``iptables-restore --noflush`` that removes kube-proxy's chains; how many.

    `dump` is what ``iptables-save`` prints. Rules of other chains that jump into kube-proxy's go
    first, then the chains are emptied (they jump to each other), then removed.
    """
    out: list[str] = []
    count = 0
    for table, chains in parse_save(dump).items():
        gone = list(filter(_is_kube_proxys, chains))
        if not gone:
            continue
        count += len(gone)
        jumps = [
            f"-D {chain} {rule}"
            for chain, rules in chains.items()
            if not _is_kube_proxys(chain)
            for rule in rules
            if any(map(_is_kube_proxys, targets([rule])))
        ]
        out += [f"*{table}", *(f":{name} - [0:0]" for name in gone), *jumps]
        out += [*(f"-X {name}" for name in gone), "COMMIT"]
    return "\n".join(out) + "\n", count


def _is_kube_proxys(chain: str) -> bool:
    return chain.startswith("KUBE-") and not chain.startswith(_NOT_KUBE_PROXYS)
