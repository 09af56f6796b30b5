"""nf_tables through two doors: `nft` in text for structure, our own messages for elements.

Structure (tables, chains, rules, sets) is rare and is read by people, so it goes through the
`nft` program. Elements are the hot path: a `Transaction` is a value made of element changes, and
`NfTables.commit` sends it as one atomic batch, without listing anything first. Rules that nft's
grammar cannot say are made of `expressions`.

Sources: include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h; nft(8).
"""

from podwire.kernel.nftables.tables import NfTables
from podwire.kernel.nftables.transaction import (
    ACCEPT,
    BRIDGE,
    DROP,
    INET,
    INTERVAL_END,
    IP,
    IP6,
    RETURN,
    Change,
    Data,
    Element,
    Set,
    Transaction,
    Verdict,
    concat,
    goto,
    interval,
    intervals,
    jump,
)

__all__ = [
    "ACCEPT",
    "BRIDGE",
    "DROP",
    "INET",
    "INTERVAL_END",
    "IP",
    "IP6",
    "RETURN",
    "Change",
    "Data",
    "Element",
    "NfTables",
    "Set",
    "Transaction",
    "Verdict",
    "concat",
    "goto",
    "interval",
    "intervals",
    "jump",
]
