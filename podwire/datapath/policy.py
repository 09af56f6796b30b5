"""What the spellings of policies share."""

from __future__ import annotations

from podwire.datapath import Requirement

BRIDGE_REQUIREMENTS = tuple(
    Requirement(
        f"net.bridge.bridge-nf-call-{family}tables",
        "1",
        "without it Services and policies between pods of one node are bypassed in silence",
        module="br_netfilter",
    )
    for family in ("ip", "ip6")
)

LOG_GROUP = 4647
"""Of nfnetlink_log: denied and audited packets, told apart by the prefix."""
DENIED_PREFIX = "podwire denied"
AUDITED_PREFIX = "podwire audited"
SNAPLEN = 128
