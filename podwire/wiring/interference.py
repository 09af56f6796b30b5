"""Whether a notification of the kernel says that somebody took away what is ours.

`concerns` of the wirings answers with it; then `restore` is due. Our own removals look alike, and a
restore that finds nothing to do is the price.
"""

from __future__ import annotations

from podwire.kernel import neighbour, route, rule
from podwire.kernel.monitor import LOST, Event, Group
from podwire.wiring import KERNEL_PROTOCOL

GROUPS = [
    Group.LINK,
    Group.NEIGHBOUR,
    Group.IPV4_ROUTE,
    Group.IPV4_RULE,
    Group.IPV6_ROUTE,
    Group.IPV6_RULE,
]
"""What a `Monitor` for `taken_away` listens to."""


def taken_away(event: Event) -> bool:
    """A rule, route or neighbour of `KERNEL_PROTOCOL` is gone, or notifications were lost."""
    match event.type:
        case rule.RTM_DELRULE:
            return rule.parse(event.body).protocol == KERNEL_PROTOCOL
        case route.RTM_DELROUTE:
            return route.parse(event.body).protocol == KERNEL_PROTOCOL
        case neighbour.RTM_DELNEIGH:
            return neighbour.parse(event.body).protocol == KERNEL_PROTOCOL
        case _:
            return event == LOST
