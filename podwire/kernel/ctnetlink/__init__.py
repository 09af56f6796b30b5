"""The kernel's connection table over netlink: read, filter, delete, count, listen.

    with Table() as table:                     # of the caller's namespace, or of a descriptor's
        table.usage()                          # Usage(count, limit), one message
        for entry in table.entries(Filter(...)): ...
        for counts in table.flow_counts(): ... # fast path: how many entries per FlowKey
        table.delete(Filter(...))              # in the kernel where it can
    events = Events(); events.drain()          # NEW, UPDATE, DESTROY; LOST after an overrun

Source: net/netfilter/nf_conntrack_netlink.c, include/uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

from podwire.kernel.ctnetlink.counting import FlowKey
from podwire.kernel.ctnetlink.entries import Counters, Entry, Status, TcpState, Tuple
from podwire.kernel.ctnetlink.events import Event, EventKind, Events
from podwire.kernel.ctnetlink.filters import Filter, Match
from podwire.kernel.ctnetlink.table import Table, Usage

__all__ = [
    "Counters",
    "Entry",
    "Event",
    "EventKind",
    "Events",
    "Filter",
    "FlowKey",
    "Match",
    "Status",
    "Table",
    "TcpState",
    "Tuple",
    "Usage",
]
