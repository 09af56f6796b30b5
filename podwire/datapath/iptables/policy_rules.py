"""The chains for policies that never change, and the names of all others. All in table mangle.

At the hooks forward and input, after destination NAT and before the filter table, whose rules may
accept or drop what they like:

    FORWARD, INPUT  replies pass, and what keeps links alive; the rest is the first of a connection
    FROM, TO        pods of this node that have policies, by source and destination address
    R<n>            a rule set: in which set is the peer? Sets hold addresses, and never change
    V…              outcomes by protocol and port, shared by all rule sets that have the same
    D…, A…          denied (log, drop) and audited (log): one chain for each reason, it counts
    BRIDGE          a pod's bridge port takes what is addressed to the pod

What passes returns, so that the other direction is asked too. Pods are told apart by source
address: see `podwire.datapath.nftables.policy_rules` for why, and for BRIDGE.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from podwire.datapath.iptables.ruleset import Names
from podwire.datapath.policy import AUDITED_PREFIX, DENIED_PREFIX, LOG_GROUP, SNAPLEN
from podwire.kernel.iptables import Hook, Rules
from podwire.net import format_address
from podwire.policy import Endpoint, Verdict
from podwire.services import Family

CHAIN = "PODWIRE-POL-"
# 130-132, 143: multicast listeners; 133-137: neighbour discovery.
_ALWAYS = (130, 131, 132, 133, 134, 135, 136, 137, 143)
_LIMIT = "-m limit --limit 100/sec --limit-burst 200"


def names(family: Family) -> Names:
    return Names(CHAIN, f"podwire-pol{family}-")


def hooks() -> dict[str, Sequence[Hook]]:
    def hook(chain: str) -> Hook:
        return Hook(chain, f'-m comment --comment "podwire policy" -j {CHAIN}{chain}')

    return {"mangle": [hook("FORWARD"), hook("INPUT")]}


def fixed_chains(family: Family, bridge: str, links: Iterable[str]) -> dict[str, Rules]:
    """By name. `bridge` is empty where every pod has a link of its own to the node: `links`."""
    pass_always = [
        f"-p ipv6-icmp -m icmp6 --icmpv6-type {number} -j RETURN"
        for number in _ALWAYS
        if family == 6
    ]
    established = "-m conntrack --ctstate RELATED,ESTABLISHED -j RETURN"
    bridged = [f"-m physdev --physdev-is-bridged -j {CHAIN}BRIDGE"] if bridge else []
    # A link-local source names no pod, and pods have no use for one but neighbour discovery.
    nameless = [
        f"-s fe80::/10 -i {link} -j DROP"
        for link in ([bridge] if bridge else sorted(links))
        if family == 6
    ]
    out: dict[str, Rules] = {
        "FORWARD": [*bridged, established, *pass_always, f"-j {CHAIN}FROM", f"-j {CHAIN}TO"],
        "INPUT": ["-i lo -j RETURN", established, *pass_always, *nameless, f"-j {CHAIN}FROM"],
    }
    return {CHAIN + name: rules for name, rules in out.items()}


def bridge_chain(family: Family, endpoints: Iterable[Endpoint]) -> Rules:
    """Nothing is delivered to a pod's port that is not addressed to the pod.

    Multicast and broadcast are addressed to nobody's rule set: isolated pods do not get them.
    """
    rules = [
        f"-p ipv6-icmp -m icmp6 --icmpv6-type {number} -j RETURN"
        for number in _ALWAYS
        if family == 6
    ]
    endpoints = sorted(endpoints)
    for isolated in (True, False):
        if not isolated:
            rules += [f"-m pkttype --pkt-type {kind} -j RETURN" for kind in _TO_MANY]
        for endpoint in endpoints:
            if (endpoint.ingress is not None) is isolated:
                rules += _own_traffic_only(family, endpoint)
    return rules


_TO_MANY = ("multicast", "broadcast")


def _own_traffic_only(family: Family, endpoint: Endpoint) -> list[str]:
    size, length = (4, 32) if family == 4 else (16, 128)
    own = [f"-d {format_address(a)}/{length}" for a in endpoint.addresses if len(a) == size]
    port = f"-m physdev --physdev-out {endpoint.link}"
    if len(own) == 1:
        return [f"! {own[0]} {port} -j DROP"]
    return [*(f"{each} {port} -j RETURN" for each in own), f"{port} -j DROP"]


def reason_chain(verdict: Verdict) -> Rules:
    """What is logged for one reason, and dropped unless it is only audited."""
    prefix = DENIED_PREFIX if verdict is Verdict.DENY else AUDITED_PREFIX
    log = (
        f'{_LIMIT} -j NFLOG --nflog-prefix "{prefix}" '
        f"--nflog-group {LOG_GROUP} --nflog-size {SNAPLEN}"
    )
    return [log, "-j DROP"] if verdict is Verdict.DENY else [log, "-j RETURN"]
